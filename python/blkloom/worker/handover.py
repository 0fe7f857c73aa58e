"""Hand-over of devices from one worker to another: `freeze` in the old one, `receive` in the new one, or `thaw`.

When no request is in flight, the clients are taken out of the engine. Requests that wait at a suspended device, and
replies that a client has not read, are taken out as bytes; the hand-over waits for neither. Then the devices are
suspended, and their states and labelled descriptors are sent. The claims and the memory of a device are already in its
descriptor store. Unfinished bytes of clients: see `moving`. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.messages import Drop
from blkloom.control.states import DeviceState, Label, export_key, export_label
from blkloom.errors import ListenError
from blkloom.export.registry import endpoints
from blkloom.worker.moving import unfinished_label

if TYPE_CHECKING:
    from blkloom.worker.host import Host
    from blkloom.worker.hosted_device import HostedDevice

_log = logging.getLogger(__name__)


async def freeze(host: Host, timeout: float | None) -> list[DeviceState]:
    """Stops all I/O and sends the connections in `Keep`s. timeout: seconds for each step. Raises DrainError, or OSError
    of a flush; the devices then continue as before.
    """
    devices = list(host.devices.values())
    try:
        await _all(device.exports.end_handshakes() for device in devices)  # the present clients are still served
        await _all(device.detach_clients(timeout) for device in devices)
        await _all(device.suspend_frozen(timeout) for device in devices)
        states = [device.state() for device in devices]
        for device in devices:
            await host.keep(_clients(host.store, device))
    except BaseException:
        await thaw(host)
        raise
    return states


async def thaw(host: Host) -> None:
    """Continues as before `freeze`."""
    for device in host.devices.values():
        labels = [label for label, _ in _clients(host.store, device)]
        await device.thaw()
        if labels:
            host.notify(Drop(labels=labels), ())


def receive_exports(store: DescriptorStore, device: HostedDevice, state: DeviceState) -> None:
    """Makes the exports of `state`, which accept no clients yet, from descriptors in the store. Raises ListenError if
    descriptors are missing.
    """
    for export in state.exports:
        role = endpoints(export.kind).role
        kept = [
            label for label in store.labels(device.minor) if (label.role, export_key(label)[0]) == (role, export.id)
        ]
        taken = {export_key(label)[1]: fd for label in kept if (fd := store.take(label)) is not None}
        if not taken:
            what = f"export '{export.id}' of device '{state.name}': the descriptors of {export.address} were lost"
            raise ListenError(what, cure="add the export again")
        device.exports.serve(export, taken, paused=True)


def receive_clients(store: DescriptorStore, device: HostedDevice, state: DeviceState) -> None:
    """Continues the connections of `state`, and lets its exports accept clients. A client whose socket is not in the
    store is lost; this is logged.
    """
    clients = []
    for connection in state.connections:
        fd = store.take(_label(device.minor, connection.number))
        if fd is None:
            _log.error("device '%s': the socket of client %d was lost", state.name, connection.number)
        else:
            clients.append((connection, fd))
    device.take_over(clients)


def endpoint_descriptors(devices: Iterable[HostedDevice]) -> list[tuple[Label, int]]:
    """Descriptors of all exports: listening sockets and FUSE connections, not connected clients."""
    return [
        (export_label(device.minor, export.state.id, endpoints(export.state.kind).role, key), descriptor)
        for device in devices
        for export in device.exports
        for key, descriptor in export.descriptors.items()
    ]


def _clients(store: DescriptorStore, device: HostedDevice) -> list[tuple[Label, int]]:
    """Descriptors of the clients that were taken out of the device."""
    found = [(_label(device.minor, state.number), fd) for state, fd in device.frozen]
    unfinished = unfinished_label(device.minor)
    if (memory := store.find(unfinished)) is not None:
        found.append((unfinished, memory))
    return found


def _label(minor: int, number: int) -> Label:
    return Label(device=minor, load=0, role="connection", key=str(number))


async def _all(steps: Iterable[object]) -> None:
    """Waits for all of them, then raises the first error."""
    for outcome in await asyncio.gather(*steps, return_exceptions=True):  # type: ignore[call-overload]
        if isinstance(outcome, BaseException):
            raise outcome
