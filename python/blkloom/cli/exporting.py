"""`blkloom export`, `unexport`: the ways NBD clients reach a live device."""

from __future__ import annotations

import os

import click

from blkloom.cli.addresses import allow_remote_option, listen_option
from blkloom.cli.dm_verb import ONE, verb
from blkloom.cli.session import Session
from blkloom.dm.failing import VerbFailed
from blkloom.metrics.addresses import uri_of


@verb("DEVICE", least=0, most=1, selectors=ONE)
@click.option("--socket", type=click.Path(readable=False), metavar="PATH", help="A Unix socket (mode 0600).")
@listen_option
@allow_remote_option
@click.option("--name", "export_name", metavar="NAME", help="What clients ask for; the device's name if not given.")
@click.option("-r", "--readonly", "--read-only", "readonly", is_flag=True, help="For reading only.")
@click.option("--list", "listed", is_flag=True, help="Print the ways in that there are.")
def export(
    session: Session,
    operands: tuple[str, ...],
    socket: str | None,
    listen: tuple[str, int] | None,
    allow_remote: bool,
    export_name: str | None,
    readonly: bool,
    listed: bool,
) -> None:
    """Let NBD clients in by another way, and print its URI.

    \b
    blkloom export disk --listen localhost:10809
    blkloom export disk --socket /srv/disk.sock --read-only
    blkloom export disk --list

    Every device has a socket of its own in the run directory; after unexport, export without an
    address opens it again.
    """
    named = session.named(operands[0] if operands else None)
    if listed:
        for state in session.info(named).exports:
            click.echo(f"{state.id}\t{uri_of(state)}")
        return
    if socket is not None and listen is not None:
        raise VerbFailed("--socket and --listen are incompatible.", what="call export twice for both")
    if allow_remote and listen is None:
        raise VerbFailed("--allow-remote goes with --listen.", what="a Unix socket is for this user alone")
    host, port = listen or ("", 0)
    state = session.client.export(
        named.wire,
        name=export_name or "",
        unix=os.path.abspath(socket) if socket else "",
        host=host,
        port=port,
        read_only=readonly,
        allow_remote=allow_remote,
    )
    click.echo(uri_of(state))


@verb("DEVICE", "EXPORT", least=1, most=2, selectors=ONE)
def unexport(session: Session, operands: tuple[str, ...]) -> None:
    """Close a way in: EXPORT is what export --list calls it, or the path of its socket.

    Its clients are disconnected; those of other ways stay.
    """
    if len(operands) == 1 and not session.elsewhere:
        raise VerbFailed("No export specified.", what="blkloom export DEVICE --list shows them")
    named = session.named(operands[0] if len(operands) == 2 else None)
    which = operands[-1]
    session.client.unexport(named.wire, os.path.abspath(which) if "/" in which else which)
