"""Removal of stale files: endpoints of exports, state files and workers' sockets in a run directory; and of immutable
flags of files that are no longer mapped.

Files in use stay: sockets that answer, state files of registered devices, flags of files that a process still maps.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from blkloom.control.rundir import RunDir
from blkloom.control.states import ExportState
from blkloom.export.nbd.listening import is_listening
from blkloom.export.registry import endpoints, kinds
from blkloom.filemap.immutable import release_abandoned
from blkloom.supervisor.registry import Registry


def reap(run_dir: RunDir, registry: Registry, groups: Collection[str]) -> list[str]:
    """Removes stale files of workers and devices. Returns one line for each. Raises OSError."""
    return [f"{what} {path}" for what, path in _found(run_dir, registry, groups) if _remove(path)]


def reap_endpoints(run_dir: RunDir, exports: Iterable[ExportState], *, alone: bool) -> list[str]:
    """Removes the endpoints that belong to none of `exports`, the list of all exports. Returns one line for each.
    alone: no export is being made at the same time. Any thread; may wait. Raises OSError.
    """
    there = list(exports)
    removed: list[str] = []
    for kind in kinds():
        of_kind = [export for export in there if export.kind == kind]
        removed += endpoints(kind).reap(run_dir, of_kind, alone=alone)
    return removed


def release_files() -> list[str]:
    """Clears the immutable flags that ended processes have left. Returns one line for each file. May wait for storage.
    Raises OSError.
    """
    return release_abandoned() if os.geteuid() == 0 else []  # only root can set or clear the flag


def _found(run_dir: RunDir, registry: Registry, groups: Collection[str]) -> Iterator[tuple[str, Path]]:
    for path in sorted(run_dir.workers.iterdir()):
        if path.stem not in groups and not is_listening(path):
            yield "worker's socket", path
    states = {run_dir.state(entry.minor) for entry in registry}
    for path in sorted(run_dir.states.iterdir()):
        if path not in states:
            yield "state file", path


def _remove(path: Path) -> bool:
    path.unlink(missing_ok=True)
    return True
