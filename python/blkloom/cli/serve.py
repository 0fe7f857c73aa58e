"""`blkloom serve`: serves devices in the foreground, over NBD, as files (FUSE) or for virtual machines."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from blkloom import _engine, open_files
from blkloom.attach.registry import AUTO
from blkloom.cli.addresses import allow_remote_option, listen_option
from blkloom.cli.devices import DeviceRequest, open_devices, requested
from blkloom.cli.node_options import no_scan_option
from blkloom.cli.permissions import permission_bits
from blkloom.cli.serving import FileRequest, Listening, NodeRequest, Report, run
from blkloom.cli.session import RUN_DIR
from blkloom.cli.socket_options import permissions, socket_options
from blkloom.cli.table_completion import complete_table
from blkloom.cli.tables import allow_backing_option
from blkloom.cli.tls_options import tls_options
from blkloom.errors import BusyError, ResourceError, UsageError
from blkloom.export.nbd.details import NbdDetails
from blkloom.export.nbd.server import ServerLimits
from blkloom.image.registry import FORMATS
from blkloom.memory import default_budget, parse_budget
from blkloom.units import Bytes, parse_size

STATS = ("exit", "live", "json")


def _size(text: str) -> Bytes:
    """Option type: a number of bytes with a suffix."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _budget(text: str) -> int:
    """Option type: a memory budget."""
    try:
        return parse_budget(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.argument("files", nargs=-1, type=click.Path(readable=False), metavar="[FILE]...")
@click.option(
    "--table",
    metavar="TABLE",
    shell_complete=complete_table,
    help="A device from a dmsetup table; '-' reads it from standard input.",
)
@click.option("--table-file", type=click.Path(readable=False), metavar="PATH", help="A device from a table in a file.")
@click.option("--ram", type=_size, metavar="SIZE", help="A device in memory: 512M, 4G, ...")
@click.option("--device", "named", multiple=True, metavar="NAME=TABLE", help="One more device, exported as NAME.")
@click.option("--concise", metavar="TEXT", help="Devices in dmsetup's concise form: name,uuid,minor,flags,table;...")
@click.option("--export", "export_name", metavar="NAME", help="Name of the export (of a single device).")
@click.option("--description", default="", help="Description that clients can show.")
@click.option("--socket", type=click.Path(readable=False), metavar="PATH", help="Listen on a Unix socket at PATH.")
@socket_options
@listen_option
@allow_remote_option
@tls_options
@click.option("--fuse", type=click.Path(readable=False), metavar="PATH", help="As a file at PATH (FUSE).")
@click.option("--fuse-uring", is_flag=True, help="With --fuse: over io_uring (Linux 6.14).")
@click.option("--allow-other", is_flag=True, help="With --fuse: let other users use the file, as owner and mode allow.")
@click.option("--uid", type=int, metavar="N", help="With --fuse: the file's owner.")
@click.option("--gid", type=int, metavar="N", help="With --fuse: its group.")
@click.option("--mode", type=permission_bits, metavar="MODE", help="With --fuse: its permissions, octal (600).")
@click.option(
    "--vhost-user", type=click.Path(readable=False), metavar="PATH", help="For a virtual machine: a socket at PATH."
)
@click.option("--attach", is_flag=True, help="As nodes: block devices (root), or files.")
@no_scan_option
@click.option("-P", "--partscan", is_flag=True, help="The partitions, too: exports NAMEp1, ..., nodes or files.")
@click.option("-r", "--read-only", is_flag=True, help="Open all files read-only.")
@click.option("--direct-io", is_flag=True, help="Bypass the page cache (O_DIRECT) where the file system can.")
@click.option("--shared", is_flag=True, help="Do not lock the files: other programs may write to them.")
@click.option(
    "--format",
    "image_format",
    type=click.Choice(["auto", *FORMATS]),
    default="auto",
    show_default=True,
    help="Format of the FILEs; auto: qcow2 for names with that extension.",
)
@allow_backing_option
@click.option("--once", is_flag=True, help="Stop after the last client has left.")
@click.option(
    "--stats",
    is_flag=False,
    flag_value="exit",
    type=click.Choice(STATS),
    help="Print counters on exit, live while serving, or as JSON on exit.",
)
@click.option("--io", type=click.Choice(["auto", "io_uring", "threads"]), default="auto", show_default=True)
@click.option("--loops", type=click.IntRange(0, 64), default=0, help="Event loop threads; 0: one for each CPU.")
@click.option("--spin", type=click.IntRange(0, 10_000), default=50, show_default=True, help="Polling, in us at most.")
@click.option(
    "--client-memory",
    type=_budget,
    metavar="SIZE",
    help="Memory for requests of all clients (an eighth of the memory limit, 64 MiB to 1 GiB).",
)
@click.option("--max-connections", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--fault-timeout", type=click.FloatRange(0.001), default=30.0, show_default=True, metavar="SECONDS")
@click.option("--stall-timeout", type=click.FloatRange(0.001), default=60.0, show_default=True, metavar="SECONDS")
@click.pass_context
def serve(
    context: click.Context,
    files: Sequence[str],
    table: str | None,
    table_file: str | None,
    ram: Bytes | None,
    named: Sequence[str],
    concise: str | None,
    export_name: str | None,
    description: str,
    socket: str | None,
    socket_mode: int | None,
    socket_owner: int | None,
    socket_group: int | None,
    listen: tuple[str, int] | None,
    allow_remote: bool,
    fuse: str | None,
    fuse_uring: bool,
    allow_other: bool,
    uid: int | None,
    gid: int | None,
    mode: int | None,
    vhost_user: str | None,
    attach: bool,
    no_scan: bool,
    partscan: bool,
    read_only: bool,
    direct_io: bool,
    shared: bool,
    image_format: str,
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
    nbd: dict[str, Any],
) -> None:
    """Serve block devices over NBD, as files, or as disks of virtual machines, until interrupted.

    Prints one URI for each export when clients can connect. On SIGTERM or SIGINT it accepts no more
    clients, finishes requests in flight, flushes, and exits. Without --socket, --listen, --fuse,
    --vhost-user and --attach it listens on a Unix socket in a private directory, or on the sockets that
    systemd has passed.

    \b
    blkloom serve disk.img
    blkloom serve disk.qcow2
    blkloom serve --ram 1G --listen localhost:10809
    blkloom serve disk.img --listen 0.0.0.0:10809 --tls=require --tls-psk keys.psk
    blkloom serve disk.qcow2 --fuse disk.img
    blkloom serve disk.qcow2 --vhost-user /run/vm/disk.sock
    blkloom serve disk.qcow2 --attach
    blkloom serve --table '0 2048 loop a.img
    2048 4096 loop b.img 1048576' --socket /tmp/d.sock
    blkloom serve --device a='0 2048 loop a.img' --device b='0 2048 linear blkloom:a 0'

    Each FILE becomes one export with the name of the file; for several FILEs, --fuse and --vhost-user
    name a directory.
    A table may refer to an earlier device as blkloom:NAME.
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
        raise UsageError("--allow-remote needs --listen", cure="only this user can use a Unix socket")
    wished = {"user": uid, "group": gid, "mode": mode, "allow_other": allow_other}
    if fuse is None and fuse_uring:
        raise UsageError("--fuse-uring needs --fuse", cure="blkloom serve --fuse PATH --fuse-uring FILE")
    if fuse is None and any(value not in (None, False) for value in wished.values()):
        raise UsageError("--allow-other, --uid, --gid and --mode go with --fuse", cure="a socket is for this user")
    if no_scan and (partscan or not attach):
        why = "-P is a scan" if partscan else "udev looks at nodes only"
        raise UsageError(f"--no-scan is of nodes that are not scanned, and {why}", cure="leave it out")
    if once and (attach or fuse is not None or vhost_user is not None):
        cure = "a program may open a file or node many times, and a virtual machine may connect again"
        raise UsageError("--once is for NBD clients", cure=cure)
    file_request = None if fuse is None else FileRequest(fuse, wished | {"uring": fuse_uring})
    if file_request is not None or attach:
        from blkloom.export.memory_pressure import become_io_flusher

        become_io_flusher()  # before the engine has threads
    who = permissions(socket_mode, socket_owner, socket_group)
    if not who.is_default and socket is None and vhost_user is None:
        cure = "blkloom serve --socket PATH --socket-mode 660 --socket-group GROUP FILE"
        raise UsageError("--socket-mode, --socket-owner and --socket-group need --socket or --vhost-user", cure=cure)
    listening = Listening(socket, who, listen, allow_remote, os.environ, os.getpid())
    details = NbdDetails.parse(nbd)
    limits = ServerLimits(connections=max_connections, stall=stall_timeout, per_host=details.per_host)
    engine = _make_engine(io, loops, spin, client_memory or default_budget())
    try:
        with open_devices(
            devices,
            engine=engine,
            read_only=read_only,
            direct_io=direct_io,
            shared=shared,
            fault_timeout=fault_timeout,
            partscan=partscan,
        ) as opened:
            report = Report(stats, engine)
            nodes = NodeRequest(AUTO, scan=not no_scan) if attach else None
            serving = run(
                opened,
                engine,
                listening,
                limits,
                description,
                details,
                report,
                once=once,
                files=file_request,
                nodes=nodes,
                vhost_user=vhost_user,
            )
            asyncio.run(serving)
    except BusyError as error:
        from blkloom.cli.connecting import with_holders

        raise with_holders(error, context.meta.get(RUN_DIR)) from error
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
