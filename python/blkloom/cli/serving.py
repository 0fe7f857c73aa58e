"""The server part of `blkloom serve`, after its devices are open: listens, prints URIs, waits, stops, reports."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import click
import msgspec

from blkloom import _engine
from blkloom.cli.devices import Served
from blkloom.control.rundir import user_runtime
from blkloom.control.states import SocketPermissions
from blkloom.errors import ListenError, UsageError
from blkloom.export.nbd.details import NbdDetails
from blkloom.export.nbd.server import NbdServer, ServerLimits
from blkloom.export.nbd.session import NbdExport
from blkloom.export.systemd import ServiceNotifier, adopt_socket, passed_descriptors
from blkloom.stats import MemoryUse, Stats

_log = logging.getLogger("blkloom.serve")
_LIVE_INTERVAL = 1.0
_STOP_TIMEOUT = 10.0


class Listening(msgspec.Struct, frozen=True):
    """Addresses to listen on. permissions: of sockets with a path. allow_remote: `tcp` may be an address that other
    hosts can reach. environment, pid: of the process, for sockets that systemd has passed; those may have any address.
    """

    socket: str | None
    permissions: SocketPermissions
    tcp: tuple[str, int] | None
    allow_remote: bool
    environment: Mapping[str, str]
    pid: int

    @property
    def is_wanted(self) -> bool:
        """Whether an address was given."""
        passed = passed_descriptors(self.environment, pid=self.pid)
        return self.socket is not None or self.tcp is not None or bool(passed)


class FileRequest(msgspec.Struct, frozen=True):
    """FUSE files of the devices. path: of the file; for several devices, of a directory. options: see
    `export.fuse.state.FuseOptions`.
    """

    path: str
    options: Mapping[str, Any]


class NodeRequest(msgspec.Struct, frozen=True):
    """Nodes of the devices. via: a way of `attach.registry`, or its AUTO. scan: udev looks what is on them."""

    via: str
    scan: bool = True


class Report:
    """Prints the counters of `engine`, as text or JSON. when: "exit", "live", "json" or None."""

    def __init__(self, when: str | None, engine: _engine.Engine) -> None:
        self._when = when
        self._engine = engine
        self._began = time.monotonic()

    async def live(self, exports: Mapping[str, _engine.Export]) -> None:
        """Prints the counters of the last second, until cancelled."""
        if self._when != "live":
            return
        from rich.console import Console  # imported only by servers that print statistics
        from rich.live import Live
        from rich.text import Text

        before = {name: Stats.from_engine(export.stats()) for name, export in exports.items()}
        with Live(console=Console(stderr=True, highlight=False), auto_refresh=False, transient=True) as live:
            while True:
                await asyncio.sleep(_LIVE_INTERVAL)
                now = {name: Stats.from_engine(export.stats()) for name, export in exports.items()}
                texts = [
                    f"{_title(name)}  {exports[name].connections} connections\n"
                    + (now[name] - before[name]).to_text(seconds=_LIVE_INTERVAL)
                    for name in now
                ]
                live.update(Text("\n\n".join([*texts, self._memory().to_text()])), refresh=True)
                before = now

    def _memory(self) -> MemoryUse:
        return MemoryUse(**self._engine.memory())

    def final(self, exports: Mapping[str, _engine.Export]) -> None:
        """Prints the totals at exit."""
        stats = {name: Stats.from_engine(export.stats()) for name, export in exports.items()}
        if self._when == "json":
            import json

            memory = self._memory().to_dict()
            click.echo(json.dumps({name: {**counters.to_dict(), "memory": memory} for name, counters in stats.items()}))
        elif self._when:
            seconds = time.monotonic() - self._began
            for name, counters in stats.items():
                click.echo(f"{_title(name)}, {seconds:.1f} s\n{counters.to_text(seconds=seconds)}", err=True)
            click.echo(self._memory().to_text(), err=True)


def _title(name: str) -> str:
    return f"export '{name}'" if name else "export"


async def run(
    served: Served,
    engine: _engine.Engine,
    listening: Listening,
    limits: ServerLimits,
    description: str,
    details: NbdDetails,
    report: Report,
    *,
    once: bool,
    files: FileRequest | None = None,
    nodes: NodeRequest | None = None,
    vhost_user: str | None = None,
) -> None:
    """Serves until a signal (or, for `once`, until the last client has left), then stops cleanly. details: of the NBD
    exports. files: also serve as
    files. nodes: also as nodes. vhost_user: also for virtual machines, at this path. With any of these, over NBD only
    if an address to listen on was given.

    Raises ListenError, MountError, UsageError.
    """
    devices = served.devices
    over_nbd = (files is None and nodes is None and vhost_user is None) or listening.is_wanted
    exports = {
        name: NbdExport(
            name,
            _engine.Export(device, name=name, read_only=device.read_only),
            description,
            access=details.access,
        )
        for name, device in (devices if over_nbd else {}).items()
    }
    counted = {name: export.export for name, export in exports.items()}
    notifier = ServiceNotifier(listening.environment)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(NbdServer(engine, exports.values(), limits=limits, tls=details.tls))
        if details.tls.mode != "off":
            loop.add_signal_handler(signal.SIGHUP, _reload_tls, server)
        if over_nbd:
            await _listen(server, listening, stack)
        for name in exports:
            for uri in server.uris(name):
                click.echo(uri)
        if files is not None:
            from blkloom.cli.serving_files import ServedFiles  # imported only by servers with files

            opened = await stack.enter_async_context(ServedFiles(engine, served, files))
            for path, export in opened.exports.items():
                click.echo(path)
                counted[path] = export
        if nodes is not None:
            from blkloom.cli.serving_files import ServedNodes  # imported only by servers with nodes

            made = await stack.enter_async_context(ServedNodes(engine, served, nodes))
            for path, export in made.exports.items():
                click.echo(path)
                counted[path] = export
        if vhost_user is not None:
            from blkloom.cli.serving_machines import ServedMachines  # imported only by servers of virtual machines

            machines = await stack.enter_async_context(
                ServedMachines(engine, served, vhost_user, listening.permissions)
            )
            for path, export in machines.exports.items():
                click.echo(path)
                counted[path] = export
        notifier.ready(f"serving {len(counted)} exports")
        waits: list[asyncio.Task[object]] = [asyncio.create_task(stop.wait(), name="signal")]
        if once:
            waits.append(asyncio.create_task(server.wait_for_last_client(), name="last client"))
        watcher = asyncio.create_task(report.live(counted), name="live counters")
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*waits, watcher):
                task.cancel()
            await asyncio.gather(*waits, watcher, return_exceptions=True)
        notifier.stopping()
        if left := await server.stop(_STOP_TIMEOUT):
            _log.warning("%d connections did not end in time and are closed", left)
    report.final(counted)


def _reload_tls(server: NbdServer) -> None:
    try:
        server.reload_tls()
    except UsageError as error:
        _log.error("%s", error)


async def _listen(server: NbdServer, listening: Listening, stack: AsyncExitStack) -> None:
    passed = passed_descriptors(listening.environment, pid=listening.pid)
    for descriptor in passed:
        server.adopt(adopt_socket(descriptor.fd))
    if listening.socket is not None:
        await server.listen_unix(listening.socket, listening.permissions)
    if listening.tcp is not None:
        await server.listen_tcp(*listening.tcp, allow_remote=listening.allow_remote)
    if not passed and listening.socket is None and listening.tcp is None:
        import shutil
        import tempfile

        runtime = user_runtime(listening.environment)
        try:
            folder = tempfile.mkdtemp(prefix="blkloom-", dir=runtime)
        except OSError as error:
            raise ListenError(
                f"no directory for a socket can be made in {runtime or tempfile.gettempdir()}: {error.strerror}",
                cure="choose a path with --socket",
                errno=error.errno,
            ) from error
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        await server.listen_unix(os.path.join(folder, "nbd.sock"))
