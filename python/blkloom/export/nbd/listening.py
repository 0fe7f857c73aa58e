"""Listening sockets (Unix, TCP, and adopted ones), and their URIs.

The file of a Unix socket has the mode 0600 from the start (Linux takes it from the socket, whose mode is set before it
is bound); other owners and permissions are set before the process listens. It replaces a stale file only if no process
listens there, and is removed on close only if it is still the same file. Not safe against two servers that start on one
path within the microseconds between bind and listen. TCP addresses that other hosts can reach must be confirmed
(`allow_remote`, or TLS that proves who clients are), because NBD has no authentication; sockets of other programs
are adopted without a check. Errors are ListenError.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import msgspec

from blkloom.errors import ListenError, UsageError
from blkloom.export.nbd.uri import reachable_host, tcp_uri, unix_uri
from blkloom.peer_credentials import peer_credentials

if TYPE_CHECKING:
    from blkloom.control.states import SocketPermissions

BACKLOG: Final = 1024
"""Most connections that wait in the kernel to be accepted (limited by net.core.somaxconn)."""
_PATH_LIMIT: Final = 107


class Listener(msgspec.Struct):
    """A listening, non-blocking socket. owned: (device, inode) of the socket file to remove on close."""

    socket: socket.socket
    owned: tuple[int, int] | None = None

    def __str__(self) -> str:
        address = self.socket.getsockname()
        if self.socket.family == socket.AF_UNIX:
            return f"unix:{os.fsdecode(address)}"
        return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"

    def uri(self, name: str = "", *, tls: bool = False) -> str:
        """The NBD URI of the export `name` on this socket. tls: clients must use TLS."""
        address = self.socket.getsockname()
        if self.socket.family == socket.AF_UNIX:
            return unix_uri(address, name, tls=tls)
        return tcp_uri(reachable_host(address[0]), address[1], name, tls=tls)

    def close(self) -> None:
        """Stops listening; removes the socket file if it is still the same one."""
        if self.socket.fileno() < 0:
            return
        path = self.socket.getsockname() if self.owned else None
        # Unlinked while still bound, so that the inode number cannot have been given out again.
        try:
            if path is not None and _identity(path) == self.owned:
                os.unlink(path)
        finally:
            self.socket.close()


def listen_unix(path: str | os.PathLike[str], permissions: SocketPermissions | None = None) -> Listener:
    """Listens on a Unix socket at `path`, which is made absolute. permissions: who may connect; by default this user
    only (mode 0600).
    """
    absolute = os.path.abspath(os.fspath(path))
    check_path(absolute)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listening.fileno(), 0o600)
        try:
            listening.bind(absolute)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(absolute)
            listening.bind(absolute)
        if permissions is not None:
            _permit(absolute, permissions)
        listening.listen(BACKLOG)
        return Listener(listening, _identity(absolute))
    except OSError as error:
        listening.close()
        if isinstance(error, ListenError):
            raise
        raise ListenError(
            f"{absolute}: cannot listen: {os.strerror(error.errno or errno.EIO)}",
            cure="choose a socket path in a directory this user may write to",
            errno=error.errno,
        ) from error


def _permit(path: str, permissions: SocketPermissions) -> None:
    """Sets owner and mode of a socket's file, at which no process listens yet. Raises ListenError; the file is removed
    then.
    """
    try:
        if permissions.uid is not None or permissions.gid is not None:
            user, group = (-1 if number is None else number for number in (permissions.uid, permissions.gid))
            os.chown(path, user, group)
        if permissions.mode is not None:
            os.chmod(path, permissions.mode)
    except OSError as error:
        os.unlink(path)
        raise ListenError(
            f"{path}: owner and permissions of the socket cannot be set: {os.strerror(error.errno or errno.EIO)}",
            cure="only root may give a socket to another user, or to a group that this user is not in",
            errno=error.errno,
        ) from error


def check_path(path: str) -> None:
    """Raises ListenError if `path` is too long for a Unix socket (unix(7))."""
    if len(os.fsencode(path)) > _PATH_LIMIT:
        raise ListenError(
            f"{path}: too long for a Unix socket",
            cure=f"use a path of at most {_PATH_LIMIT} bytes",
            errno=errno.ENAMETOOLONG,
        )


async def listen_tcp(host: str, port: int, *, allow_remote: bool = False) -> list[Listener]:
    """Listens on every address that `host` resolves to ("" for all). port 0: one free port for all of them.

    allow_remote: also on addresses that other hosts can reach; without it, those raise UsageError.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:  # ValueError: what cannot be a name, as one with 64 bytes between its dots
        why = error.strerror if isinstance(error, OSError) else error
        raise ListenError(
            f"'{host}' is no address of this machine: {why}", cure="give a host name or an IP address"
        ) from error
    if not allow_remote:
        _check_loopback(host, [str(address[0]) for *_, address in found])
    listeners: list[Listener] = []
    try:
        for family, *_, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            chosen = listeners[0].socket.getsockname()[1] if listeners else port
            listeners.append(Listener(_bind_tcp(family, (address[0], chosen, *address[2:]))))
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise ListenError(
            f"cannot listen on {host or '*'}:{port}: {os.strerror(error.errno or errno.EIO)}",
            cure="choose another port or address" if error.errno != errno.EACCES else "use a port from 1024 on",
            errno=error.errno,
        ) from error
    return listeners


def is_listening(path: str | os.PathLike[str]) -> bool:
    """Whether a server listens on the Unix socket `path`."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:
            return True  # it listens, and is busy
        except OSError:
            return False
        return True


def _check_loopback(host: str, addresses: Iterable[str]) -> None:
    for address in addresses:
        number = ipaddress.ip_address(address)
        mapped = number.ipv4_mapped if isinstance(number, ipaddress.IPv6Address) else None
        if not (mapped or number).is_loopback:
            named = address if host in ("", address) else f"{host} ({address})"
            raise UsageError(
                f"other hosts can reach {named}, and NBD has no authentication: every client may use the device",
                cure="listen on localhost, say --tls=require with --tls-verify-peer or --tls-psk, or confirm it with"
                " --allow-remote",
            )


def adopt(listening: socket.socket) -> Listener:
    """A listening stream socket of another program (socket activation), which still owns the socket's file."""
    if listening.family not in {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6}:
        raise ListenError(
            f"cannot serve NBD on a socket of family {listening.family.name}; AF_UNIX, AF_INET and AF_INET6 can be"
        )
    listening.setblocking(False)
    return Listener(listening)


def peer_name(connected: socket.socket) -> str:
    """The peer of a connection, for logs: `192.0.2.1:40000`, or `unix pid 12 uid 1000`."""
    if connected.family == socket.AF_UNIX:
        peer = peer_credentials(connected)
        return f"unix pid {peer.pid} uid {peer.uid}"
    host, port = connected.getpeername()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind_tcp(family: int, address: tuple[object, ...]) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


def _remove_stale(path: str) -> None:
    """Removes the socket file at `path` if no process listens on it; otherwise raises ListenError."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ListenError(
            f"{path}: exists and is not a socket", cure="remove it, or choose another path", errno=errno.EEXIST
        )
    _check_no_listener(path, path)
    # Another server may have replaced the file since: take it aside, look again, put it back if alive.
    aside = f"{path}.{os.getpid()}"
    if len(os.fsencode(aside)) > _PATH_LIMIT:
        os.unlink(path)
        return
    os.rename(path, aside)
    try:
        _check_no_listener(aside, path)
    except ListenError:
        os.rename(aside, path)
        raise
    os.unlink(aside)


def _check_no_listener(path: str, shown: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        outcome = probe.connect_ex(path)
    if outcome in {0, errno.EAGAIN}:  # EAGAIN: a process listens, with a full backlog
        raise ListenError(
            f"{shown}: another server listens there", cure="stop it, or choose another path", errno=errno.EADDRINUSE
        )
    if outcome != errno.ECONNREFUSED:
        raise ListenError(
            f"{shown}: exists, and whether it is in use cannot be told: {os.strerror(outcome)}", errno=outcome
        )


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
