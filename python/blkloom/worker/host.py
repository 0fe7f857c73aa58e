"""A worker's devices by minor number, and what a supervisor may ask about them.

`answer` is the one way in: a verb and its descriptors, a result as plain JSON or an exception out. On
the event loop; what blocks runs on threads (`hosted.py`). News goes out through `tell`.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from blkloom import _engine, open_files
from blkloom.control.messages import (
    Describe,
    Drop,
    Freeze,
    Happened,
    Hold,
    Keep,
    Release,
    Serve,
    Thaw,
    Unserve,
    WorkerCall,
    WorkerClear,
    WorkerFiles,
    WorkerLoad,
    WorkerMessage,
    WorkerRead,
    WorkerRename,
    WorkerResume,
    WorkerStats,
    WorkerStatus,
    WorkerSuspend,
)
from blkloom.control.states import DeviceState, FailedSync, Label
from blkloom.device.device import Device
from blkloom.errors import ResourceError, UsageError
from blkloom.table.places import LinePlaces
from blkloom.table.words import split_words
from blkloom.target.registry import Targets
from blkloom.worker import handover
from blkloom.worker.hosted import HostedDevice
from blkloom.worker.stock import Ask, Stock
from blkloom.worker.threads import in_thread

_log = logging.getLogger(__name__)

_FORCED: Final = 1.0
"""Seconds a device that is released by force has to end before it is left to end by itself."""

_STORED_AT_ONCE: Final = open_files.WORKER_RESERVE // 2

Tell = Callable[[Keep | Drop | Happened, Sequence[int]], None]
"""Says something to the supervisor, if there is one; descriptors stay the caller's."""

Confirm = Callable[[int, list[FailedSync]], Awaitable[None]]
"""Has the failed syncs of a device (its minor number) remembered. Raises TimeoutError."""


class Host:
    """Without devices at first. device_folder: where devices have their sockets. client_memory: bytes that all clients
    together may make it keep.
    """

    def __init__(
        self,
        targets: Targets,
        device_folder: str,
        tell: Tell,
        told: Callable[[], Awaitable[None]],
        confirm: Confirm,
        client_memory: int,
    ) -> None:
        """told: returns when what `tell` said has been sent."""
        self.engine = _engine.Engine(memory=client_memory)
        self.devices: dict[int, HostedDevice] = {}
        self.stock = Stock()
        self.tell = tell
        self.told = told
        self._confirm = confirm
        self._targets = targets
        self._device_folder = device_folder
        self._by_name: dict[str, Device] = {}
        self._changed: set[int] = set()
        self._held_back: list[DeviceState] = []
        self._closing: set[asyncio.Task[None]] = set()
        # A supervisor that comes back asks while what its predecessor began here may still go on.
        self._holding = asyncio.Lock()
        self._freezing = asyncio.Lock()

    async def answer(self, call: WorkerCall, descriptors: list[int], ask: Ask) -> Any:
        """Does what `call` asks; owns the descriptors. `Leave` is not for a host."""
        match call:
            case Hold():
                async with self._holding:
                    return await self._hold(call, descriptors, ask)
            case Serve():
                listening = socket.socket(fileno=descriptors.pop(0)) if descriptors else None
                if listening is None:
                    raise _lost(0, 1)
                try:
                    device = self._device(call.minor)
                except UsageError:
                    listening.close()
                    raise
                return device.serve(call.export, listening)
            case WorkerLoad():
                result, labels = await self._device(call.minor).load(
                    call.loaded, call.source, ask, same_files=call.same_files
                )
                await self.keep(labels)
                return result
            case WorkerClear():
                return await self._device(call.minor).clear()
            case WorkerSuspend():
                return await self._device(call.minor).suspend(flush=call.flush, timeout=call.timeout)
            case WorkerResume():
                device = self._device(call.minor)
                result, labels = await device.resume(ask, flush=call.flush, timeout=call.timeout, swap=call.swap)
                await self.keep(labels)
                return result
            case Release():
                return await self._release(call)
            case WorkerRename():
                return self._rename(call)
            case WorkerStatus():
                async with self._holding:  # a device that is coming has no table yet
                    return await self._device(call.minor).status()
            case WorkerFiles():
                async with self._holding:
                    return await self._device(call.minor).files()
            case WorkerMessage():
                return await self._device(call.minor).message(call.sector, _message_words(call.text))
            case WorkerRead():
                data = await self._device(call.minor).read(call.offset, call.length)
                return base64.b64encode(data).decode("ascii")
            case WorkerStats():
                memory = self.engine.memory()
                return {str(minor): {**device.stats(), "memory": memory} for minor, device in self.devices.items()}
            case Unserve():
                return await self._device(call.minor).unserve(call.id)
            case Describe():
                async with self._holding:  # devices that are coming may be given up again
                    return await self._describe()
            case Freeze():
                async with self._freezing:
                    return {"devices": await handover.freeze(self, call.timeout)}
            case Thaw():
                async with self._freezing:
                    return await handover.thaw(self)
        raise UsageError(f"a worker cannot do {type(call).__name__}")

    def _device(self, minor: int) -> HostedDevice:
        if minor not in self.devices:
            known = ", ".join(map(str, sorted(self.devices))) or "none"
            raise UsageError(f"this worker has no device {minor}", cure=f"it has: {known}")
        return self.devices[minor]

    # devices come

    async def _hold(self, call: Hold, descriptors: list[int], ask: Ask) -> None:
        if len(call.labels) != len(descriptors):
            come = len(descriptors)
            while descriptors:
                open_files.close(descriptors.pop())
            for state in call.devices:  # of which some may have come in calls before
                self.stock.discard(self.stock.labels(state.minor))
            self._held_back = []
            raise _lost(come, len(call.labels))
        for label in call.labels:
            self.stock.put(label, descriptors.pop(0))
        for state in call.devices:
            for failed in state.failed_syncs:
                self.stock.fail(failed.label, failed.errno)
        known = {state.minor for state in self._held_back}
        self._held_back += [state for state in call.devices if state.minor not in known]
        if call.more:
            return
        states, self._held_back = self._held_back, []
        added: list[HostedDevice] = []
        opened: list[Label] = []
        try:
            for state in states:
                added.append(self._add(state))
                opened += await added[-1].restore_active(state, ask)
            for state, device in zip(states, added, strict=True):
                opened += await device.restore_inactive(state, ask)  # it may name devices that came later
            for state, device in zip(states, added, strict=True):
                handover.receive_exports(self.stock, device, state)
            # From here on nothing fails: a client must not be served by two.
            for state, device in zip(states, added, strict=True):
                handover.receive_clients(self.stock, device, state)
        except BaseException:
            for device in reversed(added):
                del self.devices[device.minor]
                await device.abandon()
            for state in states:
                self.stock.discard(self.stock.labels(state.minor))
            raise
        await self.keep(opened)

    def _add(self, state: DeviceState) -> HostedDevice:
        if state.minor in self.devices or state.name in self._by_name:
            raise UsageError(f"this worker has a device {state.minor} or {state.name!r} already")
        device = HostedDevice(
            state,
            engine=self.engine,
            targets=self._targets,
            stock=self.stock,
            devices=self._by_name,
            device_folder=self._device_folder,
            on_change=self._on_change,
            on_drop=lambda labels: self.tell(Drop(labels=labels), ()),
            on_sync_failed=self._on_sync_failed,
        )
        self.devices[state.minor] = device
        return device

    # devices change

    async def keep(self, labels: Sequence[Label]) -> None:
        """Has the descriptors of these labels stored."""
        await self.store([(label, fd) for label in labels if (fd := self.stock.find(label)) is not None])

    async def store(self, labelled: Sequence[tuple[Label, int]]) -> None:
        """Has descriptors stored with the supervisor: few at once, for each is there twice while it is on the way."""
        for at in range(0, len(labelled), _STORED_AT_ONCE):
            some = labelled[at : at + _STORED_AT_ONCE]
            self.tell(Keep(labels=[label for label, _ in some]), [fd for _, fd in some])
            await self.told()

    def _on_change(self, device: HostedDevice) -> None:
        """News of a device, said once a turn of the event loop."""
        if not self._changed:
            asyncio.get_running_loop().call_soon(self._say_changes)
        self._changed.add(device.minor)

    def _say_changes(self) -> None:
        changed, self._changed = self._changed, set()
        for minor in sorted(changed):
            if (device := self.devices.get(minor)) and not device.moving:
                news = Happened(
                    minor=minor,
                    connections=device.connections,
                    event=device.event,
                    opened=device.opened,
                    failed_syncs=device.failed_syncs,
                    io_errors=device.io_errors,
                    last_io_error=device.last_io_error,
                )
                self.tell(news, ())

    async def _on_sync_failed(self, device: HostedDevice) -> None:
        for other in self.devices.values():
            if device.device in (other.device, *other.device.all_below()):
                other.happened()
        try:
            await self._confirm(device.minor, device.failed_syncs)
        except TimeoutError:
            _log.error("device %r: no supervisor could store that a sync failed; one that comes is told", device.name)

    def _rename(self, call: WorkerRename) -> None:
        device = self._device(call.minor)
        if call.name != device.name and call.name in self._by_name:
            raise UsageError(f"a device {call.name!r} exists")
        former = device.name
        device.rename(call.name, call.uuid)
        if former != call.name:
            for other in self.devices.values():
                other.rename_below(former, call.name)

    async def _describe(self) -> dict[str, Any]:
        await self.store([*self.stock, *handover.listening(self.devices.values())])
        return {
            "devices": [device.state() for device in self.devices.values()],
            "infos": [device.info() for device in self.devices.values()],
        }

    # devices go

    async def _release(self, call: Release) -> None:
        device = self._device(call.minor)
        closing = asyncio.create_task(device.close(flush=not call.fail), name=f"close {device.name}")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        closing.add_done_callback(lambda _done: self.devices.pop(call.minor, None))
        if not call.fail:
            return await asyncio.shield(closing)
        closing.add_done_callback(lambda done: _say_error(f"device {device.name!r}, removed by force", done))
        await asyncio.wait([closing], timeout=_FORCED)
        return None

    async def close(self) -> list[Exception]:
        """Ends every device, those on top first, and the engine. What went wrong."""
        errors: list[Exception] = []
        await asyncio.gather(*(device.end_exports() for device in self.devices.values()))  # of slow clients, once
        while self.devices:
            below = {below for device in self.devices.values() for below in device.device.all_below()}
            minor = next((m for m, d in self.devices.items() if d.device not in below), next(iter(self.devices)))
            device = self.devices.pop(minor)
            try:
                await device.close(flush=True)
            except Exception as error:
                _log.error("device %r: %s", device.name, error)
                errors.append(error)
        await in_thread("blkloom-close", self.engine.close)
        return errors


def _lost(come: int, sent: int) -> ResourceError:
    what = f"of {sent} descriptors this worker could take {come}: it has no more free"
    return ResourceError(what, cure=open_files.advice(), errno=errno.EMFILE)


def _say_error(what: str, done: asyncio.Task[None]) -> None:
    if not done.cancelled() and (error := done.exception()):
        _log.error("%s: %s", what, error)


def _message_words(text: str) -> list[str]:
    words, behind = split_words(text, 0, len(text), LinePlaces(text, "message"))
    if rest := text[behind:].strip():
        raise UsageError(f"Invalid message: {rest!r} is no word", cure="escape # and blanks with a backslash")
    return [word.text for word in words]
