"""The run directory: where a supervisor, its workers and its devices have their sockets and files.

One supervisor a directory. It is its owner's alone (0700): whoever can reach the control socket can do
what the supervisor can.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from blkloom.dm.names import mangle
from blkloom.errors import UsageError

_LONGEST_SOCKET_PATH: Final = 107
"""sun_path without the NUL."""


@dataclass(frozen=True)
class RunDir:
    """Names in the directory `path`."""

    path: Path

    @classmethod
    def default(cls, environment: Mapping[str, str]) -> Self:
        """`$XDG_RUNTIME_DIR/blkloom`; `/run/blkloom` for root, or where there is none."""
        runtime = environment.get("XDG_RUNTIME_DIR") if os.geteuid() != 0 else None
        return cls(Path(runtime or "/run") / "blkloom")

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Self:
        """That directory, made absolute: what comes later may have another working directory."""
        return cls(Path(path).absolute())

    def make(self) -> None:
        """Makes it and its folders. Raises UsageError where it is somebody else's, OSError."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self.path.stat()
        if status.st_uid != os.geteuid():
            raise UsageError(
                f"{self.path} belongs to user {status.st_uid}, not to you", cure="choose another with --run-dir"
            )
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise UsageError(f"{self.path} is open to others", cure=f"chmod 700 {self.path}")
        for folder in (self.devices, self.states, self.workers):
            folder.mkdir(mode=0o700, exist_ok=True)

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
