"""`blkloom load`, `reload`, `clear`: fill and empty the inactive slot."""

from __future__ import annotations

from typing import Any

import click

from blkloom.cli.dm_verb import MANY, ONE, verb
from blkloom.cli.session import Session
from blkloom.cli.table_completion import complete_table
from blkloom.cli.tables import read_table
from blkloom.dm.failing import VerbFailed

_table = click.option(
    "--table", metavar="TABLE", shell_complete=complete_table, help="The table (else TABLE_FILE or standard input)."
)
_readonly = click.option("-r", "--readonly", "--read-only", "readonly", is_flag=True, help="For reading only.")
_notable = click.option("-n", "--notable", is_flag=True, hidden=True)
_shared = click.option("--shared", is_flag=True, help="Do not lock the files: other programs may write to them.")


def _load(
    session: Session, operands: tuple[str, ...], table: str | None, readonly: bool, notable: bool, shared: bool
) -> None:
    """Load a table into the inactive slot of a device; `resume` makes it active.

    \b
    blkloom load disk --table '0 4096 loop bigger.img'
    blkloom resume disk

    If the table cannot be loaded, nothing changes.
    """
    if notable:
        raise VerbFailed("--notable only available when creating new device.")
    if not session.elsewhere and not operands:
        raise VerbFailed("Please specify device.")
    if session.elsewhere and len(operands) > 1:
        raise VerbFailed("Too many command line arguments.")
    name, file = (None, *operands, None)[:2] if session.elsewhere else (*operands, None)[:2]
    named = session.named(name)
    text = read_table(table, file)
    with session.ioctl(named, "reload"):
        session.client.load(named.wire, text.text, source=text.source, read_only=readonly, shared=shared)
    session.tell(named)


def _named(name: str) -> click.Command:
    def run(session: Session, operands: tuple[str, ...], **options: Any) -> None:
        _load(session, operands, **options)

    run.__doc__ = _load.__doc__
    return verb("DEVICE", "[TABLE_FILE]", most=2, name=name, selectors=ONE)(_table(_readonly(_notable(_shared(run)))))


load = _named("load")
reload = _named("reload")


@verb("DEVICE...", selectors=MANY)
def clear(session: Session, operands: tuple[str, ...]) -> None:
    """Remove the table from the inactive slot of a device."""
    for named in session.each(operands):
        with session.ioctl(named, "clear"):
            session.client.clear(named.wire)
        session.tell(named)
