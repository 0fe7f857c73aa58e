"""Options for who may connect to a Unix socket."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import click

from blkloom.cli.permissions import permission_bits

if TYPE_CHECKING:
    from blkloom.control.states import SocketPermissions


def user_id(text: str) -> int:
    """Option type: a user by name or number."""
    return _number(text, "user", lambda name: pwd.getpwnam(name).pw_uid)


def _group(text: str) -> int:
    """Option type: a group by name or number."""
    return _number(text, "group", lambda name: grp.getgrnam(name).gr_gid)


def _number(text: str, what: str, named: Callable[[str], int]) -> int:
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        return named(text)
    except KeyError:
        raise click.BadParameter(f"there is no {what} '{text}'") from None


_OPTIONS: Final = (
    click.option("--socket-mode", type=permission_bits, metavar="MODE", help="Permissions of a socket, octal (600)."),
    click.option("--socket-owner", type=user_id, metavar="USER", help="Owner of a socket."),
    click.option("--socket-group", type=_group, metavar="GROUP", help="Group of a socket."),
)


def socket_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the options, as arguments `socket_mode`, `socket_owner` and `socket_group`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def permissions(mode: int | None, owner: int | None, group: int | None) -> SocketPermissions:
    """The values of the options."""
    from blkloom.control.states import SocketPermissions  # msgspec is not needed for help

    return SocketPermissions(mode=mode, uid=owner, gid=group)
