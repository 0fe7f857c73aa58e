"""`blkloom upgrade`, `reap`, `stop`: manages the supervisor process."""

from __future__ import annotations

import asyncio
import os

import click

from blkloom.cli.dm_verb import verb
from blkloom.cli.session import Session
from blkloom.control.rundir import user_runtime


@verb(most=0)
def upgrade(session: Session, operands: tuple[str, ...]) -> None:
    """Replace supervisor and workers by the installed version, while the devices stay in use.

    Clients stay connected: sockets, tables and memory are handed over between two requests.
    """
    click.echo(f"{session.client.upgrade()} workers replaced")


@verb(most=0)
def reap(session: Session, operands: tuple[str, ...]) -> None:
    """Remove stale sockets, state files and immutable flags, and print each.

    Also what `blkloom serve --attach` has left if it was killed.
    """
    for line in session.start().reap():
        click.echo(line)
    from blkloom.attach.private_directory import remove_abandoned

    for line in asyncio.run(remove_abandoned(user_runtime(os.environ))):
        click.echo(line)


@verb(most=0)
@click.option("-f", "--force", is_flag=True, help="Stop even while clients are connected; disconnect them.")
@click.option("--unmount", is_flag=True, help="First unmount the file systems that are mounted from nodes (root).")
def stop(session: Session, operands: tuple[str, ...], force: bool, unmount: bool) -> None:
    """Drain, flush and remove all devices, and end the supervisor.

    While clients are connected (a mounted file system is a client), this is refused, unless --force is given.
    SIGTERM to the supervisor is never refused.
    """
    if unmount:
        from blkloom.cli.unmounting import has_ended, unmount_and_remove

        if has_ended(session.run_dir):
            return
        for line in unmount_and_remove(session.client):
            click.echo(f"blkloom: {line}", err=True)
    session.client.stop(force=force)
