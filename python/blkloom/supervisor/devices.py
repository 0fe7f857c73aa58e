"""Common steps of verbs: find a device, lock its group, write its state file. Runs on the event loop."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from blkloom import open_files
from blkloom.control import messages as m
from blkloom.control.rundir import RunDir
from blkloom.errors import DeviceFailed, NoSuchDevice, ResourceError
from blkloom.supervisor import states
from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.workers import Workers

_FOR_COMMANDS: Final = 16
"""Descriptors that new devices and exports leave for other commands."""


class Devices:
    """The registry's devices, for verbs."""

    def __init__(self, run_dir: RunDir, registry: Registry, workers: Workers) -> None:
        self._run_dir = run_dir
        self._registry = registry
        self._workers = workers

    def live(self, device: m.DeviceKey) -> Entry:
        """Finds a device. Raises DeviceFailed if it has failed, NoSuchDevice."""
        entry = self._registry.find(device)
        if entry.failed:
            raise DeviceFailed(
                f"device '{entry.name}' has failed: {entry.failed}",
                cure=f"blkloom resume {entry.name} tries again, blkloom remove {entry.name} gives it up",
            )
        return entry

    @asynccontextmanager
    async def held(self, *entries: Entry) -> AsyncIterator[None]:
        """Holds the locks of the devices' groups. Raises NoSuchDevice if a device was removed meanwhile."""
        async with self._workers.locked(*entries):
            for entry in entries:
                self.check_there(entry)
            yield

    def check_there(self, entry: Entry) -> None:
        """Raises NoSuchDevice if the device was removed."""
        if self._registry.get(entry.minor) is not entry:
            raise NoSuchDevice(f"Device {entry.name} not found: it was removed meanwhile")

    def save(self, entry: Entry) -> None:
        """Writes its state file."""
        states.save(self._run_dir, entry)

    def save_all(self) -> None:
        """Writes the state file of every device."""
        for entry in self._registry:
            self.save(entry)


def check_descriptors() -> None:
    """Raises ResourceError if one more device or export would take descriptors that others need."""
    if open_files.are_scarce(open_files.SUPERVISOR_RESERVE, more=_FOR_COMMANDS):
        what = f"the supervisor has only {open_files.left()} free descriptors left, which it needs for what there is"
        raise ResourceError(what, cure=open_files.advice(), errno=errno.EMFILE)
