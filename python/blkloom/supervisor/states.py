"""State files: what a supervisor writes down of each device for the one that comes after it.

A file a device, replaced at every change; they live on a memory file system as long as the run
directory does, so nothing is synced. The worker knows better while it lives; the file counts when it
is dead too.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import msgspec

from blkloom.control.rundir import RunDir
from blkloom.control.states import DeviceState
from blkloom.supervisor.registry import Entry

_log = logging.getLogger(__name__)


class Written(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A device, and what its worker does not know of it."""

    state: DeviceState
    group: str
    worker: int = 0
    began: int = 0
    """The worker's process, and when that began (`Group.began`)."""
    failed: str = ""
    restarts: int = 0
    deferred: bool = False
    suspended_for: int | None = None


def write(run_dir: RunDir, written: Written) -> None:
    """Replaces the device's file. Raises OSError."""
    path = run_dir.state(written.state.minor)
    aside = path.with_suffix(".new")
    aside.write_bytes(msgspec.json.encode(written))
    os.replace(aside, path)


def save(run_dir: RunDir, entry: Entry) -> None:
    """Writes the state file, once the device is made. A full run directory is logged: the device works."""
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
    )
    try:
        write(run_dir, written)
    except OSError as error:
        _log.error("%s cannot be written: %s", run_dir.state(entry.minor), error)


def remove(run_dir: RunDir, minor: int) -> None:
    """The device has gone."""
    with contextlib.suppress(FileNotFoundError):
        run_dir.state(minor).unlink()


def read_all(run_dir: RunDir) -> Iterator[Written]:
    """What a former supervisor wrote. A file that makes no sense is logged and left."""
    for path in sorted(run_dir.states.glob("*.json")):
        try:
            yield msgspec.json.decode(path.read_bytes(), type=Written)
        except (OSError, msgspec.MsgspecError) as error:
            _log.error("%s makes no sense, its device is lost: %s", path, error)
