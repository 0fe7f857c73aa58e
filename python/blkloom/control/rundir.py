"""The run directory: where a supervisor, its workers and its devices have their sockets and files.

One supervisor a directory. It is its owner's alone (0700, and `open_private`): whoever can reach the control
socket can do what the supervisor can, and a client opens files for the supervisor that answers there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

import msgspec

from blkloom.control.trusted_path import open_private
from blkloom.dm.names import mangle
from blkloom.errors import UsageError

_LONGEST_SOCKET_PATH: Final = 107
"""sun_path without the NUL."""


def user_runtime(environment: Mapping[str, str]) -> Path | None:
    """The directory for what this user's processes have while they run; None for root, and where
    XDG_RUNTIME_DIR is not set (a relative one does not count). Source: XDG Base Directory Specification.
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

        Root's is where its unit has it. su(1) and sudo(8) may leave it the XDG_RUNTIME_DIR of another user, and
        the login manager removes its own when root logs out.
        """
        if chosen := environment.get("BLKLOOM_RUN_DIR"):
            return cls.at(chosen)
        if os.geteuid() == 0:
            return cls(Path("/run/blkloom"))
        if (runtime := user_runtime(environment)) is None:
            raise UsageError(
                f"no run directory: user {os.geteuid()} is not root, and XDG_RUNTIME_DIR is not set",
                cure="name one of your own with --run-dir DIR or BLKLOOM_RUN_DIR",
            )
        return cls(runtime / "blkloom")

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Self:
        """That directory, made absolute: what comes later may have another working directory."""
        return cls(Path(path).absolute())

    def make(self) -> None:
        """Makes it and its folders. Raises UsageError where others have a hand in it, OSError."""
        os.close(open_private(self.path, make=True))
        for folder in (self.devices, self.states, self.workers):
            folder.mkdir(mode=0o700, exist_ok=True)

    def has_devices(self) -> bool:
        """Whether a supervisor that has gone left devices behind, with their workers or without."""
        return any(folder.exists() and any(folder.iterdir()) for folder in (self.states, self.workers))

    @property
    def control(self) -> Path:
        """The supervisor's socket."""
        return self.path / "control.sock"

    @property
    def lock(self) -> Path:
        """Held by the supervisor (flock(2)) as long as it lives."""
        return self.path / "lock"

    @property
    def start_lock(self) -> Path:
        """Held by who starts a supervisor."""
        return self.path / "start.lock"

    @property
    def log(self) -> Path:
        """What a supervisor that a command started says."""
        return self.path / "supervisor.log"

    @property
    def devices(self) -> Path:
        """Every device's automatic NBD socket, by mangled name. Tables may name these paths."""
        return self.path / "dev"

    @property
    def workers(self) -> Path:
        """Workers' own sockets."""
        return self.path / "workers"

    @property
    def states(self) -> Path:
        """Devices' state files."""
        return self.path / "devices"

    def device(self, name: str) -> Path:
        """A device's automatic socket. Where its path would be longer than a socket's may be, the name is
        cut and a digest of it put behind a `~`, which no mangled name has.
        """
        path = self.devices / mangle(name)
        over = len(os.fsencode(path)) - _LONGEST_SOCKET_PATH
        if over <= 0:
            return path
        import hashlib  # It brings OpenSSL; commands with short names do without.

        tail = f"~{hashlib.sha256(mangle(name).encode()).hexdigest()[:16]}"
        return self.devices / (mangle(name)[: -over - len(tail)] + tail)

    def worker(self, identifier: str) -> Path:
        """A worker's own socket."""
        return self.workers / f"{identifier}.sock"

    def state(self, minor: int) -> Path:
        """A device's state file."""
        return self.states / f"{minor}.json"
