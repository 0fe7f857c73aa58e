"""systemd's side of a service: sockets it passes on, and telling it how the service is doing.

The environment is always passed in, never read here. Source: sd_listen_fds(3), sd_notify(3).
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Final

import msgspec

from blkloom.errors import ListenError

FIRST_DESCRIPTOR: Final = 3
"""SD_LISTEN_FDS_START."""
NOTIFY_TIMEOUT: Final = 5.0
"""Seconds a notification may wait for room in systemd's socket."""


class PassedDescriptor(msgspec.Struct, frozen=True):
    """A descriptor systemd passed: its number, and its FileDescriptorName ("" where none was given)."""

    fd: int
    name: str


def passed_descriptors(environment: Mapping[str, str], *, pid: int) -> list[PassedDescriptor]:
    """What LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES say; [] when they are absent or meant for another pid.

    pid: this process. The caller removes the variables before it starts children. Raises ListenError
    when they are malformed.
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
    """Own a passed descriptor: close-on-exec, non-blocking. Raises ListenError, leaving `fd` open,
    unless it is a listening stream socket.
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
    """Tells the service manager named by NOTIFY_SOCKET; does nothing where there is none.

    A notification that cannot be delivered is logged as a warning: the service itself is unharmed.
    """

    def __init__(self, environment: Mapping[str, str], *, log: logging.Logger | None = None) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._log = log or logging.getLogger("blkloom.systemd")

    def ready(self, status: str = "") -> None:
        """READY=1: exports can be reached."""
        self._send("READY=1", status)

    def stopping(self, status: str = "") -> None:
        """STOPPING=1: no new clients from now on."""
        self._send("STOPPING=1", status)

    def status(self, status: str) -> None:
        """STATUS=: one line for a person."""
        self._send("", status)

    def _send(self, state: str, status: str) -> None:
        if not self._address:
            return
        lines = [state] if state else []
        if status:
            lines.append(f"STATUS={' '.join(status.split())}")
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.settimeout(NOTIFY_TIMEOUT)
                channel.sendto(os.fsencode("\n".join(lines)), self._address)
        except OSError as error:
            self._log.warning("systemd was not told %s: %s", " ".join(lines), error)


def _number(environment: Mapping[str, str], variable: str) -> int:
    text = environment[variable]
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise _malformed(variable, text, "not a number")
    return int(text)


def _malformed(variable: str, text: str, why: str) -> ListenError:
    return ListenError(
        f"{variable}={text!r} is malformed: {why}", cure="start from a systemd .socket unit, or unset it"
    )
