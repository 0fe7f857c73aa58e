"""Verbs of dmsetup's that have nothing to do here, so that scripts need not know: nodes and udev's cookies.

A device's socket is there when `create` returns and gone when `remove` does; nobody else takes part.
"""

from __future__ import annotations

import click

from blkloom.cli.dm_verb import MANY, verb
from blkloom.cli.session import Session


@verb("[DEVICE...]", selectors=MANY)
def mknodes(session: Session, operands: tuple[str, ...]) -> None:
    """Do nothing: sockets come and go with their devices."""
    for text in operands:
        session.named(text)


@verb(most=0)
def udevcreatecookie(session: Session, operands: tuple[str, ...]) -> None:
    """Print nothing: there is no udev to wait for."""


@verb("[COOKIE]", most=1, complete=False)
def udevreleasecookie(session: Session, operands: tuple[str, ...]) -> None:
    """Do nothing: there is no udev to wait for."""


@verb("COOKIE", least=1, most=1, complete=False)
def udevcomplete(session: Session, operands: tuple[str, ...]) -> None:
    """Do nothing: there is no udev to wait for."""


@verb("[AGE_IN_MINUTES]", most=1, complete=False)
def udevcomplete_all(session: Session, operands: tuple[str, ...]) -> None:
    """Do nothing: there is no udev to wait for."""


@verb(most=0)
def udevcookies(session: Session, operands: tuple[str, ...]) -> None:
    """Print the heading of an empty list."""
    click.echo("Cookie       Semid      Value      Last semop time           Last change time")
