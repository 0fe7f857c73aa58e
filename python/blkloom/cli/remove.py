"""`blkloom remove`, `remove_all`, `wipe_table`: removes devices, or makes all their I/O fail."""

from __future__ import annotations

import click

from blkloom.cli.dm_verb import MANY, verb
from blkloom.cli.session import Named, Session
from blkloom.units import SECTOR

_force = click.option("-f", "--force", is_flag=True, help="Load an error table first: requests in flight fail.")
_deferred = click.option("--deferred", is_flag=True, help="If the device is in use, remove it after its last use.")


@verb("DEVICE...", selectors=MANY)
@_force
@_deferred
@click.option("--retry", is_flag=True, help="If the device is in use, try again for some seconds.")
def remove(session: Session, operands: tuple[str, ...], force: bool, deferred: bool, retry: bool) -> None:
    """Remove devices: drain, flush and remove each, with its socket.

    A device with clients, or with a device on top, is in use and stays.
    """
    for named in session.each(operands):
        with session.ioctl(named, "remove"):
            session.client.remove(named.wire, force=force, deferred=deferred, retry=retry)


@verb(most=0)
@_force
@_deferred
def remove_all(session: Session, operands: tuple[str, ...], force: bool, deferred: bool) -> None:
    """Remove every device that is not in use; with --force, devices in use get an error table."""
    kept = session.client.remove_all(force=force, deferred=deferred)
    if kept and force:
        click.echo(f"Unable to remove {len(kept)} device(s).", err=True)
    for name, why in kept:
        click.echo(f"blkloom: {session.show(name)} stays: {why}", err=True)


@verb("DEVICE...", selectors=MANY)
@click.option("-f", "--force", is_flag=True, help="Do not flush.")
@click.option("--noflush", is_flag=True, help="The same.")
@click.option("--nolockfs", is_flag=True, help="Accepted and ignored: file systems are never frozen.")
def wipe_table(session: Session, operands: tuple[str, ...], force: bool, noflush: bool, nolockfs: bool) -> None:
    """Load an error table of the same size: every request fails, and the device closes its files."""
    for named in session.each(operands):
        _wipe(session, named, flush=not (force or noflush))
        session.tell(named)


def _wipe(session: Session, named: Named, *, flush: bool) -> None:
    size = session.info(named, "table").size // SECTOR
    with session.ioctl(named, "reload"):
        session.client.load(named.wire, f"0 {size} error", source="wipe_table")
    with session.ioctl(named, "resume"):
        session.client.resume(named.wire, flush=flush)
