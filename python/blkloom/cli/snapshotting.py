"""`blkloom snapshot`: writable snapshots of live devices."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from blkloom.cli.completing import complete_devices
from blkloom.cli.dm_verb import ONE, verb
from blkloom.cli.session import Session
from blkloom.dm.failing import NotACommandLine
from blkloom.units import format_size, parse_size

if TYPE_CHECKING:
    from blkloom.control.client import Client


def complete_snapshot(context: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The device, then a snapshot of it."""
    if len(context.params.get("operands") or ()) > 1:
        return []
    return complete_devices(context, param, incomplete)


@verb("[DEVICE [SNAPSHOT]]", most=2, complete=complete_snapshot, selectors=ONE)
@click.option("--file", metavar="PATH", help="A new file for what changes; otherwise memory.")
@click.option("--size", metavar="SIZE", help="Of that file or memory; otherwise room for all.")
@click.option("--chunk", metavar="SIZE", help="What is copied together, a power of 2; otherwise 16k.")
@click.option("--nolockfs", is_flag=True, help="Do not freeze a mounted file system for the instant.")
@click.option("--list", "as_list", is_flag=True, help="Print the snapshots of DEVICE (of all, without it).")
@click.option("--delete", "deletes", is_flag=True, help="Remove SNAPSHOT, or all of DEVICE.")
@click.option(
    "--merge", "--rollback", "merges", is_flag=True, help="Give DEVICE the contents of SNAPSHOT, and remove it."
)
def snapshot(
    session: Session, operands: tuple[str, ...], as_list: bool, deletes: bool, merges: bool, **options: object
) -> None:
    """Make SNAPSHOT, a device with what DEVICE contains now; both can be written to from then on.

    \b
    blkloom snapshot disk before                     # what changes is kept in memory
    blkloom snapshot disk monday --file monday.cow   # or in a file
    blkloom snapshot disk --list
    blkloom snapshot disk before --rollback          # disk is as it was, with the changes of `before`
    blkloom snapshot disk monday --delete

    Clients, nodes and mounted file systems of DEVICE stay; a file system is frozen for the instant. --merge and
    --rollback are the same, for a device that is not in use. They wait for the end of the merge, and can be called
    again without SNAPSHOT. The table of DEVICE is in the device DEVICE-real meanwhile.
    """
    given = {name: value for name, value in options.items() if value}
    if as_list + deletes + merges > 1:
        raise NotACommandLine("Only one of --list, --delete and --merge can be given.")
    if given and (as_list or deletes or merges):
        raise NotACommandLine("--file, --size, --chunk and --nolockfs are for a new snapshot.")
    device = session.named(None) if session.elsewhere else session.named(operands[0]) if operands else None
    rest = operands if session.elsewhere else operands[1:]
    if as_list or device is None:
        if given or deletes or merges or rest:
            raise NotACommandLine("A snapshot needs a device and a name.")
        for found in session.client.snapshots("" if device is None else device.wire):
            status = " ".join(line[3] for line in session.client.status(found.name))
            click.echo(f"{session.show(found.name)}\t{session.show(found.origin)}\t{status}\t{found.store}")
        return
    origin = session.info(device).name
    if rest and (merges or deletes):
        _check_origin(session, rest[0], origin)
    if merges:
        if rest:
            session.client.merge_snapshot(session.name(rest[0]))
        _finish(session.client, origin)
        return
    if deletes:
        session.client.delete_snapshot(session.name(rest[0]) if rest else device.wire)
        return
    if not rest:
        raise NotACommandLine("A snapshot needs a name.", what="blkloom snapshot DEVICE NAME")
    session.client.snapshot(
        device.wire,
        session.new_name(rest[0], "create"),
        file=str(given["file"]) if "file" in given else None,
        size=parse_size(str(given.get("size", "0"))),
        chunk=parse_size(str(given.get("chunk", "0"))),
        lock_fs="nolockfs" not in given,
    )


def _check_origin(session: Session, snapshot: str, origin: str) -> None:
    """Raises NotACommandLine for what is no snapshot of the device: the client takes a device with snapshots, too."""
    names = [found.name for found in session.client.snapshots(origin)]
    if session.name(snapshot) not in names:
        what = f"its snapshots: {', '.join(map(session.show, names)) or 'none'}"
        raise NotACommandLine(f"'{snapshot}' is no snapshot of '{origin}'.", what=what)


def _finish(client: Client, origin: str) -> None:
    if not sys.stderr.isatty():
        client.finish_merge(origin)
        return
    most = 0

    def show(left: int) -> None:
        nonlocal most
        most = max(most, left)
        click.echo(f"\rmerged {format_size(most - left)} of {format_size(most)}    ", nl=False, err=True)

    client.finish_merge(origin, show)
    click.echo(err=True)
