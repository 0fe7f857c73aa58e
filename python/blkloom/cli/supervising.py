"""`blkloom upgrade`, `reap`, `stop`: the process that keeps the devices."""

from __future__ import annotations

import click

from blkloom.cli.dm_verb import verb
from blkloom.cli.session import Session


@verb(most=0)
def upgrade(session: Session, operands: tuple[str, ...]) -> None:
    """Replace supervisor and workers by what is installed now, while devices go on.

    Clients stay connected: sockets, tables and memory are handed over between two requests.
    """
    click.echo(f"{session.client.upgrade()} workers replaced")


@verb(most=0)
def reap(session: Session, operands: tuple[str, ...]) -> None:
    """Remove sockets, state files and immutable flags that belong to nobody, and say which."""
    for line in session.start().reap():
        click.echo(line)


@verb(most=0)
@click.option("-f", "--force", is_flag=True, help="Also while clients are connected: cut them off.")
def stop(session: Session, operands: tuple[str, ...], force: bool) -> None:
    """Drain, flush and remove all devices, and end the supervisor.

    While clients are connected (one that has mounted a file system is one) everything stays as it is,
    unless --force says otherwise. SIGTERM to the supervisor does not ask.
    """
    session.client.stop(force=force)
