"""The active and the inactive table of one device in a worker, and the descriptors of each.

The descriptors of a table leave the store as soon as the table is in neither slot. The verbs of a device run one after
another, on the event loop; calls that may wait for storage run on a thread.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import ExitStack

from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.replies import TableLoaded
from blkloom.control.states import DeviceState, Label, Loaded, OpenedFile
from blkloom.device.device import Device
from blkloom.open_files import descriptor_path
from blkloom.table import format_table, parse_table
from blkloom.targets.device_ref import rename_device_refs
from blkloom.targets.registry import Targets
from blkloom.worker.load_descriptors import FileOpener, LoadDescriptors
from blkloom.worker.threads import in_thread, verb_thread


class DeviceTables:
    """The tables of `device`, which has the minor number `minor`. device_folder: directory of the devices' sockets.
    on_failed_sync: called when a loaded file has a failed sync that its device did not have before, or when one is no
    longer used. on_drop: called with labels that are not needed any more.
    """

    def __init__(
        self,
        device: Device,
        minor: int,
        *,
        targets: Targets,
        store: DescriptorStore,
        device_folder: str,
        on_failed_sync: Callable[[], None],
        on_drop: Callable[[list[Label]], None],
    ) -> None:
        self._device = device
        self._minor = minor
        self._targets = targets
        self._store = store
        self._device_folder = device_folder
        self._on_failed_sync = on_failed_sync
        self._on_drop = on_drop
        self.active: Loaded | None = None
        self.inactive: Loaded | None = None
        self._awaited: Loaded | None = None
        """The inactive table of a device that is handed over, until it is loaded here."""
        self._deps: dict[int, list[str]] = {}
        self._descriptors: dict[int, LoadDescriptors] = {}

    @property
    def deps(self) -> list[str]:
        """What the active table uses, or the inactive one if there is no active table."""
        loaded = self.active or self.inactive
        return self._deps.get(loaded.load, []) if loaded else []

    # loading

    async def restore_active(self, state: DeviceState, opener: FileOpener) -> list[Label]:
        """Loads and activates the active table of `state`, from the store; resumes it unless it is suspended there.
        Returns the labels of files that were not in the store and that `opener` has opened.
        """
        labels: list[Label] = []
        self._awaited = state.inactive
        if state.active is not None:
            source = f"table of {state.name}"
            labels = await self._load(
                state.active, source, opener, restored=True, active=True, unlocked=state.suspended
            )
            await in_thread(verb_thread(self._minor), self._device.activate)
            self._swapped()
            if not state.suspended:
                labels += await self.go_live(opener)
        return labels

    async def restore_inactive(self, state: DeviceState, opener: FileOpener) -> list[Label]:
        """Loads the inactive table of `state`, likewise."""
        labels: list[Label] = []
        if state.inactive is not None:
            labels = await self._load(state.inactive, f"inactive table of {state.name}", opener, restored=True)
        self._awaited = None
        return labels

    async def load(
        self, loaded: Loaded, source: str, opener: FileOpener, *, same_files: bool
    ) -> tuple[TableLoaded, list[Label]]:
        """Loads a table into the inactive slot. same_files: see `Load`. Returns the labels of what was opened, too."""
        same_as = self.active.load if same_files and self.active else 0
        labels = await self._load(loaded, source, opener, same_as=same_as)
        return TableLoaded(deps=self._deps[loaded.load], whole=loaded.whole), labels

    async def _load(
        self,
        loaded: Loaded,
        source: str,
        opener: FileOpener,
        *,
        restored: bool = False,
        active: bool = False,
        unlocked: bool = False,
        same_as: int = 0,
    ) -> list[Label]:
        descriptors = LoadDescriptors(
            self._store,
            self._minor,
            loaded.load,
            opener,
            restored=restored,
            active=active,
            unlocked=unlocked,
            whole=loaded.whole,
            same_as=same_as,
        )

        def work() -> None:
            try:
                table = parse_table(loaded.table, targets=self._targets, source=source)
                composed = self._device.load(
                    table,
                    read_only=loaded.read_only,
                    shared=loaded.shared,
                    descriptors=descriptors,
                )
            except BaseException:
                descriptors.fail()
                raise
            self._deps[loaded.load] = composed.load_context.deps
            self._descriptors[loaded.load] = descriptors
            loaded.whole = any(owner.target.whole for owner in composed.owners.values())

        failed = self._store.failed_syncs(self._minor)
        await in_thread(verb_thread(self._minor), work)
        labels = descriptors.succeed()
        if self._store.failed_syncs(self._minor) != failed:  # it has files of the active table
            self._on_failed_sync()
        self.inactive = loaded
        self._drop_outlived()
        return labels

    async def clear(self) -> None:
        """Empties the inactive slot."""
        await in_thread(verb_thread(self._minor), self._device.clear)
        self.inactive = None
        self._drop_outlived()

    # swapping

    async def swap(self, *, flush: bool, timeout: float | None) -> None:
        """Makes the inactive table, if there is one, the active one; see `Device.activate`."""
        await in_thread(verb_thread(self._minor), lambda: self._device.activate(flush=flush, timeout=timeout))
        if self.inactive:
            self._swapped()

    async def go_live(self, opener: FileOpener) -> list[Label]:
        """Resumes the device with its active table. Targets may open files for that; returns their labels."""
        assert self.active is not None, "the caller has looked"
        before = self._device.table
        descriptors = self._descriptors[self.active.load]
        descriptors.go_on(opener)
        failed = self._store.failed_syncs(self._minor)
        try:
            await in_thread(verb_thread(self._minor), lambda: self._device.resume(swap=False))
        finally:
            labels = descriptors.succeed()
            if self._store.failed_syncs(self._minor) != failed:  # files may have been replaced
                self._on_failed_sync()
        after = self._device.table
        if after is not None and after != before and self.active:
            self.active.table = format_table(after)
        return labels

    def _swapped(self) -> None:
        self.active, self.inactive = self.inactive, None
        self._drop_outlived()

    # their files

    async def files(self) -> list[OpenedFile]:
        """The files of the active table, each path once."""
        if self.active is None:
            return []
        with ExitStack() as stack:
            found: dict[str, int] = {}
            for path, fd in self._store.files(self._minor, self.active.load).items():
                found[path] = os.dup(fd)  # the table may be dropped meanwhile
                stack.callback(os.close, found[path])
            return await in_thread(verb_thread(self._minor), lambda: [_opened(path, fd) for path, fd in found.items()])

    def rename_below(self, old: str, new: str) -> None:
        """Renames the lower device `old` to `new` in both tables."""
        for loaded in (self.active, self.inactive):
            if loaded:
                table = parse_table(loaded.table, targets=self._targets)
                loaded.table = rename_device_refs(table, old, new, device_folder=self._device_folder)

    def keep_in_supervisor(self) -> None:
        """From now on, the supervisor's copies of the descriptors stay when these are dropped."""
        self._on_drop = lambda _labels: None

    def drop_all(self) -> None:
        """Drops all descriptors of the device."""
        self._drop(self._store.labels(self._minor))

    def _drop_outlived(self) -> None:
        loads = {loaded.load for loaded in (self.active, self.inactive, self._awaited) if loaded}
        self._deps = {load: deps for load, deps in self._deps.items() if load in loads}
        self._descriptors = {load: kept for load, kept in self._descriptors.items() if load in loads}
        self._drop(self._store.outlived(self._minor, loads))

    def _drop(self, labels: list[Label]) -> None:
        self._store.drop(labels)
        if labels:
            self._on_drop(labels)


def _opened(path: str, fd: int) -> OpenedFile:
    status = os.fstat(fd)
    size = os.lseek(fd, 0, os.SEEK_END) if stat.S_ISBLK(status.st_mode) else status.st_size
    name = os.readlink(descriptor_path(fd))
    return OpenedFile(path=path, name=name, device=status.st_dev, inode=status.st_ino, size=size)
