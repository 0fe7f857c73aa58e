"""One device in a worker: the engine's device, what is loaded into it, its exports and its event number.

Its verbs run one after another (the supervisor sees to that); what blocks runs on a thread. Labels of
what a table had opened leave the stock as soon as the table is in neither slot.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any, Final

from blkloom import _engine
from blkloom.control.states import (
    ConnectionState,
    DeviceInfo,
    DeviceState,
    ExportState,
    FailedSync,
    Label,
    Loaded,
    OpenedFile,
)
from blkloom.device.device import Device
from blkloom.errors import UsageError, describe_io_error
from blkloom.export.nbd.session import Moving
from blkloom.stats import without_tails
from blkloom.table import Table, format_table, parse
from blkloom.target.descriptors import descriptor_path
from blkloom.target.holding import HeldFiles
from blkloom.target.leg import rename_legs
from blkloom.target.registry import Targets
from blkloom.units import Sectors, to_bytes
from blkloom.worker.exports import ServedExport
from blkloom.worker.moving import pack, unpack
from blkloom.worker.stock import Ask, LoadDescriptors, Stock
from blkloom.worker.threads import in_thread

_log = logging.getLogger(__name__)

KEEP_SECONDS: Final = 10.0
"""For a supervisor to store what must be, or to come back and do so."""


class HostedDevice:
    """Made empty; `restore` and `serve` bring it up.

    devices: all of the worker's by name, this one among them while it lives. on_change: its clients or
    its event number changed. on_drop: labels that are not needed any more. on_sync_failed: has the stock's failed syncs
    of the device remembered by the supervisor; done when they are, or when it takes too long.
    """

    def __init__(
        self,
        state: DeviceState,
        *,
        engine: _engine.Engine,
        targets: Targets,
        stock: Stock,
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
        self._engine = engine
        self._targets = targets
        self._stock = stock
        self._devices = devices
        self._device_folder = device_folder
        self._on_change = on_change
        self._on_drop = on_drop
        self._on_sync_failed = on_sync_failed
        self._held = HeldFiles()
        self._event_loop = asyncio.get_running_loop()
        self.device = Device(
            engine=engine,
            name=state.name,
            devices=devices,
            device_folder=device_folder,
            held=self._held,
            on_event=self._on_event,
            on_sync_failed=self._have_failures_kept,
            on_io_errors=self._on_io_errors,
        )
        self._active: Loaded | None = None
        self._inactive: Loaded | None = None
        self._awaited: Loaded | None = None
        self._deps: dict[int, list[str]] = {}
        self._descriptors: dict[int, LoadDescriptors] = {}
        self._autoclear, self._loop_notes = state.autoclear, state.loop
        self.opened = state.opened
        self._former_io_errors, self._last_io_error = state.io_errors, state.last_io_error
        self.exports: dict[str, ServedExport] = {}
        self._frozen: list[tuple[ConnectionState, int]] | None = None
        self._resumes_after = False
        devices[state.name] = self.device

    # what it is

    @property
    def connections(self) -> int:
        """Clients in transmission."""
        return sum(export.connections for export in self.exports.values())

    @property
    def io_errors(self) -> int:
        """Since the device was made, in whatever process."""
        return self._former_io_errors + self.device.io_errors

    @property
    def last_io_error(self) -> str:
        """For people; "" for none."""
        last = self.device.last_io_error
        return self._last_io_error if last is None else describe_io_error(*last)

    def state(self) -> DeviceState:
        """All that makes it; with its connections while it is frozen."""
        frozen = self._frozen is not None
        return DeviceState(
            name=self.name,
            minor=self.minor,
            uuid=self.uuid,
            active=self._active,
            inactive=self._inactive,
            suspended=self.device.suspended and not (frozen and self._resumes_after),
            event=self.event,
            exports=[export.state for export in self.exports.values()],
            connections=[state for state, _ in self._frozen or ()],
            autoclear=self._autoclear,
            opened=self.opened,
            loop=self._loop_notes,
            failed_syncs=self.failed_syncs,
            io_errors=self.io_errors,
            last_io_error=self.last_io_error,
        )

    @property
    def failed_syncs(self) -> list[FailedSync]:
        """Through which descriptors a sync has failed."""
        return self._stock.failed_syncs(self.minor)

    def info(self) -> DeviceInfo:
        """What a worker knows of it; holders, restarts and the like are the supervisor's."""
        loaded = self._active or self._inactive
        return DeviceInfo(
            name=self.name,
            minor=self.minor,
            uuid=self.uuid,
            state="SUSPENDED" if self.device.suspended else "ACTIVE",
            read_only=self.device.read_only,
            live=self._active is not None,
            inactive=self._inactive is not None,
            open_count=self.connections,
            connections=self.connections,
            event=self.event,
            size=self.device.size,
            worker=os.getpid(),
            exports=[export.state for export in self.exports.values()],
            deps=self._deps.get(loaded.load, []) if loaded else [],
            **_shape(self.device.table),
        )

    def stats(self) -> dict[str, Any]:
        """Counters of the device and of each export."""
        return {
            "device": without_tails(self.device.stats()),
            "exports": {id: without_tails(export.stats()) for id, export in self.exports.items()},
        }

    # tables

    async def restore_active(self, state: DeviceState, ask: Ask) -> list[Label]:
        """The active table and whether it is suspended, as in `state`, from the stock. The labels of
        what was not there and `ask` has opened.
        """
        labels: list[Label] = []
        self._awaited = state.inactive
        if state.active is not None:
            source = f"table of {state.name}"
            _, labels = await self._load(state.active, source, ask, restored=True, lent=state.suspended)
            await in_thread(self._thread_name, self.device.activate)
            self._swapped()
            if not state.suspended:
                labels += await self._go_live(state.active.load, ask)
        return labels

    async def restore_inactive(self, state: DeviceState, ask: Ask) -> list[Label]:
        """The inactive table, likewise."""
        labels: list[Label] = []
        if state.inactive is not None:
            _, labels = await self._load(state.inactive, f"inactive table of {state.name}", ask, restored=True)
        self._awaited = None
        return labels

    async def load(
        self, loaded: Loaded, source: str, ask: Ask, *, same_files: bool = False
    ) -> tuple[dict[str, Any], list[Label]]:
        """Fills the inactive slot. What `WorkerLoad` answers, and the labels of what was opened. same_files: as `Load`
        has it.
        """
        same_as = self._active.load if same_files and self._active else 0
        table, labels = await self._load(loaded, source, ask, same_as=same_as)
        answer = {**_shape(table), "deps": self._deps[loaded.load], "size": to_bytes(table.length)}
        return {**answer, "whole": loaded.whole}, labels

    async def _load(
        self, loaded: Loaded, source: str, ask: Ask, *, restored: bool = False, lent: bool = False, same_as: int = 0
    ) -> tuple[Table, list[Label]]:
        descriptors = LoadDescriptors(
            self._stock,
            self.minor,
            loaded.load,
            ask,
            restored=restored,
            lent=lent,
            whole=loaded.whole,
            same_as=same_as,
        )

        def work() -> Table:
            try:
                table = parse(loaded.table, targets=self._targets, source=source)
                composed = self.device.load(
                    table,
                    read_only=loaded.read_only,
                    shared=loaded.shared,
                    descriptors=descriptors,
                )
            except BaseException:
                descriptors.fail()
                raise
            self._deps[loaded.load] = composed.opening.deps
            self._descriptors[loaded.load] = descriptors
            loaded.whole = any(owner.target.whole for owner in composed.owners.values())
            return table

        failed = self.failed_syncs
        table = await in_thread(self._thread_name, work)
        labels = descriptors.succeed()
        if self.failed_syncs != failed:  # it has files of the live table
            self._on_change(self)
        self._inactive = loaded
        self._forget_outlived()
        return table, labels

    async def clear(self) -> None:
        """Empties the inactive slot."""
        await in_thread(self._thread_name, self.device.clear)
        self._inactive = None
        self._forget_outlived()

    async def suspend(self, *, flush: bool, timeout: float | None) -> None:
        """As `Device.suspend`."""
        await in_thread(self._thread_name, lambda: self.device.suspend(flush=flush, timeout=timeout))

    async def resume(
        self, ask: Ask, *, flush: bool, timeout: float | None, swap: bool
    ) -> tuple[dict[str, Any], list[Label]]:
        """As `Device.resume`. What `WorkerResume` answers, and the labels of what was opened for it."""
        size = self.device.size if self._active else None
        labels: list[Label] = []
        changed: dict[str, str] = {}
        if swap:
            await in_thread(self._thread_name, lambda: self.device.activate(flush=flush, timeout=timeout))
            if self._inactive:
                self._swapped()
        if self._active:
            text = self._active.table
            labels = await self._go_live(self._active.load, ask)
            changed = {"table": self._active.table} if self._active.table != text else {}
        else:
            self.device.resume(swap=False)  # refuses
        if size is not None and size != self.device.size:
            self.happened()  # no client can be told, but who waits for events can
        return {**_shape(self.device.table), "size": self.device.size, "event": self.event, **changed}, labels

    async def _go_live(self, load: int, ask: Ask) -> list[Label]:
        """Resumes what is active; targets may open files for that. The labels of those."""
        before = self.device.table
        descriptors = self._descriptors[load]
        descriptors.go_on(ask)
        failed = self.failed_syncs
        try:
            await in_thread(self._thread_name, lambda: self.device.resume(swap=False))
        finally:
            labels = descriptors.succeed()
            if self.failed_syncs != failed:  # files may have been replaced
                self._on_change(self)
        after = self.device.table
        if after is not None and after != before and self._active:
            self._active.table = format_table(after)
        return labels

    async def status(self) -> list[tuple[int, int, str, str]]:
        """(start, length, target, status) a segment; sectors."""
        return [*await in_thread(self._thread_name, self.device.status)]

    async def files(self) -> list[OpenedFile]:
        """Those of the active table, each path once."""
        if self._active is None:
            return []
        with ExitStack() as stack:
            found: dict[str, int] = {}
            for path, fd in self._stock.files(self.minor, self._active.load).items():
                found[path] = os.dup(fd)  # the table may go meanwhile
                stack.callback(os.close, found[path])
            return await in_thread(self._thread_name, lambda: [_opened(path, fd) for path, fd in found.items()])

    async def message(self, sector: int, words: list[str]) -> str | None:
        """Has the target at `sector` answer."""
        return await in_thread(self._thread_name, lambda: self.device.message(Sectors(sector), words))

    async def read(self, offset: int, length: int) -> bytes:
        """What a client would read. Waits while the device is suspended."""
        return await in_thread(self._thread_name, lambda: self.device.pread(length, offset))

    def rename(self, name: str, uuid: str) -> None:
        """Called `name` from now on, or given the uuid it lacked."""
        if name != self.name:
            del self._devices[self.name]
            self.name = name
            self._devices[name] = self.device
            for export in self.exports.values():
                export.rename(name)
        self.uuid = uuid or self.uuid
        if self._active:
            self.happened()

    def rename_below(self, old: str, new: str) -> None:
        """A device that it may stand on is called `new` now."""
        for loaded in (self._active, self._inactive):
            if loaded:
                table = parse(loaded.table, targets=self._targets)
                loaded.table = rename_legs(table, old, new, device_folder=self._device_folder)

    def _swapped(self) -> None:
        self._active, self._inactive = self._inactive, None
        self._forget_outlived()

    def _forget_outlived(self) -> None:
        loads = {0, *(loaded.load for loaded in (self._active, self._inactive, self._awaited) if loaded)}
        self._deps = {load: deps for load, deps in self._deps.items() if load in loads}
        self._descriptors = {load: kept for load, kept in self._descriptors.items() if load in loads}
        labels = self._stock.outlived(self.minor, loads)
        self._forget(labels)

    def _forget(self, labels: list[Label]) -> None:
        self._stock.discard(labels)
        if labels:
            self._on_drop(labels)

    def _on_event(self, _what: str) -> None:
        self._event_loop.call_soon_threadsafe(self.happened)

    def _have_failures_kept(self) -> None:
        """On a thread that may wait, and that holds back who must not know before the supervisor does."""

        async def keep() -> None:
            await self._on_sync_failed(self)

        try:
            asyncio.run_coroutine_threadsafe(keep(), self._event_loop).result(KEEP_SECONDS + 1)
        except (RuntimeError, TimeoutError) as error:  # it ends, or is stuck: nobody takes it over
            _log.error("device %r: failed syncs could not be stored: %s", self.name, error or "no answer")

    def _on_io_errors(self) -> None:
        self._event_loop.call_soon_threadsafe(self._on_change, self)

    def happened(self) -> None:
        """Something that `wait` waits for."""
        self.event += 1
        self._on_change(self)

    # exports

    def serve(self, state: ExportState, listening: socket.socket, *, paused: bool = False) -> None:
        """One more export, on `listening`. Raises UsageError, ListenError; the socket is closed then."""
        if state.id in self.exports:
            listening.close()
            raise UsageError(f"device {self.name!r} has an export {state.id!r} already", cure="give it another id")
        self.exports[state.id] = ServedExport(
            state, self.device, self._engine, listening, self._clients_changed, paused=paused
        )

    def _clients_changed(self) -> None:
        self.opened |= self.connections > 0
        self._on_change(self)

    async def unserve(self, id: str) -> None:
        """Disconnects the clients of an export and ends it."""
        if id not in self.exports:
            known = ", ".join(map(repr, self.exports)) or "none"
            raise UsageError(f"device {self.name!r} has no export {id!r}", cure=f"there are: {known}")
        await self.exports.pop(id).end()
        self._on_change(self)

    # moving to another worker

    @property
    def moving(self) -> bool:
        """It is frozen, or on the way there: what its clients do is not news."""
        return self._frozen is not None

    @property
    def frozen(self) -> Sequence[tuple[ConnectionState, int]]:
        """The clients let go by `freeze`, and their sockets."""
        return self._frozen or ()

    async def end_handshakes(self) -> None:
        """Accepts no client until `thaw` or `take_over`; handshakes have a moment to end."""
        await asyncio.gather(*(export.end_handshakes() for export in self.exports.values()))

    async def detach_clients(self, timeout: float | None) -> None:
        """Lets every client go, and waits for none of them. Raises DrainError where requests in flight do not end;
        `thaw` goes on in any case.
        """
        self._frozen, self._resumes_after = [], False
        pauses = (export.pause(timeout) for export in self.exports.values())
        moving: list[tuple[ConnectionState, Moving]] = []
        late: TimeoutError | None = None
        for paused in await asyncio.gather(*pauses, return_exceptions=True):
            if isinstance(paused, TimeoutError):
                late = paused
            elif isinstance(paused, BaseException):
                raise paused
            else:
                moving += paused
        for number, (state, _) in enumerate(moving):
            state.number = number
        self._frozen = pack(self._stock, self.minor, moving)
        if late is not None:
            after = f" after {timeout:g} s" if timeout is not None else ""
            what = f"device {self.name!r}: requests of clients had not ended{after} ({late.strerror})"
            raise self.device.stuck(what) from late

    async def stop_moving(self, timeout: float | None) -> None:
        """Suspends it, if it is live, until `thaw`."""
        if not self.device.suspended:
            await self.suspend(flush=True, timeout=timeout)
            self._resumes_after = True

    async def thaw(self) -> None:
        """As before `detach_clients`."""
        if self._resumes_after:
            await in_thread(self._thread_name, lambda: self.device.resume(swap=False))  # files are all there
        clients, self._frozen, self._resumes_after = self._frozen or [], None, False
        self.take_over(clients)
        self._on_change(self)

    def take_over(self, clients: Sequence[tuple[ConnectionState, int]]) -> None:
        """Serves clients that were let go here or elsewhere, with what is unfinished of them in the stock, and accepts
        new ones.
        """
        states = [state for state, _ in clients]
        unfinished = unpack(self._stock, self.minor, states)
        whole = [(*client, left) for client, left in zip(clients, unfinished, strict=True)]
        for id, export in self.exports.items():
            export.go_on([client for client in whole if client[0].export == id])
        for state, descriptor in clients:
            if state.export not in self.exports:
                _log.error("device %r: a client of its former export %r is cut", self.name, state.export)
                os.close(descriptor)

    # the end

    async def end_exports(self) -> None:
        """Disconnects all clients, after what is in flight."""
        self.device.fail_held()  # while its clients can still be told
        exports, self.exports = list(self.exports.values()), {}
        await asyncio.gather(*(export.end() for export in exports))

    async def close(self, *, flush: bool) -> None:
        """Ends its exports, drains it, and flushes it if asked to; gives up its files and claims. Raises
        OSError of the last flush or DrainError; it is closed even so.
        """
        await self.end_exports()
        self._devices.pop(self.name, None)
        try:
            await in_thread(self._thread_name, lambda: self.device.close(flush=flush))
        finally:
            self._forget(self._stock.labels(self.minor))

    async def abandon(self) -> None:
        """Ends without touching what another process will go on with: claims stay claimed."""
        self._held.let_stay()
        self._on_drop = lambda _labels: None
        await self.close(flush=False)

    @property
    def _thread_name(self) -> str:
        return f"blkloom-verb {self.minor}"


def _opened(path: str, fd: int) -> OpenedFile:
    status = os.fstat(fd)
    size = os.lseek(fd, 0, os.SEEK_END) if stat.S_ISBLK(status.st_mode) else status.st_size
    name = os.readlink(descriptor_path(fd))
    return OpenedFile(path=path, name=name, device=status.st_dev, inode=status.st_ino, size=size)


def _shape(table: Table | None) -> dict[str, Any]:
    """How many segments a table has, and of which targets."""
    segments = table.segments if table else ()
    return {"targets": len(segments), "types": list(dict.fromkeys(segment.target.name for segment in segments))}
