"""`blkloom rename`, `mangle`: changes and checks names of devices."""

from __future__ import annotations

import click

from blkloom.cli.dm_verb import MANY, ONE, verb
from blkloom.cli.session import Session
from blkloom.device_names import mangle as mangled
from blkloom.dm.failing import VerbFailed


@verb("DEVICE", "NEW_NAME_OR_UUID", least=1, most=2, selectors=ONE)
@click.option("--setuuid", is_flag=True, help="Set a uuid, for a device without one.")
def rename(session: Session, operands: tuple[str, ...], setuuid: bool) -> None:
    """Rename a device; its socket is renamed too, and clients stay connected.

    \b
    blkloom rename old new
    blkloom rename disk --setuuid 0b4e4f5e
    """
    if len(operands) == 1 and not session.elsewhere:
        raise VerbFailed("No device specified.")
    named = session.named(operands[0] if len(operands) == 2 else None)
    word = operands[-1]
    if setuuid:
        uuid = session.new_uuid(word)
        with session.ioctl(named, "rename"):
            session.client.rename(named.wire, uuid=uuid)
        return
    if "/" in word:
        raise VerbFailed(f'Name "{word}" invalid. It contains "/".')
    name = session.new_name(word, "rename", what="new name")
    with session.ioctl(named, "rename"):
        session.client.rename(named.wire, name=name)


@verb("[DEVICE...]", selectors=MANY)
def mangle(session: Session, operands: tuple[str, ...]) -> None:
    """Print that names are in the correct form: blkloom stores names unmangled."""
    for info in session.found(operands):
        uuid = mangled(info.uuid) if info.uuid else "[no UUID]"
        both = "and UUID " if info.uuid else ""
        click.echo(f"{mangled(info.name)}: {uuid}: name {both}already in correct form")
