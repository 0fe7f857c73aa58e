"""`blkloom deps`: lists the devices and files below each device."""

from __future__ import annotations

import click

from blkloom.cli.dm_verb import MANY, verb
from blkloom.cli.ls import device_names
from blkloom.cli.session import Named, Session
from blkloom.dm.dependencies import Dependency, dependencies


@verb("[DEVICE...]", selectors=MANY)
@click.option("-o", "--options", metavar="OPTIONS", help="devno, devname or blkdevname.")
@click.option("--inactive", is_flag=True, hidden=True)
def deps(session: Session, operands: tuple[str, ...], options: str | None, inactive: bool) -> None:
    """List the devices and files that the tables of devices refer to.

    Block devices and blkloom devices are shown by number or name, files by path.
    """
    how = device_names(options)
    others = {info.name: info for info in session.everything()}
    several = session.several(operands)
    for info in session.found(operands, "deps"):
        session.tell(Named(info.name, name=info.name))
        name = f"{session.show(info.name)}: " if several and not session.verbose else ""
        found = dependencies(info, others)
        texts = "".join(f" ({_shown(dependency, how)})" for dependency in found)
        click.echo(f"{name}{len(found)} dependencies\t:{texts}")
        if several and session.verbose:
            click.echo()


def _shown(dependency: Dependency, how: str) -> str:
    return dependency.number(", ") if how == "devno" else dependency.block_name
