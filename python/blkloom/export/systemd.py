"""systemd's protocol for services: descriptors that it passes and stores, and notifications of the state.

The caller passes the environment. Source: sd_listen_fds(3), sd_notify(3).
"""

from __future__ import annotations

import logging
import os
import socket
from array import array
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from blkloom.errors import ListenError
from blkloom.printing import printable

FIRST_DESCRIPTOR: Final = 3
"""SD_LISTEN_FDS_START."""
NOTIFY_TIMEOUT: Final = 5.0
"""Seconds that a notification may wait for space in the buffer of systemd's socket."""
_LONGEST_NAME: Final = 255
"""FDNAME_MAX."""


class PassedDescriptor(msgspec.Struct, frozen=True):
    """A descriptor that systemd has passed: its number, and its FileDescriptorName ("" for none)."""

    fd: int
    name: str


def passed_descriptors(environment: Mapping[str, str], *, pid: int) -> list[PassedDescriptor]:
    """Parses LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES. Returns [] if they are absent or for another pid.

    pid: this process. The caller removes the variables before it starts children. Raises ListenError
    if they are malformed.
    """
    if "LISTEN_FDS" not in environment or "LISTEN_PID" not in environment:
        return []
    if _number(environment, "LISTEN_PID") != pid:
        return []
    count = _number(environment, "LISTEN_FDS")
    names = environment["LISTEN_FDNAMES"].split(":") if environment.get("LISTEN_FDNAMES") else [""] * count
    if len(names) != count:
        raise _malformed("LISTEN_FDNAMES", environment["LISTEN_FDNAMES"], f"{len(names)} names for {count} descriptors")
    return [PassedDescriptor(FIRST_DESCRIPTOR + index, name) for index, name in enumerate(names)]


def adopt_socket(fd: int) -> socket.socket:
    """Takes over a passed descriptor, as a non-blocking socket with close-on-exec. Raises ListenError, and leaves `fd`
    open, unless it is a listening stream socket.
    """
    try:
        adopted = socket.socket(fileno=fd)
    except OSError as error:
        raise ListenError(
            f"descriptor {fd} passed to this process is no socket: {error.strerror}", errno=error.errno
        ) from error
    if adopted.type != socket.SOCK_STREAM or not adopted.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        adopted.detach()
        raise ListenError(
            f"descriptor {fd} passed to this process is no listening stream socket",
            cure="use ListenStream= with Accept=no in the .socket unit",
        )
    adopted.set_inheritable(False)
    adopted.setblocking(False)
    return adopted


class ServiceNotifier:
    """Notifies the service manager of NOTIFY_SOCKET; does nothing if that is not set.

    If a notification cannot be delivered, a warning is logged.
    """

    def __init__(self, environment: Mapping[str, str], *, log: logging.Logger | None = None) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._log = log or logging.getLogger("blkloom.systemd")

    def ready(self, status: str = "") -> None:
        """Sends READY=1: clients can connect."""
        self._send("READY=1", status)

    def stopping(self, status: str = "") -> None:
        """Sends STOPPING=1: no new clients are accepted."""
        self._send("STOPPING=1", status)

    def status(self, status: str) -> None:
        """Sends STATUS=: one line of text for users."""
        self._send("", status)

    def store(self, name: str, fd: int) -> None:
        """Sends FDSTORE=1: a copy of `fd` goes into the descriptor store of the service, and is passed at its next
        start, under this name. systemd closes it by itself when it reports EPOLLHUP or EPOLLERR. Raises ValueError for
        a name that systemd would refuse.
        """
        _check_fd_name(name)
        self._notify(["FDSTORE=1", f"FDNAME={name}"], [fd])

    def forget(self, name: str) -> None:
        """Sends FDSTOREREMOVE=1: closes the stored descriptors of this name. Raises ValueError as `store`."""
        _check_fd_name(name)
        self._notify(["FDSTOREREMOVE=1", f"FDNAME={name}"])

    def _send(self, state: str, status: str) -> None:
        lines = [state] if state else []
        if status:
            lines.append(f"STATUS={' '.join(status.split())}")
        self._notify(lines)

    def _notify(self, lines: Sequence[str], fds: Sequence[int] = ()) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.settimeout(NOTIFY_TIMEOUT)
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
                channel.sendmsg([os.fsencode("\n".join(lines))], rights, 0, self._address)
        except OSError as error:
            self._log.warning("systemd was not told %s: %s", " ".join(lines), error)


def _check_fd_name(name: str) -> None:
    if not name or len(name) > _LONGEST_NAME or not all(" " <= char < "\x7f" and char != ":" for char in name):
        raise ValueError(
            f"no name for a stored descriptor: '{printable(name)}'; at most {_LONGEST_NAME} printable characters, no :"
        )


def _number(environment: Mapping[str, str], variable: str) -> int:
    text = environment[variable]
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise _malformed(variable, text, "not a number")
    return int(text)


def _malformed(variable: str, text: str, why: str) -> ListenError:
    return ListenError(
        f"{variable}='{text}' is malformed: {why}", cure="start from a systemd .socket unit, or unset it"
    )
