"""`blkloom suspend`, `resume`: stops and restarts the I/O of a device."""

from __future__ import annotations

import click

from blkloom.cli.dm_verb import MANY, verb
from blkloom.cli.session import Session

_noflush = click.option("--noflush", is_flag=True, help="Do not flush.")
_nolockfs = click.option("--nolockfs", is_flag=True, help="Do not freeze file systems on the device's node.")
_timeout = click.option("--timeout", type=click.FloatRange(0.001), metavar="SECONDS", help="For requests in flight.")


@verb("DEVICE...", selectors=MANY)
@_noflush
@_nolockfs
@_timeout
def suspend(session: Session, operands: tuple[str, ...], noflush: bool, nolockfs: bool, timeout: float | None) -> None:
    """Finish the requests in flight and flush; new requests wait until resume.

    Clients stay connected; they only see a delay. File systems that are mounted from its node (blkloom attach) are
    frozen before, so that what is on the device is clean; not with --noflush.
    """
    for named in session.each(operands):
        with session.ioctl(named, "suspend"):
            session.client.suspend(named.wire, flush=not noflush, lock_fs=not nolockfs, timeout=timeout)
        session.tell(named)


@verb("DEVICE...", selectors=MANY)
@_noflush
@_nolockfs
@_timeout
@click.option("--addnodeonresume", is_flag=True, help="Then attach the device, if it is not attached.")
def resume(
    session: Session,
    operands: tuple[str, ...],
    noflush: bool,
    nolockfs: bool,
    timeout: float | None,
    addnodeonresume: bool,
) -> None:
    """Make the inactive table active, if there is one, and continue I/O.

    For a failed device: try to start it again.
    """
    for named in session.each(operands):
        with session.ioctl(named, "resume"):
            session.client.resume(named.wire, flush=not noflush, timeout=timeout, attach=addnodeonresume)
        session.tell(named)
