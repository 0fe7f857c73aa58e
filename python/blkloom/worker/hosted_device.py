"""One device in a worker: the device of the engine with its tables, its exports and its event number.

The supervisor sends the verbs of a device one after another. Runs on the event loop; blocking calls run on a thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Final

from blkloom import _engine
from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.replies import Resumed
from blkloom.control.states import ConnectionState, DeviceInfo, DeviceState, FailedSync, Label
from blkloom.device.device import Device
from blkloom.errors import describe_io_error
from blkloom.stats import without_tails
from blkloom.table import Table
from blkloom.targets.holding import SharedFiles
from blkloom.targets.registry import Targets
from blkloom.units import Sectors
from blkloom.worker.device_exports import DeviceExports
from blkloom.worker.device_tables import DeviceTables
from blkloom.worker.load_descriptors import FileOpener
from blkloom.worker.moving import pack, unpack
from blkloom.worker.threads import in_thread, verb_thread

_log = logging.getLogger(__name__)

KEEP_SECONDS: Final = 10.0
"""Seconds for a supervisor to record failed syncs, or for another one to connect and do so."""


class HostedDevice:
    """A device of `state`, without tables and exports: those are restored or added later.

    devices: all devices of the worker by name; this one is added. on_change: called when its clients or its event
    number have changed. on_drop: called with labels that are not needed any more. on_sync_failed: makes the supervisor
    record the failed syncs of the device; returns when it has, or when it takes too long.
    """

    def __init__(
        self,
        state: DeviceState,
        *,
        engine: _engine.Engine,
        targets: Targets,
        store: DescriptorStore,
        devices: MutableMapping[str, Device],
        device_folder: str,
        on_change: Callable[[HostedDevice], None],
        on_drop: Callable[[list[Label]], None],
        on_sync_failed: Callable[[HostedDevice], Awaitable[None]],
    ) -> None:
        self.name = state.name
        self.minor = state.minor
        self.uuid = state.uuid
        self.event = state.event
        self._store = store
        self._devices = devices
        self._on_change = on_change
        self._on_sync_failed = on_sync_failed
        self._held = SharedFiles()
        self._event_loop = asyncio.get_running_loop()
        self.device = Device(
            engine=engine,
            name=state.name,
            devices=devices,
            device_folder=device_folder,
            held=self._held,
            on_event=self._on_event,
            on_sync_failed=self._record_failed_syncs,
            on_io_errors=self._on_io_errors,
        )
        self.tables = DeviceTables(
            self.device,
            state.minor,
            targets=targets,
            store=store,
            device_folder=device_folder,
            on_failed_sync=lambda: on_change(self),
            on_drop=on_drop,
        )
        self.exports = DeviceExports(self.device, state.name, engine, self._on_clients)
        self._autoclear, self._loop_notes = state.autoclear, state.loop
        self.opened = state.opened
        self._former_io_errors, self._last_io_error = state.io_errors, state.last_io_error
        self._frozen: list[tuple[ConnectionState, int]] | None = None
        self._resumes_after = False
        devices[state.name] = self.device

    # its state

    @property
    def io_errors(self) -> int:
        """Number of failed requests since the device was made, in this and in former workers."""
        return self._former_io_errors + self.device.io_errors

    @property
    def last_io_error(self) -> str:
        """Description of the last failed request; "" for none."""
        last = self.device.last_io_error
        return self._last_io_error if last is None else describe_io_error(*last)

    @property
    def failed_syncs(self) -> list[FailedSync]:
        """The files with failed syncs."""
        return self._store.failed_syncs(self.minor)

    def state(self) -> DeviceState:
        """The state that another worker needs to continue; with the connections while the device is frozen."""
        frozen = self._frozen is not None
        return DeviceState(
            name=self.name,
            minor=self.minor,
            uuid=self.uuid,
            active=self.tables.active,
            inactive=self.tables.inactive,
            suspended=self.device.suspended and not (frozen and self._resumes_after),
            event=self.event,
            exports=self.exports.states,
            connections=[state for state, _ in self.frozen],
            autoclear=self._autoclear,
            opened=self.opened,
            loop=self._loop_notes,
            failed_syncs=self.failed_syncs,
            io_errors=self.io_errors,
            last_io_error=self.last_io_error,
        )

    def info(self) -> DeviceInfo:
        """The public state, as far as a worker knows it: not holders and restarts, for example."""
        return DeviceInfo(
            name=self.name,
            minor=self.minor,
            uuid=self.uuid,
            state="SUSPENDED" if self.device.suspended else "ACTIVE",
            read_only=self.device.read_only,
            live=self.tables.active is not None,
            inactive=self.tables.inactive is not None,
            open_count=self.exports.connections,
            connections=self.exports.connections,
            event=self.event,
            size=self.device.size,
            block_size=self.device.limits.logical,
            worker=os.getpid(),
            exports=self.exports.states,
            deps=self.tables.deps,
            **_shape(self.device.table),
        )

    def stats(self) -> dict[str, Any]:
        """Counters of the device and of each export."""
        return {"device": without_tails(self.device.stats()), "exports": self.exports.stats()}

    # verbs

    async def suspend(self, *, flush: bool, timeout: float | None) -> None:
        """Suspends the device; see `Device.suspend`."""
        await in_thread(verb_thread(self.minor), lambda: self.device.suspend(flush=flush, timeout=timeout))

    async def resume(
        self, opener: FileOpener, *, flush: bool, timeout: float | None, swap: bool
    ) -> tuple[Resumed, list[Label]]:
        """Resumes the device; see `Device.resume`. Returns the labels of files that were opened for it, too."""
        tables = self.tables
        size = self.device.size if tables.active else None
        labels: list[Label] = []
        changed = None
        if swap:
            await tables.swap(flush=flush, timeout=timeout)
        if tables.active:
            text = tables.active.table
            labels = await tables.go_live(opener)
            changed = tables.active.table if tables.active.table != text else None
        else:
            self.device.resume(swap=False)  # raises: there is no table
        if size is not None and size != self.device.size:
            self.happened()  # not every client can be told of the size, but `wait` can
        if swap:
            self.exports.device_changed()
        shape = _shape(self.device.table)
        block_size = self.device.limits.logical
        resumed = Resumed(**shape, size=self.device.size, block_size=block_size, event=self.event, table=changed)
        return resumed, labels

    async def status(self) -> list[tuple[int, int, str, str]]:
        """(start, length, target, status) of each segment; sectors."""
        return [*await in_thread(verb_thread(self.minor), self.device.status)]

    async def message(self, sector: int, words: list[str]) -> str | None:
        """Sends a message to the target at `sector` and returns its answer."""
        return await in_thread(verb_thread(self.minor), lambda: self.device.message(Sectors(sector), words))

    async def read(self, offset: int, length: int) -> bytes:
        """Reads as a client would. Waits while the device is suspended."""
        return await in_thread(verb_thread(self.minor), lambda: self.device.pread(length, offset))

    def rename(self, name: str, uuid: str) -> None:
        """Sets the name, and the uuid if one is given."""
        if name != self.name:
            del self._devices[self.name]
            self.name = name
            self._devices[name] = self.device
            self.exports.rename(name)
        self.uuid = uuid or self.uuid
        if self.tables.active:
            self.happened()

    async def unserve(self, id: str) -> None:
        """Disconnects the clients of an export and ends it."""
        await self.exports.unserve(id)
        self._on_change(self)

    # events

    def happened(self) -> None:
        """Counts an event: `wait` returns."""
        self.event += 1
        self._on_change(self)

    def _on_clients(self) -> None:
        self.opened |= self.exports.connections > 0
        self._on_change(self)

    def _on_event(self, _what: str) -> None:
        self._event_loop.call_soon_threadsafe(self.happened)

    def _on_io_errors(self) -> None:
        self._event_loop.call_soon_threadsafe(self._on_change, self)

    def _record_failed_syncs(self) -> None:
        """Called by a thread that may wait. The flush that found the failure is answered when this has returned."""

        async def record() -> None:
            await self._on_sync_failed(self)

        try:
            asyncio.run_coroutine_threadsafe(record(), self._event_loop).result(KEEP_SECONDS + 1)
        except (RuntimeError, TimeoutError) as error:  # the worker ends or hangs: there will be no hand-over
            _log.error("device '%s': failed syncs could not be stored: %s", self.name, error or "no answer")

    # hand-over

    @property
    def is_frozen(self) -> bool:
        """Whether the device is frozen or being frozen: what happens to its clients then is not reported."""
        return self._frozen is not None

    @property
    def frozen(self) -> Sequence[tuple[ConnectionState, int]]:
        """The clients that `detach_clients` has taken out of the engine, with their sockets."""
        return self._frozen or ()

    async def detach_clients(self, timeout: float | None) -> None:
        """Takes all clients out of the engine, and waits for none of them. Raises DrainError if requests in flight do
        not end; `thaw` continues as before in any case.
        """
        self._frozen, self._resumes_after = [], False
        self.device.begin_handover()
        clients, late = await self.exports.detach_clients(timeout)
        self._frozen = pack(self._store, self.minor, clients)
        if late is not None:
            after = f" after {timeout:g} s" if timeout is not None else ""
            what = f"device '{self.name}': requests of clients had not ended{after} ({late.strerror})"
            raise self.device.stuck(what) from late

    async def suspend_frozen(self, timeout: float | None) -> None:
        """Suspends the device, if it is not suspended, until `thaw`."""
        if not self.device.suspended:
            await self.suspend(flush=True, timeout=timeout)
            self._resumes_after = True

    async def thaw(self) -> None:
        """Continues as before `detach_clients`."""
        if self._resumes_after:
            await in_thread(verb_thread(self.minor), lambda: self.device.resume(swap=False))  # files are all open
        self.device.end_handover()
        clients, self._frozen, self._resumes_after = self._frozen or [], None, False
        self.take_over(clients)
        self._on_change(self)

    def take_over(self, clients: Sequence[tuple[ConnectionState, int]]) -> None:
        """Serves clients that were detached here or in another worker, with their unfinished bytes from the store, and
        accepts new ones.
        """
        unfinished = unpack(self._store, self.minor, [state for state, _ in clients])
        self.exports.go_on([(*client, left) for client, left in zip(clients, unfinished, strict=True)])

    # the end

    async def end_exports(self) -> None:
        """Disconnects all clients, after their requests in flight, and ends the exports."""
        self.device.fail_deferred()  # while clients can still get the answers
        await self.exports.end()

    async def close(self, *, flush: bool) -> None:
        """Ends the exports, drains the device and, if `flush`, flushes it; gives up its files and claims. Raises
        OSError of the last flush or DrainError; the device is closed all the same.
        """
        await self.end_exports()
        self._devices.pop(self.name, None)
        try:
            await in_thread(verb_thread(self.minor), lambda: self.device.close(flush=flush))
        finally:
            self.tables.drop_all()

    async def abandon(self) -> None:
        """Ends without a change for another worker that has the device: claims stay, and so do the supervisor's copies
        of the descriptors.
        """
        self._held.let_stay()
        self.tables.keep_in_supervisor()
        await self.close(flush=False)


def _shape(table: Table | None) -> dict[str, Any]:
    """The number of segments of a table, and the names of their targets."""
    segments = table.segments if table else ()
    return {"targets": len(segments), "types": list(dict.fromkeys(segment.target.name for segment in segments))}
