"""`blkloom serve`: devices in the foreground, reached over NBD."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Literal

import click

from blkloom import _engine, open_files
from blkloom.cli.addresses import allow_remote_option, listen_option
from blkloom.cli.devices import DeviceRequest, open_devices, requested
from blkloom.cli.serving import Listening, Report, run
from blkloom.cli.tables import allow_backing_option
from blkloom.errors import ResourceError, UsageError
from blkloom.export.nbd.server import ServerLimits
from blkloom.memory import default_budget, parse_budget
from blkloom.units import Bytes, parse_size

STATS = ("exit", "live", "json")


def _size(text: str) -> Bytes:
    """A byte count with a suffix."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _budget(text: str) -> int:
    """A budget of memory."""
    try:
        return parse_budget(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.argument("files", nargs=-1, type=click.Path(readable=False), metavar="[FILE]...")
@click.option("--table", metavar="TABLE", help="A device from a dmsetup table; '-' reads it from standard input.")
@click.option("--table-file", type=click.Path(readable=False), metavar="PATH", help="A device from a table in a file.")
@click.option("--ram", type=_size, metavar="SIZE", help="A device of memory: 512M, 4G, ...")
@click.option("--device", "named", multiple=True, metavar="NAME=TABLE", help="One more device, exported as NAME.")
@click.option("--concise", metavar="TEXT", help="Devices in dmsetup's concise form: name,uuid,minor,flags,table;...")
@click.option("--export", "export_name", metavar="NAME", help="Name of the export (of a single device).")
@click.option("--description", default="", help="Text that clients are shown.")
@click.option("--socket", type=click.Path(readable=False), metavar="PATH", help="Listen on a Unix socket (mode 0600).")
@listen_option
@allow_remote_option
@click.option("-r", "--read-only", is_flag=True, help="Open everything for reading only.")
@click.option("--direct-io", is_flag=True, help="Bypass the page cache (O_DIRECT) where the file system can.")
@click.option("--shared", is_flag=True, help="Do not lock files; others may change them meanwhile.")
@click.option(
    "--format",
    "image_format",
    type=click.Choice(["auto", "raw", "qcow2"]),
    default="auto",
    show_default=True,
    help="What FILEs are; auto: qcow2 if they are named so.",
)
@allow_backing_option
@click.option("--once", is_flag=True, help="Stop when the last client has left.")
@click.option(
    "--stats",
    is_flag=False,
    flag_value="exit",
    type=click.Choice(STATS),
    help="Print counters on exit, live while serving, or as JSON on exit.",
)
@click.option("--io", type=click.Choice(["auto", "io_uring", "threads"]), default="auto", show_default=True)
@click.option("--loops", type=click.IntRange(0, 64), default=0, help="Loop threads; 0 for one a CPU.")
@click.option("--spin", type=click.IntRange(0, 10_000), default=50, show_default=True, help="Polling, in us at most.")
@click.option(
    "--client-memory",
    type=_budget,
    metavar="SIZE",
    help="For requests of all clients together; an eighth of what the process may use, 64 MiB to 1 GiB.",
)
@click.option("--max-connections", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--fault-timeout", type=click.FloatRange(0.001), default=30.0, show_default=True, metavar="SECONDS")
@click.option("--stall-timeout", type=click.FloatRange(0.001), default=60.0, show_default=True, metavar="SECONDS")
def serve(
    files: Sequence[str],
    table: str | None,
    table_file: str | None,
    ram: Bytes | None,
    named: Sequence[str],
    concise: str | None,
    export_name: str | None,
    description: str,
    socket: str | None,
    listen: tuple[str, int] | None,
    allow_remote: bool,
    read_only: bool,
    direct_io: bool,
    shared: bool,
    image_format: Literal["auto", "raw", "qcow2"],
    allow_backing: Sequence[str],
    once: bool,
    stats: str | None,
    io: str,
    loops: int,
    spin: int,
    client_memory: int | None,
    max_connections: int,
    fault_timeout: float,
    stall_timeout: float,
) -> None:
    """Serve block devices over NBD until interrupted.

    Prints one URI an export as soon as clients can connect. On SIGTERM or SIGINT it stops taking
    clients, finishes what is in flight, flushes, and exits. Without --socket and --listen it
    listens on a Unix socket of its own in a private directory, or on what systemd passed to it.

    \b
    blkloom serve disk.img
    blkloom serve disk.qcow2
    blkloom serve --ram 1G --listen localhost:10809
    blkloom serve --table '0 2048 loop a.img
    2048 4096 loop b.img 1048576' --socket /tmp/d.sock
    blkloom serve --device a='0 2048 loop a.img' --device b='0 2048 linear blkloom:a 0'

    Several FILEs are several exports, named after the files. Devices may name each other in
    tables as blkloom:NAME, later ones the earlier.
    """
    open_files.raise_limit()
    if table == "-":
        table, source = sys.stdin.read(), "standard input"
    else:
        source = "--table"
    devices = requested(
        files,
        table,
        source,
        table_file,
        ram,
        named,
        concise,
        image_format=image_format,
        allow_backing=allow_backing,
    )
    if export_name is not None:
        if len(devices) != 1:
            raise UsageError(f"--export names one device, there are {len(devices)}", cure="use --device NAME=TABLE")
        devices = [DeviceRequest(export_name, devices[0].table, devices[0].read_only)]
    if allow_remote and listen is None:
        raise UsageError("--allow-remote goes with --listen", cure="a Unix socket is for this user alone")
    listening = Listening(socket, listen, allow_remote, os.environ, os.getpid())
    limits = ServerLimits(connections=max_connections, stall=stall_timeout)
    engine = _make_engine(io, loops, spin, client_memory or default_budget())
    try:
        with open_devices(
            devices,
            engine=engine,
            read_only=read_only,
            direct_io=direct_io,
            shared=shared,
            fault_timeout=fault_timeout,
        ) as opened:
            asyncio.run(run(opened, engine, listening, limits, description, Report(stats, engine), once=once))
    finally:
        engine.close()


def _make_engine(io: str, loops: int, spin: int, memory: int) -> _engine.Engine:
    try:
        engine = _engine.Engine(io=io, loops=loops, spin_us=spin, memory=memory)  # type: ignore[arg-type]
    except OSError as error:
        raise ResourceError(
            f"--io={io}: {error.strerror}", cure="use --io=auto, which falls back to threads", errno=error.errno
        ) from error
    if io == "auto" and engine.io == "threads":
        click.echo("blkloom: WARNING: io_uring is not available here; file I/O goes through threads", err=True)
    return engine
