"""`blkloom export`, `unexport`: adds and removes exports of a device."""

from __future__ import annotations

import os
from typing import Any

import click

from blkloom.cli.addresses import allow_remote_option, listen_option
from blkloom.cli.attaching import NO_SURVIVAL
from blkloom.cli.dm_verb import ONE, verb
from blkloom.cli.permissions import permission_bits
from blkloom.cli.session import Session
from blkloom.cli.socket_options import permissions, socket_options
from blkloom.cli.tls_options import tls_options
from blkloom.dm.failing import VerbFailed
from blkloom.metrics.addresses import uri_of


@verb("DEVICE", "[PATH]", least=0, most=2, selectors=ONE)
@click.option("--fuse", is_flag=True, help="As a file: at PATH, or in the run directory.")
@click.option("--fuse-uring", is_flag=True, help="With --fuse: over io_uring; the file ends with its worker.")
@click.option("--allow-other", is_flag=True, help="With --fuse PATH: also for other users, as owner and mode allow.")
@click.option("--uid", type=int, metavar="N", help="With --fuse: the file's owner.")
@click.option("--gid", type=int, metavar="N", help="With --fuse: its group.")
@click.option("--mode", type=permission_bits, metavar="MODE", help="With --fuse: its permissions, octal (600).")
@click.option("--vhost-user", is_flag=True, help="For virtual machines: a socket at PATH, or in the run directory.")
@click.option("--socket", type=click.Path(readable=False), metavar="PATH", help="A Unix socket at PATH.")
@socket_options
@listen_option
@allow_remote_option
@tls_options
@click.option("--name", "export_name", metavar="NAME", help="What clients ask for; the device's name if not given.")
@click.option("-r", "--readonly", "--read-only", "readonly", is_flag=True, help="For reading only.")
@click.option("--shared", is_flag=True, help="For writing, even while it is attached for writing as a block device.")
@click.option("--reload-tls", is_flag=True, help="Read the certificates and keys of its exports again.")
@click.option("--list", "listed", is_flag=True, help="List the exports of DEVICE, or of all devices.")
def export(
    session: Session,
    operands: tuple[str, ...],
    fuse: bool,
    fuse_uring: bool,
    allow_other: bool,
    uid: int | None,
    gid: int | None,
    mode: int | None,
    vhost_user: bool,
    socket: str | None,
    socket_mode: int | None,
    socket_owner: int | None,
    socket_group: int | None,
    listen: tuple[str, int] | None,
    allow_remote: bool,
    export_name: str | None,
    readonly: bool,
    shared: bool,
    reload_tls: bool,
    listed: bool,
    nbd: dict[str, Any],
) -> None:
    """Add an NBD export, a file, or a disk of a virtual machine, and print where it is.

    \b
    blkloom export disk --listen localhost:10809
    blkloom export disk --socket /srv/disk.sock --read-only
    blkloom export disk --listen 0.0.0.0:10809 --tls=require --tls-psk /etc/blkloom/keys.psk
    blkloom export disk --fuse
    blkloom export disk --fuse /srv/disk.img --allow-other --mode 660 --gid 106
    blkloom export disk --vhost-user /run/vm/disk.sock
    blkloom export --list

    Every device has a socket of its own in the run directory; after unexport, export without an
    address opens it again. A file (FUSE) is for programs that open one: mkfs, mount -o loop, qemu-img, dd.
    With --vhost-user, a virtual machine has the device as its virtio disk (QEMU: vhost-user-blk-pci).
    """
    has_path = fuse or vhost_user
    before = 0 if session.elsewhere and has_path else 1
    paths = operands[before:]
    if len(paths) > 1 or (paths and not has_path):
        raise VerbFailed(f"unexpected argument: {paths[-1]}", what="only --fuse and --vhost-user take a PATH")
    if listed:
        _print_exports(session, operands[:1])
        return
    named = session.named(operands[0] if before and operands else None)
    if reload_tls:
        session.client.reload_tls(named.wire)
        return
    if socket is not None and listen is not None:
        raise VerbFailed("--socket and --listen are incompatible.", what="call export twice for both")
    path = os.path.abspath(paths[0]) if paths else ""
    if has_path:
        what = "call export twice for both"
        if socket is not None or listen is not None or allow_remote or export_name is not None or nbd:
            kind = "--fuse" if fuse else "--vhost-user"
            raise VerbFailed(f"{kind} is incompatible with options of NBD exports.", what=what)
        if fuse and vhost_user:
            raise VerbFailed("--fuse and --vhost-user are incompatible.", what=what)
    who = permissions(socket_mode, socket_owner, socket_group)
    if not who.is_default and (fuse or listen is not None):
        what = "--mode, --uid and --gid are those of a file" if fuse else "a TCP socket has no permissions"
        raise VerbFailed("--socket-mode, --socket-owner and --socket-group are of Unix sockets.", what=what)
    if fuse:
        wished: dict[str, Any] = {"user": uid, "group": gid, "mode": mode, "allow_other": allow_other}
        if fuse_uring:
            wished["uring"] = True
        made = session.client.export(
            named.wire, kind="fuse", path=path, read_only=readonly, shared=shared, options=wished
        )
        click.echo(made.path)
        if not (fuse_uring or made.details.get("survives")):
            click.echo(f"blkloom: WARNING: {NO_SURVIVAL}", err=True)
        return
    if fuse_uring:
        raise VerbFailed("--fuse-uring needs --fuse.", what="blkloom export DEVICE --fuse --fuse-uring")
    if allow_other or uid is not None or gid is not None or mode is not None:
        raise VerbFailed(
            "--allow-other, --uid, --gid and --mode need --fuse.",
            what="for sockets: --socket-mode, --socket-owner and --socket-group",
        )
    if vhost_user:
        added = session.client.export(
            named.wire, kind="vhost-user", path=path, read_only=readonly, shared=shared, socket=who
        )
        click.echo(added.path)
        return
    if allow_remote and listen is None:
        raise VerbFailed("--allow-remote needs --listen.", what="only this user can use a Unix socket")
    host, port = listen or ("", 0)
    state = session.client.export(
        named.wire,
        name=export_name or "",
        unix=os.path.abspath(socket) if socket else "",
        host=host,
        port=port,
        read_only=readonly,
        allow_remote=allow_remote,
        shared=shared,
        socket=who,
        options=nbd,
    )
    click.echo(uri_of(state))


def _print_exports(session: Session, operands: tuple[str, ...]) -> None:
    several = session.several(operands)
    for info in session.found(operands):
        name = f"{session.show(info.name)}: " if several else ""
        for state in info.exports:
            click.echo(f"{name}{state.id}\t{uri_of(state)}")


@verb("DEVICE", "EXPORT", least=1, most=2, selectors=ONE)
@click.option("-f", "--force", is_flag=True, help="Also remove a file that is open: its users get errors.")
def unexport(session: Session, operands: tuple[str, ...], force: bool) -> None:
    """Remove an export: EXPORT is what export --list calls it, or the path of its socket or file.

    NBD clients are disconnected; those of other exports stay. A file that is open stays, too.
    """
    if len(operands) == 1 and not session.elsewhere:
        raise VerbFailed("No export specified.", what="blkloom export DEVICE --list shows them")
    named = session.named(operands[0] if len(operands) == 2 else None)
    which = operands[-1]
    session.client.unexport(named.wire, os.path.abspath(which) if "/" in which else which, force=force)
