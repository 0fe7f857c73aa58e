"""State files: the state of each device, written by one supervisor for the next one.

There is one file for each device; it is replaced at every change. The run directory is on a memory file system, so
nothing is synced. While a worker runs, its own state is newer than the file; the file is used after the worker has
died, too.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Final

import msgspec

from blkloom import json_text
from blkloom.control.rundir import RunDir
from blkloom.control.states import DeviceState, NodeOptions, NodeState
from blkloom.supervisor.registry import Entry

_log = logging.getLogger(__name__)


class Written(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The state of a device, with the parts that its worker does not know."""

    state: DeviceState
    group: str
    worker: int = 0
    began: int = 0
    """The process of the worker, and its start time (`Group.began`)."""
    failed: str = ""
    restarts: int = 0
    deferred: bool = False
    suspended_for: int | None = None
    node: NodeState | None = None
    node_options: NodeOptions = NodeOptions()
    size: int = 0
    block_size: int = 512
    targets: int = 0
    types: list[str] = []
    deps: list[str] = []
    """As in `DeviceInfo`. A worker that is started again has the same; a FAILED device has no worker to ask."""


_DECODER: Final = msgspec.json.Decoder(Written)


def write(run_dir: RunDir, written: Written) -> None:
    """Replaces the state file of a device. Raises OSError."""
    path = run_dir.state(written.state.minor)
    aside = path.with_suffix(".new")
    aside.write_bytes(json_text.encode(written))
    os.replace(aside, path)


def save(run_dir: RunDir, entry: Entry) -> None:
    """Writes the state file of a complete device. If the run directory is full, logs this: the device still works."""
    if entry.making:
        return
    written = Written(
        state=msgspec.structs.replace(entry.state(), suspended=entry.suspended),
        group=entry.group.id,
        worker=entry.group.pid,
        began=entry.group.began if entry.group.pid else 0,
        failed=entry.failed,
        restarts=entry.restarts,
        deferred=entry.deferred,
        suspended_for=entry.suspended_for,
        node=entry.node,
        node_options=entry.node_options,
        size=entry.size,
        block_size=entry.block_size,
        targets=entry.targets,
        types=entry.types,
        deps=entry.deps,
    )
    try:
        write(run_dir, written)
    except OSError as error:
        _log.error("%s cannot be written: %s", run_dir.state(entry.minor), error)


def remove(run_dir: RunDir, minor: int) -> None:
    """Removes the state file of a device."""
    with contextlib.suppress(FileNotFoundError):
        run_dir.state(minor).unlink()


def read_all(run_dir: RunDir) -> Iterator[Written]:
    """Reads the state files of a former supervisor. Logs and keeps a file that cannot be read."""
    for path in sorted(run_dir.states.glob("*.json")):
        try:
            yield json_text.decode(path.read_bytes(), _DECODER)
        except (OSError, msgspec.MsgspecError) as error:
            _log.error("%s cannot be understood, its device is lost: %s", path, error)
