"""Layers: the table of a live device moves to a new device below it, and back.

A verb that puts a target over what a device has (`blkloom fault`, for example) adds a layer, and then loads a table
over the lower device, as a user would. The lower device has the files, claims and memory of the table, and its targets
go on where they were. It is an ordinary device: its name is that of the upper one with `-real`, as in LVM, and its uuid
says which verb has made it. It is removed with the upper one (autoclear).

Both steps are a hand-over to a new worker with changed states, so clients do not notice, and a step that fails changes
nothing. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Final

import msgspec

from blkloom.control import messages as m
from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.endpoint import Opener
from blkloom.control.rundir import RunDir
from blkloom.control.states import DeviceState, FailedSync, Label, Loaded
from blkloom.device_names import LONGEST_NAME
from blkloom.errors import DeviceBusy, Place, ResourceError, UsageError
from blkloom.supervisor import exporting, states
from blkloom.supervisor.change_notifier import ChangeNotifier
from blkloom.supervisor.devices import Devices, check_descriptors
from blkloom.supervisor.handover import HandOver
from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.table_verbs import TableVerbs
from blkloom.table.words import join_words
from blkloom.units import SECTOR

_SUFFIX: Final = "-real"
_UUID: Final = "BLKLOOM"


class Layers:
    """Adds and removes layers of the registry's devices. The caller of a method holds no lock."""

    def __init__(
        self,
        run_dir: RunDir,
        registry: Registry,
        store: DescriptorStore,
        hand_over: HandOver,
        devices: Devices,
        table_verbs: TableVerbs,
        changes: ChangeNotifier,
    ) -> None:
        self._run_dir = run_dir
        self._registry = registry
        self._store = store
        self._hand_over = hand_over
        self._devices = devices
        self._table_verbs = table_verbs
        self._changes = changes

    def below(self, entry: Entry, kind: str) -> Entry | None:
        """The lower device of the layer that the verb `kind` has added to a device and that its table uses; None if
        there is none.
        """
        lowers = [lower for minor in entry.below_active if (lower := self._registry.get(minor)) is not None]
        return next((lower for lower in lowers if lower.uuid.startswith(f"{_UUID}-{kind.upper()}-")), None)

    async def add(self, entry: Entry, kind: str) -> Entry:
        """Moves the table of a device to a new device below it, which is returned. The device gets a linear table over
        all of that. kind: the verb. Raises UsageError while the device is suspended, has an inactive table or none.
        """
        check_descriptors()
        async with self._devices.held(entry):
            self._check_at_rest(entry)
            assert entry.active is not None
            lower = self._new_lower(entry, kind)
            above = Loaded(
                load=self._registry.new_load(),
                table=linear_over(lower),
                read_only=entry.active.read_only,
                shared=entry.active.shared,
            )
            moved = self._copy_descriptors(entry, lower, entry.active)
            export = exporting.automatic(self._run_dir, lower.name)
            export.read_only = True  # a client of the lower device must not write behind the back of the upper one
            lower.exports.append(export)
            self._registry.add(lower)
            try:
                await exporting.open_endpoint(self._store, lower, export, allow_remote=False)
                await self._hand_over.replace(
                    entry.group,
                    change=lambda frozen: _with_lower(frozen, entry, lower, above),
                    then=lambda: self._added(entry, lower, above),
                )
            except BaseException:
                if lower.making:
                    await asyncio.shield(self._forget(lower))
                raise
            self._store.drop(moved)
            self._save(lower, entry)
            return lower

    async def remove(self, entry: Entry, lower: Entry) -> None:
        """Moves the table of a layer's lower device back to its upper device, and removes the lower one. Raises
        UsageError unless the upper one has a linear table over all of it, DeviceBusy while others use the lower one.
        """
        async with self._devices.held(entry, lower):
            self._check_at_rest(entry)
            self._check_at_rest(lower)
            assert entry.active is not None
            assert lower.active is not None
            if entry.active.table != linear_over(lower):
                what = f"device '{entry.name}' has another table than a linear one over all of '{lower.name}'"
                raise UsageError(what, cure=f"load that first: {linear_over(lower)}")
            others = [f"device '{holder.name}'" for holder in self._registry.holders(lower) if holder is not entry]
            if clients := self._registry.clients(lower):
                others.append(f"{clients} clients")
            if others or lower.node is not None:
                users = ", ".join(others) or f"its node {lower.node.path if lower.node else ''}"
                raise DeviceBusy(f"device '{lower.name}' is in use: {users}", cure="end that first")
            table = lower.active
            moved = self._copy_descriptors(lower, entry, table)
            try:
                await self._hand_over.replace(
                    entry.group,
                    change=lambda frozen: _without_lower(frozen, entry, lower, table),
                    then=lambda: self._removed(entry, lower),
                )
            except BaseException:
                if entry.active is not table:
                    self._store.drop(self._store.outlived(entry.minor, entry.loads))
                raise
            self._store.drop(moved)
            await asyncio.shield(self._forget(lower))
            self._save(entry)

    async def load(
        self, entry: Entry, lower: Entry, table: str, opener: Opener, *, read_only: bool = False, fault: str = ""
    ) -> None:
        """Loads a table over the lower device into the inactive slot: read-only if the lower device is, or if asked
        for. fault: see `messages.Load`.
        """
        assert lower.active is not None
        read_only = read_only or lower.active.read_only
        call = m.Load(device=entry.key, table=table, source="layer", read_only=read_only, fault=fault)
        await self._table_verbs.load(call, opener)

    async def end(self, entry: Entry, lower: Entry, opener: Opener) -> None:
        """Gives a device its table back, whatever it has over the lower device. Raises as `remove`."""
        # The linear table first: the flush of the removal must not meet a fault.
        await self.load(entry, lower, linear_over(lower), opener)
        await self._table_verbs.resume(m.Resume(device=entry.key, flush=False), opener)
        await self.remove(entry, lower)

    def _check_at_rest(self, entry: Entry) -> None:
        if entry.suspended or entry.suspended_for is not None:
            raise UsageError(f"device '{entry.name}' is suspended", cure=f"blkloom resume {entry.name}")
        if entry.active is None:
            raise UsageError(f"device '{entry.name}' has no table", cure=f"blkloom load {entry.name}, then resume")
        if entry.inactive is not None:
            cure = f"blkloom resume {entry.name} makes it active, blkloom clear {entry.name} drops it"
            raise UsageError(f"device '{entry.name}' has an inactive table", cure=cure)

    def _new_lower(self, entry: Entry, kind: str) -> Entry:
        stem = entry.name[: LONGEST_NAME - len(_SUFFIX) - 3] + _SUFFIX
        name = next(name for name in (stem, *(f"{stem}{n}" for n in range(2, 1000))) if not self._registry.named(name))
        uuid = f"{_UUID}-{kind.upper()}-{os.urandom(8).hex()}"
        minor = self._registry.check_new(name, uuid, None)
        return Entry(name, minor, entry.group, uuid=uuid, making=True, size=entry.size, autoclear=True)

    def _copy_descriptors(self, former: Entry, entry: Entry, table: Loaded) -> list[Label]:
        """Stores the descriptors of a table for another device, too. Returns the former labels. Raises
        ResourceError.
        """
        labels = [label for label in self._store.labels(former.minor) if label.load == table.load]
        try:
            for label in labels:
                fd = self._store.find(label)
                assert fd is not None, "no other verb changes the device"
                self._store.put(msgspec.structs.replace(label, device=entry.minor), os.dup(fd))
        except OSError as error:
            self._store.drop([msgspec.structs.replace(label, device=entry.minor) for label in labels])
            raise ResourceError(
                f"the files of device '{former.name}' cannot be passed on: {error.strerror}",
                cure="raise the limit of open files (ulimit -n)",
                errno=error.errno,
            ) from error
        return labels

    def _added(self, entry: Entry, lower: Entry, above: Loaded) -> None:
        """A new worker has the devices."""
        _move_table(entry, lower)
        self._registry.set_below(lower, active=entry.below_active)
        entry.active, entry.memory_active = above, 0
        entry.targets, entry.types, entry.deps = 1, ["linear"], [f"blkloom:{lower.name}"]
        entry.failed_syncs = []
        self._registry.set_below(entry, active=frozenset({lower.minor}))
        lower.making = False
        entry.group.minors.add(lower.minor)

    def _removed(self, entry: Entry, lower: Entry) -> None:
        _move_table(lower, entry)
        self._registry.set_below(entry, active=lower.below_active)
        entry.group.minors.discard(lower.minor)

    async def _forget(self, lower: Entry) -> None:
        for export in lower.exports:
            await exporting.close_endpoint(self._store, lower, export)
        self._store.drop(self._store.labels(lower.minor))
        self._registry.remove(lower)
        states.remove(self._run_dir, lower.minor)
        self._changes.changed(lower)

    def _save(self, *entries: Entry) -> None:
        for entry in entries:
            self._devices.save(entry)
            self._changes.changed(entry)


def is_layer(uuid: str) -> bool:
    """Whether a device with this uuid is the lower device of a layer. Clients may only read it."""
    return uuid.startswith(f"{_UUID}-")


def linear_over(lower: Entry) -> str:
    """A table of all of a device."""
    return whole_table(lower, ["linear", f"blkloom:{lower.name}", "0"])


def whole_table(entry: Entry, words: Sequence[str]) -> str:
    """A table of one segment, as large as a device. words: target and arguments."""
    return f"0 {entry.size // SECTOR} {join_words(words, Place('table', 1, 1))}"


def _with_lower(frozen: Sequence[DeviceState], entry: Entry, lower: Entry, above: Loaded) -> list[DeviceState]:
    """The states of a group with the table of `entry` in `lower`. Each comes after those below it."""
    found: list[DeviceState] = []
    for state in frozen:
        if state.minor == entry.minor:
            moved = [_of(failed, lower) for failed in state.failed_syncs]
            found.append(msgspec.structs.replace(lower.state(), active=state.active, opened=True, failed_syncs=moved))
            found.append(msgspec.structs.replace(state, active=above, failed_syncs=[]))
        else:
            found.append(state)
    return found


def _without_lower(frozen: Sequence[DeviceState], entry: Entry, lower: Entry, table: Loaded) -> list[DeviceState]:
    below = next(state for state in frozen if state.minor == lower.minor)
    moved = [_of(failed, entry) for failed in below.failed_syncs]
    return [
        msgspec.structs.replace(state, active=table, failed_syncs=moved) if state.minor == entry.minor else state
        for state in frozen
        if state is not below
    ]


def _of(failed: FailedSync, entry: Entry) -> FailedSync:
    label = msgspec.structs.replace(failed.label, device=entry.minor)
    return FailedSync(label=label, errno=failed.errno)


def _move_table(former: Entry, entry: Entry) -> None:
    """What a device knows of its table."""
    entry.active, entry.memory_active, entry.deps = former.active, former.memory_active, former.deps
    entry.size, entry.block_size = former.size, former.block_size
    entry.targets, entry.types = former.targets, former.types
    entry.failed_syncs = [_of(failed, entry) for failed in former.failed_syncs]
