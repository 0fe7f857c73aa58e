"""The devices of a worker by minor number, and the execution of the supervisor's requests.

`answer` executes a request with its descriptors; it returns plain JSON or raises. Runs on the event loop; blocking
calls run on threads (`threads.py`). Notifications are sent with `notify`.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from blkloom import _engine, open_files
from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.messages import (
    Describe,
    DeviceChanged,
    Drop,
    Freeze,
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
    WorkerReloadTls,
    WorkerRename,
    WorkerResume,
    WorkerStats,
    WorkerStatus,
    WorkerSuspend,
)
from blkloom.control.replies import Description, Frozen
from blkloom.control.states import DeviceState, FailedSync, Label
from blkloom.device.device import Device
from blkloom.errors import ResourceError, UsageError
from blkloom.table.places import LinePlaces
from blkloom.table.words import split_words
from blkloom.targets.registry import Targets
from blkloom.worker import handover
from blkloom.worker.hosted_device import HostedDevice
from blkloom.worker.load_descriptors import FileOpener
from blkloom.worker.threads import in_thread

_log = logging.getLogger(__name__)

_FORCED: Final = 1.0
"""Seconds for a device that is released by force to end; after that, nothing waits for it."""

_STORED_AT_ONCE: Final = open_files.WORKER_RESERVE // 2

Notify = Callable[[Keep | Drop | DeviceChanged, Sequence[int]], None]
"""Sends a notification to the supervisor, if one is connected. The caller still owns the descriptors."""

Confirm = Callable[[int, list[FailedSync]], Awaitable[None]]
"""Makes the supervisor record the failed syncs of a device (its minor number). Raises TimeoutError."""


class Host:
    """The devices of a worker; empty at first. device_folder: directory of the devices' sockets. client_memory: most
    bytes that it keeps for all clients together.
    """

    def __init__(
        self,
        targets: Targets,
        device_folder: str,
        notify: Notify,
        sent: Callable[[], Awaitable[None]],
        confirm: Confirm,
        client_memory: int,
    ) -> None:
        """sent: waits until all notifications of `notify` are sent."""
        self.engine = _engine.Engine(memory=client_memory)
        self.devices: dict[int, HostedDevice] = {}
        self.store = DescriptorStore()
        self.notify = notify
        self.sent = sent
        self._confirm = confirm
        self._targets = targets
        self._device_folder = device_folder
        self._by_name: dict[str, Device] = {}
        self._changed: set[int] = set()
        self._held_back: list[DeviceState] = []
        self._closing: set[asyncio.Task[None]] = set()
        # A new supervisor may ask while requests of the former one still run.
        self._holding = asyncio.Lock()
        self._freezing = asyncio.Lock()

    async def answer(self, call: WorkerCall, descriptors: list[int], opener: FileOpener) -> Any:
        """Executes `call`; owns the descriptors. `Leave` is not handled here."""
        match call:
            case Hold():
                async with self._holding:
                    return await self._hold(call, descriptors, opener)
            case Serve():
                try:
                    if len(descriptors) < len(call.keys):
                        raise _lost(len(descriptors), len(call.keys))
                    device = self._device(call.minor)
                except (ResourceError, UsageError):
                    for descriptor in descriptors:
                        os.close(descriptor)
                    raise
                if call.again:
                    await device.exports.stop_serving(call.export.id)
                device.exports.serve(call.export, dict(zip(call.keys, descriptors, strict=True)))
                return await device.exports.ready(call.export.id)
            case WorkerLoad():
                loaded, labels = await self._device(call.minor).tables.load(
                    call.loaded, call.source, opener, same_files=call.same_files
                )
                await self.keep_stored(labels)
                return loaded
            case WorkerClear():
                return await self._device(call.minor).tables.clear()
            case WorkerSuspend():
                return await self._device(call.minor).suspend(flush=call.flush, timeout=call.timeout)
            case WorkerResume():
                device = self._device(call.minor)
                resumed, labels = await device.resume(opener, flush=call.flush, timeout=call.timeout, swap=call.swap)
                await self.keep_stored(labels)
                return resumed
            case Release():
                return await self._release(call)
            case WorkerRename():
                return self._rename(call)
            case WorkerStatus():
                async with self._holding:  # a device that is being handed over has no table yet
                    return await self._device(call.minor).status()
            case WorkerFiles():
                async with self._holding:
                    return await self._device(call.minor).tables.files()
            case WorkerMessage():
                return await self._device(call.minor).message(call.sector, _message_words(call.text))
            case WorkerRead():
                data = await self._device(call.minor).read(call.offset, call.length)
                return base64.b64encode(data).decode("ascii")
            case WorkerStats():
                memory = self.engine.memory()
                return {str(minor): {**device.stats(), "memory": memory} for minor, device in self.devices.items()}
            case WorkerReloadTls():
                return self._device(call.minor).exports.reload_tls()
            case Unserve():
                return await self._device(call.minor).unserve(call.id)
            case Describe():
                async with self._holding:  # a hand-over to this worker may be cancelled
                    return await self._describe()
            case Freeze():
                async with self._freezing:
                    return Frozen(devices=await handover.freeze(self, call.timeout))
            case Thaw():
                async with self._freezing:
                    return await handover.thaw(self)
        raise UsageError(f"a worker cannot do {type(call).__name__}")

    def _device(self, minor: int) -> HostedDevice:
        if minor not in self.devices:
            known = ", ".join(map(str, sorted(self.devices))) or "none"
            raise UsageError(f"this worker has no device {minor}", cure=f"it has: {known}")
        return self.devices[minor]

    # devices arrive

    async def _hold(self, call: Hold, descriptors: list[int], opener: FileOpener) -> None:
        if len(call.labels) != len(descriptors):
            come = len(descriptors)
            while descriptors:
                open_files.close(descriptors.pop())
            for state in call.devices:  # some of which may have come in earlier calls
                self.store.drop(self.store.labels(state.minor))
            self._held_back = []
            raise _lost(come, len(call.labels))
        self.store.receive(call.labels, descriptors)
        for state in call.devices:
            for failed in state.failed_syncs:
                self.store.note_failed_sync(failed.label, failed.errno)
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
                opened += await added[-1].tables.restore_active(state, opener)
            for state, device in zip(states, added, strict=True):
                opened += await device.tables.restore_inactive(state, opener)  # it may refer to devices that came later
            for state, device in zip(states, added, strict=True):
                handover.receive_exports(self.store, device, state)
            # Nothing may fail from here on: only one worker may serve a client.
            for state, device in zip(states, added, strict=True):
                handover.receive_clients(self.store, device, state)
        except BaseException:
            for device in reversed(added):
                del self.devices[device.minor]
                await device.abandon()
            for state in states:
                self.store.drop(self.store.labels(state.minor))
            raise
        await self.keep_stored(opened)

    def _add(self, state: DeviceState) -> HostedDevice:
        if state.minor in self.devices or state.name in self._by_name:
            raise UsageError(f"this worker has a device {state.minor} or '{state.name}' already")
        device = HostedDevice(
            state,
            engine=self.engine,
            targets=self._targets,
            store=self.store,
            devices=self._by_name,
            device_folder=self._device_folder,
            on_change=self._on_change,
            on_drop=lambda labels: self.notify(Drop(labels=labels), ()),
            on_sync_failed=self._on_sync_failed,
        )
        self.devices[state.minor] = device
        return device

    # devices change

    async def keep_stored(self, labels: Sequence[Label]) -> None:
        """Sends the descriptors of these labels to the supervisor's store."""
        await self.keep([(label, fd) for label in labels if (fd := self.store.find(label)) is not None])

    async def keep(self, labelled: Sequence[tuple[Label, int]]) -> None:
        """Sends descriptors to the supervisor's store, a few at a time: each of them exists twice while it is sent."""
        for at in range(0, len(labelled), _STORED_AT_ONCE):
            some = labelled[at : at + _STORED_AT_ONCE]
            self.notify(Keep(labels=[label for label, _ in some]), [fd for _, fd in some])
            await self.sent()

    def _on_change(self, device: HostedDevice) -> None:
        """Notifies the supervisor of changes of a device, at most once for each turn of the event loop."""
        if not self._changed:
            asyncio.get_running_loop().call_soon(self._notify_changes)
        self._changed.add(device.minor)

    def _notify_changes(self) -> None:
        changed, self._changed = self._changed, set()
        for minor in sorted(changed):
            if (device := self.devices.get(minor)) and not device.is_frozen:
                message = DeviceChanged(
                    minor=minor,
                    connections=device.exports.connections,
                    event=device.event,
                    opened=device.opened,
                    failed_syncs=device.failed_syncs,
                    io_errors=device.io_errors,
                    last_io_error=device.last_io_error,
                    gone=device.exports.gone,
                )
                self.notify(message, ())

    async def _on_sync_failed(self, device: HostedDevice) -> None:
        for other in self.devices.values():
            if device.device in (other.device, *other.device.all_below()):
                other.happened()
        try:
            await self._confirm(device.minor, device.failed_syncs)
        except TimeoutError:
            _log.error("device '%s': no supervisor could store that a sync failed; one that comes is told", device.name)

    def _rename(self, call: WorkerRename) -> None:
        device = self._device(call.minor)
        if call.name != device.name and call.name in self._by_name:
            raise UsageError(f"a device '{call.name}' exists")
        former = device.name
        device.rename(call.name, call.uuid)
        if former != call.name:
            for other in self.devices.values():
                other.tables.rename_below(former, call.name)

    async def _describe(self) -> Description:
        await self.keep([*self.store, *handover.endpoint_descriptors(self.devices.values())])
        for device in self.devices.values():
            if device.exports.gone:  # the former supervisor may not know of them
                self._on_change(device)
        return Description(
            devices=[device.state() for device in self.devices.values()],
            infos=[device.info() for device in self.devices.values()],
        )

    # devices end

    async def _release(self, call: Release) -> None:
        device = self._device(call.minor)
        closing = asyncio.create_task(device.close(flush=not call.fail), name=f"close {device.name}")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        closing.add_done_callback(lambda _done: self.devices.pop(call.minor, None))
        if not call.fail:
            return await asyncio.shield(closing)
        closing.add_done_callback(lambda done: _log_error(f"device '{device.name}', removed by force", done))
        await asyncio.wait([closing], timeout=_FORCED)
        return None

    async def close(self, *, to_next: bool = False) -> list[Exception]:
        """Ends every device, upper ones first, and the engine. Returns the errors. to_next: another worker goes on with
        exports whose clients do not notice the end of a worker.
        """
        errors: list[Exception] = []
        if to_next:
            await asyncio.gather(*(device.exports.leave_to_next() for device in self.devices.values()))
        await asyncio.gather(
            *(device.end_exports() for device in self.devices.values())
        )  # slow clients at the same time
        while self.devices:
            below = {below for device in self.devices.values() for below in device.device.all_below()}
            minor = next((m for m, d in self.devices.items() if d.device not in below), next(iter(self.devices)))
            device = self.devices.pop(minor)
            try:
                await device.close(flush=True)
            except Exception as error:
                _log.error("device '%s': %s", device.name, error)
                errors.append(error)
        await in_thread("blkloom-close", self.engine.close)
        return errors


def _lost(come: int, sent: int) -> ResourceError:
    what = f"of {sent} descriptors this worker could take {come}: it has no more free"
    return ResourceError(what, cure=open_files.advice(), errno=errno.EMFILE)


def _log_error(what: str, done: asyncio.Task[None]) -> None:
    if not done.cancelled() and (error := done.exception()):
        _log.error("%s: %s", what, error)


def _message_words(text: str) -> list[str]:
    words, behind = split_words(text, 0, len(text), LinePlaces(text, "message"))
    if rest := text[behind:].strip():
        raise UsageError(f"Invalid message: '{rest}' is no word", cure="escape # and blanks with a backslash")
    return [word.text for word in words]
