"""`blkloom mknodes`: makes the stable names of nodes again. Verbs of dmsetup that do nothing here (udev cookies).

The socket of a device exists when `create` returns, and is gone when `remove` returns, as is a node after `attach` and
`detach`; udev takes no part in that.
"""

from __future__ import annotations

import click

from blkloom.cli.dm_verb import MANY, verb
from blkloom.cli.session import Session


@verb("[DEVICE...]", selectors=MANY)
def mknodes(session: Session, operands: tuple[str, ...]) -> None:
    """Make the stable names of attached devices again, as they should be (of all, without DEVICE)."""
    if not operands and session.several(operands) and session.select is None:
        session.client.make_nodes()
        return
    for named in session.each(operands):
        with session.ioctl(named, "mknodes"):
            session.client.make_nodes(named.wire)


@verb(most=0)
def udevcreatecookie(session: Session, operands: tuple[str, ...]) -> None:
    """Print nothing: there is no udev to wait for."""


@verb("[COOKIE]", most=1, complete=None)
def udevreleasecookie(session: Session, operands: tuple[str, ...]) -> None:
    """Do nothing: there is no udev to wait for."""


@verb("COOKIE", least=1, most=1, complete=None)
def udevcomplete(session: Session, operands: tuple[str, ...]) -> None:
    """Do nothing: there is no udev to wait for."""


@verb("[AGE_IN_MINUTES]", most=1, complete=None)
def udevcomplete_all(session: Session, operands: tuple[str, ...]) -> None:
    """Do nothing: there is no udev to wait for."""


@verb(most=0)
def udevcookies(session: Session, operands: tuple[str, ...]) -> None:
    """Print the heading of an empty list."""
    click.echo("Cookie       Semid      Value      Last semop time           Last change time")
