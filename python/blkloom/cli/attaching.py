"""`blkloom attach`, `detach`: makes a node of a device, which people mkfs, mount and keep."""

from __future__ import annotations

import click

from blkloom.attach.registry import AUTO, names
from blkloom.cli.dm_verb import MANY, ONE, verb
from blkloom.cli.node_options import no_scan_option
from blkloom.cli.partitioning import add_partitions, partscan_option
from blkloom.cli.session import Session
from blkloom.control.replies import Attached
from blkloom.dm.failing import VerbFailed

NO_SURVIVAL = "users of the file get errors if its worker dies (before Linux 6.9)"
via_option = click.option(
    "--via",
    type=click.Choice([AUTO, *names()]),
    metavar="WAY",
    help="Attach it so. ublk, nbd, loop: block devices of the kernel (root); fuse: a file; auto: the best there is.",
)


@verb("DEVICE", most=1, selectors=ONE)
@via_option
@click.option("-r", "--readonly", "--read-only", "readonly", is_flag=True, help="For reading only.")
@partscan_option
@no_scan_option
@click.option("--shared", is_flag=True, help="NBD clients may write meanwhile; without it they may read only.")
@click.option(
    "--on-failure",
    type=click.Choice(["reissue", "fail"]),
    help="What becomes of requests when the worker dies. reissue: the next worker executes them (default); "
    "fail: those fail that it had begun (with --via ublk).",
)
@click.option(
    "--timeout",
    type=click.IntRange(1, 3600),
    metavar="SECONDS",
    help="Seconds until the kernel repeats a request that is not answered (with --via nbd).  [default: 30]",
)
@click.option(
    "--connections",
    type=click.IntRange(1, 8),
    metavar="N",
    help="Connections of the kernel to the worker (with --via nbd).  [default: one for each CPU, at most 8]",
)
def attach(
    session: Session,
    operands: tuple[str, ...],
    via: str | None,
    readonly: bool,
    partscan: bool,
    no_scan: bool,
    shared: bool,
    on_failure: str | None,
    timeout: int | None,
    connections: int | None,
) -> None:
    """Make a node of a device, and print its path.

    \b
    blkloom create disk disk.qcow2
    mkfs.ext4 $(blkloom attach disk)
    mount /dev/blkloom/disk /mnt
    umount /mnt && blkloom detach disk

    A file system that is mounted from it goes on when a worker is killed or upgraded, and when another table
    becomes active. /dev/blkloom/DEVICE is its stable name (in a run directory of your own: nodes/DEVICE).
    """
    of_nbd = "timeout" if timeout is not None else "connections" if connections is not None else ""
    if on_failure is not None and of_nbd:
        raise VerbFailed(f"--on-failure is incompatible with --{of_nbd}.", what="one is of ublk, the other of nbd")
    named = session.named(operands[0] if operands else None)
    options = {"on_failure": on_failure, "timeout": timeout, "connections": connections}
    implied = "ublk" if on_failure is not None else "nbd" if of_nbd else AUTO
    scan = False if no_scan else None  # None: as `create` was told
    made = session.client.attach(
        named.wire,
        via=via or implied,
        read_only=readonly,
        partitions=partscan,
        shared=shared,
        options={name: value for name, value in options.items() if value is not None},
        scan=scan,
    )
    click.echo(made.node.path)
    say_why(session, made)
    if partscan and not made.node.partitions:
        add_partitions(session, session.info(named))


def attach_new(session: Session, name: str, *, via: str, partitions: bool = False, silent: bool = False) -> None:
    """Attaches a device that was just made, and prints the node, unless `silent`; removes the device if that fails.
    partitions: also makes nodes of them, if the node is a block device.
    """
    try:
        made = session.client.attach(name, via=via, partitions=partitions)
    except BaseException:
        session.client.remove(name, force=True)
        raise
    if not silent:
        click.echo(made.node.path)
    say_why(session, made)


def say_why(session: Session, made: Attached) -> None:
    """Says why no better way is used: always where the node is no block device, else with -v; and what it lacks."""
    if not made.survives:
        click.echo(f"blkloom: WARNING: {NO_SURVIVAL}", err=True)
    if made.node.fixed_size:
        click.echo(f"blkloom: {made.node.path} cannot grow (before Linux 6.16); with --via loop it could", err=True)
    if session.verbose or made.node.via == "fuse":
        for way, why in made.passed_over.items():
            click.echo(f"blkloom: attached as a {made.node.via} node, not {way}: {why}", err=True)


@verb("DEVICE...", selectors=MANY)
@click.option("-l", "--lazy", is_flag=True, help="A node that is in use goes after its last use.")
@click.option("-f", "--force", is_flag=True, help="The same, and I/O of its users fails from now on.")
def detach(session: Session, operands: tuple[str, ...], lazy: bool, force: bool) -> None:
    """Remove the nodes of devices. A node that is open or mounted stays, and the error says who uses it.

    The devices stay, with their sockets.
    """
    from blkloom.cli.partition_devices import detach_partitions

    for named in session.each(operands):
        detach_partitions(session, session.info(named).name, lazy=lazy, force=force)
        session.client.detach(named.wire, lazy=lazy, force=force)
