"""The run directory: sockets and files of a supervisor, its workers and its devices.

A run directory has one supervisor. Only its owner may enter it (0700, and `open_private`): a process that can connect
to the control socket can do everything that the supervisor can, and a client opens files for the supervisor behind it.

The path of a socket has at most 107 bytes. If the path of the run directory is too long for that, the sockets are in
another directory, whose short name is computed from the long one (`sockets`). The links `dev` and `vhost` lead there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import msgspec

from blkloom.control.trusted_path import open_private
from blkloom.device_names import mangle
from blkloom.errors import UsageError

_LONGEST_SOCKET_PATH: Final = 107
"""sun_path without the NUL."""
_LONGEST_WITH_SOCKETS: Final = _LONGEST_SOCKET_PATH - len("/workers/0123456789ab.sock")
"""Longest path of a directory, in bytes, so that paths of sockets in it fit."""
_LONGEST_FILE_NAME: Final = 255
"""NAME_MAX."""
_OF_ROOT: Final = Path("/run/blkloom")


def user_runtime(environment: Mapping[str, str]) -> Path | None:
    """The user's directory for runtime files; None for root, or if XDG_RUNTIME_DIR is not set (a relative path is
    ignored). Source: XDG Base Directory Specification.
    """
    path = Path(environment.get("XDG_RUNTIME_DIR", ""))
    return path if path.is_absolute() and os.geteuid() != 0 else None


class RunDir(msgspec.Struct, frozen=True):
    """Names in the directory `path`."""

    path: Path

    @classmethod
    def default(cls, environment: Mapping[str, str]) -> Self:
        """`$BLKLOOM_RUN_DIR`, else `/run/blkloom` for root and `$XDG_RUNTIME_DIR/blkloom` for others. Raises
        UsageError where neither is set.

        For root it is the directory of the systemd unit: after su(1) and sudo(8), XDG_RUNTIME_DIR may belong to another
        user, and the login manager removes root's own directory at logout.
        """
        if chosen := environment.get("BLKLOOM_RUN_DIR"):
            return cls.at(chosen)
        if os.geteuid() == 0:
            return cls(_OF_ROOT)
        if (runtime := user_runtime(environment)) is None:
            raise UsageError(
                f"no run directory: user {os.geteuid()} is not root, and XDG_RUNTIME_DIR is not set",
                cure="name one of your own with --run-dir DIR or BLKLOOM_RUN_DIR",
            )
        return cls(runtime / "blkloom")

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Self:
        """The directory as an absolute path: the working directory may change later."""
        return cls(Path(path).absolute())

    def make(self) -> None:
        """Makes the directory and its subdirectories. Raises UsageError if other users can change it, OSError."""
        os.close(open_private(self.path, make=True))
        folders = [self.states, self.files, self.mounts, self.kernel_nodes]
        if self.sockets == self.path:
            folders += self._of_sockets
        for folder in folders:
            folder.mkdir(mode=0o700, exist_ok=True)

    def make_sockets(self) -> None:
        """Makes the directory of the sockets, if it is another one. The caller holds `lock`. Raises UsageError,
        OSError.
        """
        if self.sockets == self.path:
            return
        os.close(open_private(self.sockets, make=True))
        for folder in self._of_sockets:
            folder.mkdir(mode=0o700, exist_ok=True)
        for to in (self.devices, self.vhost_sockets):
            link = self.path / to.name
            if not link.is_symlink():
                with suppress(FileNotFoundError):
                    link.rmdir()  # made when the path was shorter
                link.symlink_to(to)

    def remove_sockets(self) -> None:
        """Removes the directory that `make_sockets` made, if it is empty. The caller holds `lock`."""
        if self.sockets == self.path:
            return
        with suppress(OSError):  # a killed worker has left its socket; a supervisor removes it
            for folder in (*self._of_sockets, self.sockets):
                folder.rmdir()
            for to in (self.devices, self.vhost_sockets):
                (self.path / to.name).unlink(missing_ok=True)

    def open_sockets(self) -> int:
        """Opens the directory of the sockets (O_PATH), with the checks of `open_private`. Raises UsageError,
        FileNotFoundError, OSError.
        """
        directory = open_private(self.path)
        if self.sockets == self.path:
            return directory
        os.close(directory)
        return open_private(self.sockets)

    def has_devices(self) -> bool:
        """Whether a former supervisor has left devices, with or without workers."""
        return any(folder.exists() and any(folder.iterdir()) for folder in (self.states, self.workers))

    @property
    def sockets(self) -> Path:
        """The directory of the sockets: this one, or one in `/run` (root) or `/tmp` if this path is too long."""
        if len(os.fsencode(self.path)) <= _LONGEST_WITH_SOCKETS:
            return self.path
        name = _digest(os.fsencode(self.path))
        user = os.geteuid()
        return Path(f"/tmp/blkloom-{user}-{name}" if user else f"/run/blkloom-{name}")

    @property
    def control(self) -> Path:
        """The supervisor's socket."""
        return self.sockets / "control.sock"

    @property
    def lock(self) -> Path:
        """Lock file of the running supervisor (flock(2))."""
        return self.path / "lock"

    @property
    def start_lock(self) -> Path:
        """Lock file of the command that starts a supervisor."""
        return self.path / "start.lock"

    @property
    def log(self) -> Path:
        """Log file of a supervisor that a command has started."""
        return self.path / "supervisor.log"

    @property
    def devices(self) -> Path:
        """Every device's automatic NBD socket, by mangled name. Tables may name these paths."""
        return self.sockets / "dev"

    @property
    def vhost_sockets(self) -> Path:
        """Sockets over vhost-user, by mangled device name."""
        return self.sockets / "vhost"

    @property
    def _of_sockets(self) -> tuple[Path, ...]:
        """Directories with sockets."""
        return self.devices, self.vhost_sockets, self.workers

    @property
    def workers(self) -> Path:
        """Workers' own sockets."""
        return self.sockets / "workers"

    @property
    def states(self) -> Path:
        """Devices' state files."""
        return self.path / "devices"

    @property
    def files(self) -> Path:
        """Links to the FUSE files, by mangled device name."""
        return self.path / "fuse"

    @property
    def mounts(self) -> Path:
        """Mount points of the FUSE files: a mount cannot be renamed, a link to it can."""
        return self.path / "mounts"

    @property
    def links(self) -> Path:
        """Links to nodes, by mangled device name: /dev/blkloom for root's own run directory."""
        return Path("/dev/blkloom") if self.path == _OF_ROOT and os.geteuid() == 0 else self.path / "nodes"

    @property
    def kernel_nodes(self) -> Path:
        """Records of nodes, by the kernel's names."""
        return self.path / "kernel"

    def device(self, name: str) -> Path:
        """The automatic socket of a device. If the path is too long for a socket, the name is cut and ends in `~` and a
        digest. No mangled name has a `~`.
        """
        return _socket(self.devices, name)

    def vhost_socket(self, name: str) -> Path:
        """The socket of a device over vhost-user; a long name is cut in the same way."""
        return _socket(self.vhost_sockets, name)

    def file(self, name: str) -> Path:
        """The link to the FUSE file of a device; a long name is cut in the same way."""
        return self.files / _shortened(mangle(name), len(mangle(name)) - _LONGEST_FILE_NAME)

    def link(self, name: str) -> Path:
        """The link to the node of a device; a long name is cut in the same way."""
        return self.links / self.file(name).name

    def worker(self, identifier: str) -> Path:
        """A worker's own socket."""
        return self.workers / f"{identifier}.sock"

    def state(self, minor: int) -> Path:
        """A device's state file."""
        return self.states / f"{minor}.json"


def _socket(folder: Path, name: str) -> Path:
    """The socket of a device in a directory; see `RunDir.device`."""
    path = folder / mangle(name)
    return folder / _shortened(mangle(name), len(os.fsencode(path)) - _LONGEST_SOCKET_PATH)


def _shortened(mangled: str, over: int) -> str:
    """Shortens a name by `over` characters, with a digest at the end."""
    if over <= 0:
        return mangled
    tail = f"~{_digest(mangled.encode())}"
    return mangled[: -over - len(tail)] + tail


def _digest(name: bytes) -> str:
    import hashlib  # The import loads OpenSSL; not needed for short names.

    return hashlib.sha256(name).hexdigest()[:16]
