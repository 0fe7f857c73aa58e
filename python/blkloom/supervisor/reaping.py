"""What belongs to nobody: sockets, state files and workers' sockets in a run directory; immutable flags of
files whose block map has gone.

Files that hold something still are left: a socket that answers, a device that is registered, a file that
somebody maps.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

from blkloom.control.rundir import RunDir
from blkloom.filemap.immutable import release_abandoned
from blkloom.supervisor.registry import Registry


def reap(run_dir: RunDir, registry: Registry, groups: Collection[str]) -> list[str]:
    """Removes it. A line each. Raises OSError."""
    return [f"{what} {path}" for what, path in _found(run_dir, registry, groups) if _remove(path)]


def release_files() -> list[str]:
    """Files that a process which has gone left immutable can be written to again. A line each. Raises OSError;
    may wait for storage.
    """
    return release_abandoned() if os.geteuid() == 0 else []  # nobody else can have made one so, or undo it


def _found(run_dir: RunDir, registry: Registry, groups: Collection[str]) -> Iterator[tuple[str, Path]]:
    used = {export.unix for entry in registry for export in entry.exports}
    for path in sorted(run_dir.devices.iterdir()):
        if str(path) not in used and not _answers(path):
            yield "socket", path
    for path in sorted(run_dir.workers.iterdir()):
        if path.stem not in groups and not _answers(path):
            yield "worker's socket", path
    states = {run_dir.state(entry.minor) for entry in registry}
    for path in sorted(run_dir.states.iterdir()):
        if path not in states:
            yield "state file", path


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True  # it listens, and is busy
        except OSError:
            return False
        return True


def _remove(path: Path) -> bool:
    path.unlink(missing_ok=True)
    return True
