"""`blkloom suspend`, `resume`: the gate of a device."""

from __future__ import annotations

import click

from blkloom.cli.dm_verb import MANY, verb
from blkloom.cli.session import Session

_noflush = click.option("--noflush", is_flag=True, help="Do not flush.")
_nolockfs = click.option("--nolockfs", is_flag=True, help="Taken as given: no file system is ever frozen.")
_timeout = click.option("--timeout", type=click.FloatRange(0.001), metavar="SECONDS", help="For requests in flight.")


@verb("DEVICE...", selectors=MANY)
@_noflush
@_nolockfs
@_timeout
def suspend(session: Session, operands: tuple[str, ...], noflush: bool, nolockfs: bool, timeout: float | None) -> None:
    """Finish the requests in flight, flush, and let new ones wait until resume.

    Clients stay connected; they see latency and nothing else.
    """
    for named in session.each(operands):
        with session.ioctl(named, "suspend"):
            session.client.suspend(named.wire, flush=not noflush, timeout=timeout)
        session.tell(named)


@verb("DEVICE...", selectors=MANY)
@_noflush
@_nolockfs
@_timeout
def resume(session: Session, operands: tuple[str, ...], noflush: bool, nolockfs: bool, timeout: float | None) -> None:
    """Swap the inactive table in, if there is one, and go on.

    A device that failed is tried again.
    """
    for named in session.each(operands):
        with session.ioctl(named, "resume"):
            session.client.resume(named.wire, flush=not noflush, timeout=timeout)
        session.tell(named)
