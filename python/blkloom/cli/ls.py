"""`blkloom ls`: lists devices, or prints the tree of stacked devices."""

from __future__ import annotations

import locale
import os

import click

from blkloom.cli.dm_verb import MANY, verb
from blkloom.cli.session import Session
from blkloom.cli.table_completion import complete_targets
from blkloom.control.states import DeviceInfo
from blkloom.device_names import MAJOR, mangle
from blkloom.dm.dependencies import block_name
from blkloom.dm.failing import NotACommandLine


@verb(most=0, selectors=MANY)
@click.option(
    "--target", metavar="TYPE", shell_complete=complete_targets, help="Only devices with a segment of this target."
)
@click.option("--tree", is_flag=True, help="Print the tree of stacked devices.")
@click.option("-o", "--options", metavar="OPTIONS", help="devno, devname or blkdevname; for --tree: ascii, utf, ...")
@click.option("--exec", "command", metavar="COMMAND", help="Run COMMAND with the path of each device's socket.")
def ls(
    session: Session,
    operands: tuple[str, ...],
    target: str | None,
    tree: bool,
    options: str | None,
    command: str | None,
) -> None:
    """List devices.

    \b
    blkloom ls
    blkloom ls --target striped
    blkloom ls --tree -o ascii,open

    Options of --tree: ascii, utf, vt100; compact, inverted, notrunc; blkdevname, [no]device, active,
    open, rw, uuid. An attached device is shown with the name of its node, as with blkdevname.
    """
    if tree:
        _draw(session, options or "")
        return
    how = device_names(options)
    infos = list(session.found(()))
    if target is None and command is None:
        for info in infos:
            shown = block_name(info) if how == "blkdevname" else info.name
            number = f"{MAJOR}:{info.minor}" if how == "devno" else mangle(shown)
            click.echo(f"{session.show(info.name)}\t({number})")
        return
    for info in infos:
        if target is not None and target not in info.types:
            continue
        if command is None or session.verbose:
            click.echo(f"{session.show(info.name)}\t({MAJOR}, {info.minor})")
        if command is not None:
            from blkloom.cli.executing import execute

            execute(command, session, info)


def device_names(options: str | None) -> str:
    """The last one given of devno, blkdevname and devname. Raises NotACommandLine."""
    how = "devno"
    for option in filter(None, (options or "").split(",")):
        found = [name for name in ("devno", "blkdevname", "devname") if name.startswith(option)]
        if not found:
            raise NotACommandLine(f"Option not recognised: {option}.", what="devno, devname or blkdevname")
        how = found[0]
    return how


def _draw(session: Session, options: str) -> None:
    from blkloom.dm.dependencies import Graph
    from blkloom.dm.tree import ASCII, UTF, Style, draw, read_style

    locale.setlocale(locale.LC_CTYPE, "")
    utf = locale.nl_langinfo(locale.CODESET) == "UTF-8"
    style = read_style(options, Style(symbols=UTF if utf else ASCII, width=_width()))
    infos: list[DeviceInfo] = list(session.found(()))
    for line in draw(Graph(infos), style, session.show):
        click.echo(line)


def _width() -> int:
    try:
        columns = os.get_terminal_size(1).columns
    except OSError:
        return 80
    return columns - 3 if columns > 3 else 80
