"""`blkloom loop`: losetup for blkloom devices, with the same options and messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from typing_extensions import override

from blkloom.cli.completing import complete_devices
from blkloom.cli.loop_options import LoopFailed, LoopOptions, read_options
from blkloom.cli.session import Session
from blkloom.dm.failing import Told
from blkloom.errors import BlkloomError
from blkloom.version import VERSION


class _LoopCommand(click.Command):
    """Parses the command line like losetup; its parameters serve only for help and completion."""

    @override
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        options = read_options(args)
        if "help" in options:
            return super().parse_args(ctx, ["--help"])
        ctx.params = {"options": options}
        return []

    @override
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (BlkloomError, OSError) as error:
            raise Told(error) from error


def _flags(*named: tuple[str, str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options in the help: their form and their meaning."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for written, text in reversed(named):
            names, _, metavar = written.partition(" ")
            function = click.option(*names.split(","), metavar=metavar or None, is_flag=not metavar, help=text)(
                function
            )
        return function

    return decorate


@click.command(cls=_LoopCommand)
@click.argument("operands", nargs=-1, metavar="[LOOPDEV] [FILE]", shell_complete=complete_devices)
@_flags(
    ("-f,--find", "Find the first unused device; with FILE, set it up."),
    ("--show", "Print its node, where there is one; else its name."),
    ("--name NAME", "With -f: call it NAME."),
    ("-o,--offset NUM", "Start at this byte of FILE (suffixes K M G T, KB MB ...)."),
    ("--sizelimit NUM", "Use at most this many bytes of FILE."),
    ("-b,--sector-size NUM", "Logical block size: 512, 1024, 2048 or 4096."),
    ("-r,--read-only", "For reading only."),
    ("-P,--partscan", "Also make devices for the partitions: loop0p1, loop0p2, ..."),
    ("--direct-io [=on|off]", "Past the page cache."),
    ("--block-map [=try]", "Map the file's blocks (no file system in the data path); try: if possible."),
    ("--autoclear", "Remove the device and its node after the last user has left."),
    ("--no-attach", "Make no node, and print the name of the device."),
    ("--no-scan", "udev does not look what is on the node: no LVM, MD or btrfs of it is activated."),
    ("--shared", "Do not lock FILE: other programs may write to it."),
    ("-L,--nooverlap", "Use an existing device for FILE; refuse an overlapping one."),
    ("-d,--detach", "Detach devices; a device in use is detached after its last use."),
    ("-D,--detach-all", "Detach all loop devices."),
    ("-c,--set-capacity", "Read the size of the file and the partitions again."),
    ("--change FILE", "Replace the file of a read-only device by one of the same size."),
    ("-a,--all", "List all loop devices."),
    ("-j,--associated FILE", "List the devices of FILE (with -o: at this offset)."),
    ("-l,--list", "List as a table."),
    ("-O,--output COLUMNS", "Columns of the table; +COLUMNS adds columns."),
    ("--output-all", "All columns."),
    ("-n,--noheadings", "No headings."),
    ("--raw", "Columns not aligned."),
    ("-J,--json", "The table as JSON."),
)
def loop(options: LoopOptions) -> None:
    """Set up files as devices, as losetup does.

    \b
    blkloom loop -f --show disk.img            a device on a file; its node, or its name
    mount $(blkloom loop -f --show disk.img) /mnt
    blkloom loop -f --show -P -r usb.img       its partitions too: loop0p1, ...
    blkloom info -c --noheadings -o socket loop0
    blkloom loop                               the table of all
    blkloom loop -c loop0                      the file has grown
    blkloom loop -d loop0

    LOOPDEV is loop0 or any other name, or the path of its node; NBD clients find it at its socket. As root it is
    attached as well, if the machine can do that; its node (/dev/loopN) need not have the number of its name.

    Columns: AUTOCLEAR, BACK-FILE, BACK-INO, BACK-MAJ:MIN, NAME, OFFSET, PARTSCAN, RO, SIZELIMIT, MAJ:MIN,
    DIO, LOG-SEC, NODE, SOCKET, MODE.
    """
    if "version" in options:
        click.echo(f"blkloom loop from blkloom {VERSION}")
        return
    _act(Session(click.get_current_context()), options)


def _act(session: Session, options: LoopOptions) -> None:
    """Selects the action of losetup, in the same order as losetup."""
    from blkloom.cli import loop_setup

    words = list(options.operands)
    listing = "list" in options or "output" in options or "output-all" in options
    forms = {"json", "raw"} & options.given.keys()
    if not words and (not options.given or (forms and not options.given.keys() - {"json", "raw", "noheadings"})):
        _show(session, options, None)
    elif "find" in options:
        if len(words) > 1:
            raise LoopFailed("unexpected arguments")
        if words:
            loop_setup.set_up(session, options, options.given.get("name"), words[0])
        else:
            _refuse_setup(options)
            click.echo(loop_setup.first_free(session))
    elif "detach" in options or "set-capacity" in options:
        _refuse_setup(options)
        if not words:
            raise LoopFailed("no loop device specified")
        if "detach" in options:
            loop_setup.detach(session, words)
        else:
            loop_setup.set_capacity(session, words[0])
    elif "change" in options:
        _refuse_setup(options)
        if not words:
            raise LoopFailed("no loop device specified")
        loop_setup.change_file(session, words[0], options.given["change"])
    elif "detach-all" in options:
        _refuse_setup(options)
        loop_setup.detach_all(session)
    elif "all" in options or "associated" in options or (listing and not words):
        _refuse_setup(options, offset="associated" in options)
        _show(session, options, None, old=not listing)
    elif len(words) == 1 and "name" not in options:
        if options.direct_io is not None or options.block_size is not None or options.block_map is not None:
            loop_setup.modify(session, options, words[0])
        else:
            _refuse_setup(options)
            _show(session, options, words[0], old=not listing)
    else:
        if "name" in options:
            words.insert(0, options.given["name"])
        if not words:
            raise LoopFailed("no loop device specified")
        if len(words) < 2:
            raise LoopFailed("no file specified")
        if len(words) > 2:
            raise LoopFailed("unexpected arguments")
        loop_setup.set_up(session, options, words[0], words[1])


def _refuse_setup(options: LoopOptions, *, offset: bool = False) -> None:
    """Refuses setup options for other actions."""
    if {
        "sizelimit",
        "partscan",
        "read-only",
        "show",
        "autoclear",
        "shared",
        "name",
        "nooverlap",
        "no-scan",
    } & options.given.keys():
        raise LoopFailed(
            "the options --{sizelimit,partscan,read-only,show} are allowed during loop device setup only",
            what="and so are --autoclear, --name, --nooverlap, --no-scan and --shared",
        )
    if options.offset is not None and not offset:
        raise LoopFailed("the option --offset is not allowed in this context")


def _show(session: Session, options: LoopOptions, word: str | None, *, old: bool = False) -> None:
    from blkloom.cli import loop_listing
    from blkloom.cli.loop_devices import find_loop, loop_devices, of_file

    columns = loop_listing.chosen(options.given.get("output"), everything="output-all" in options)
    found = [find_loop(session, word)] if word is not None else loop_devices(session)
    if (file := options.given.get("associated")) is not None:
        found = of_file(found, file)
        if options.offset is not None:
            found = [device for device in found if device.table and device.table.offset == options.offset]
    headings = "noheadings" not in options
    rows = loop_listing.rows(session, found, aligned=not {"json", "raw"} & options.given.keys())
    if old:
        lines = [loop_listing.as_line(device) for device in found]
    elif "json" in options:
        lines = loop_listing.as_json(rows, columns)
    elif "raw" in options:
        lines = loop_listing.as_raw(rows, columns, headings=headings)
    else:
        lines = loop_listing.as_table(rows, columns, headings=headings)
    for line in lines:
        click.echo(line)
