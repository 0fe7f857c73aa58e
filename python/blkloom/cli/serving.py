"""The life of `blkloom serve` once its devices are open: listen, say so, wait, stop, report."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack

import click
import msgspec

from blkloom import _engine
from blkloom.control.rundir import user_runtime
from blkloom.device.device import Device
from blkloom.errors import ListenError
from blkloom.export.nbd.server import NbdServer, ServerLimits
from blkloom.export.nbd.session import NbdExport
from blkloom.export.systemd import ServiceNotifier, adopt_socket, passed_descriptors
from blkloom.stats import MemoryUse, Stats

_log = logging.getLogger("blkloom.serve")
_LIVE_INTERVAL = 1.0
_STOP_TIMEOUT = 10.0


class Listening(msgspec.Struct, frozen=True):
    """Where to listen. allow_remote: on `tcp`, whatever address that is. environment, pid: those of the process,
    for what systemd passed, which is listened on wherever it is: its unit says so.
    """

    socket: str | None
    tcp: tuple[str, int] | None
    allow_remote: bool
    environment: Mapping[str, str]
    pid: int


class Report:
    """Counters of what `engine` serves, for people or programs. when: "exit", "live", "json" or None."""

    def __init__(self, when: str | None, engine: _engine.Engine) -> None:
        self._when = when
        self._engine = engine
        self._began = time.monotonic()

    async def live(self, exports: Mapping[str, NbdExport]) -> None:
        """Shows what happened in the last second, until cancelled."""
        if self._when != "live":
            return
        from rich.console import Console  # not for servers that show nothing
        from rich.live import Live
        from rich.text import Text

        before = {name: Stats.from_engine(export.export.stats()) for name, export in exports.items()}
        with Live(console=Console(stderr=True, highlight=False), auto_refresh=False, transient=True) as live:
            while True:
                await asyncio.sleep(_LIVE_INTERVAL)
                now = {name: Stats.from_engine(export.export.stats()) for name, export in exports.items()}
                texts = [
                    f"{_title(name)}  {exports[name].export.connections} connections\n"
                    + (now[name] - before[name]).to_text(seconds=_LIVE_INTERVAL)
                    for name in now
                ]
                live.update(Text("\n\n".join([*texts, self._memory().to_text()])), refresh=True)
                before = now

    def _memory(self) -> MemoryUse:
        return MemoryUse(**self._engine.memory())

    def final(self, exports: Mapping[str, NbdExport]) -> None:
        """Prints the sums on exit."""
        stats = {name: Stats.from_engine(export.export.stats()) for name, export in exports.items()}
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
    return f"export {name!r}" if name else "export"


async def run(
    devices: Mapping[str, Device],
    engine: _engine.Engine,
    listening: Listening,
    limits: ServerLimits,
    description: str,
    report: Report,
    *,
    once: bool,
) -> None:
    """Serves until a signal (or the last client's leaving, for `once`), then stops cleanly.

    Raises ListenError.
    """
    exports = {
        name: NbdExport(name, _engine.Export(device, name=name, read_only=device.read_only), description)
        for name, device in devices.items()
    }
    notifier = ServiceNotifier(listening.environment)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(NbdServer(engine, exports.values(), limits=limits))
        await _listen(server, listening, stack)
        for name in exports:
            for uri in server.uris(name):
                click.echo(uri)
        notifier.ready(f"serving {len(exports)} exports")
        waits: list[asyncio.Task[object]] = [asyncio.create_task(stop.wait(), name="signal")]
        if once:
            waits.append(asyncio.create_task(server.wait_for_last_client(), name="last client"))
        watcher = asyncio.create_task(report.live(exports), name="live counters")
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*waits, watcher):
                task.cancel()
            await asyncio.gather(*waits, watcher, return_exceptions=True)
        notifier.stopping()
        if left := await server.stop(_STOP_TIMEOUT):
            _log.warning("%d connections did not end in time and are cut", left)
    report.final(exports)


async def _listen(server: NbdServer, listening: Listening, stack: AsyncExitStack) -> None:
    passed = passed_descriptors(listening.environment, pid=listening.pid)
    for descriptor in passed:
        server.adopt(adopt_socket(descriptor.fd))
    if listening.socket is not None:
        await server.listen_unix(listening.socket)
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
