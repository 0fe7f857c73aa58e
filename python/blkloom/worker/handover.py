"""Devices on their way from one worker to another: frozen here, received there, or thawed again.

At a drained instant the clients are taken out of the engine (requests begun are answered, what waits at
a suspended device is taken back as bytes, and so is what a client has not taken of its replies: none is waited
for), the devices are suspended, and all that makes them goes out as states and labelled descriptors. A device's
claims and memory are in its stock already. What is unfinished of its clients: see `moving`. On the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING

from blkloom.control.messages import Drop
from blkloom.control.states import DeviceState, Label
from blkloom.errors import ListenError
from blkloom.worker.moving import unfinished_label

if TYPE_CHECKING:
    from blkloom.worker.host import Host
    from blkloom.worker.hosted import HostedDevice
    from blkloom.worker.stock import Stock

_log = logging.getLogger(__name__)


async def freeze(host: Host, timeout: float | None) -> list[DeviceState]:
    """Everything stands still from here on, and its connections have been said in `Keep`s. timeout:
    seconds for each step. Raises DrainError, or OSError of a flush; then all goes on as before.
    """
    devices = list(host.devices.values())
    try:
        await _all(device.end_handshakes() for device in devices)  # while those served are served on
        await _all(device.detach_clients(timeout) for device in devices)
        await _all(device.stop_moving(timeout) for device in devices)
        states = [device.state() for device in devices]
        for device in devices:
            await host.store(_clients(host.stock, device))
    except BaseException:
        await thaw(host)
        raise
    return states


async def thaw(host: Host) -> None:
    """As before `freeze`."""
    for device in host.devices.values():
        labels = [label for label, _ in _clients(host.stock, device)]
        await device.thaw()
        if labels:
            host.tell(Drop(labels=labels), ())


def receive_exports(stock: Stock, device: HostedDevice, state: DeviceState) -> None:
    """The exports of `state`, not accepting yet; their sockets are in the stock. Raises ListenError when
    one is not.
    """
    for export in state.exports:
        fd = stock.take(Label(device=device.minor, load=0, role="listen", key=export.id))
        if fd is None:
            what = f"export {export.id!r} of device {state.name!r}: its socket was lost"
            raise ListenError(what, cure="add the export again")
        device.serve(export, socket.socket(fileno=fd), paused=True)


def receive_clients(stock: Stock, device: HostedDevice, state: DeviceState) -> None:
    """The connections of `state`; its exports accept from here on. A client whose socket is not in the
    stock is lost, and the log says so.
    """
    clients = []
    for connection in state.connections:
        fd = stock.take(_label(device.minor, connection.number))
        if fd is None:
            _log.error("device %r: the socket of client %d was lost", state.name, connection.number)
        else:
            clients.append((connection, fd))
    device.take_over(clients)


def listening(devices: Iterable[HostedDevice]) -> list[tuple[Label, int]]:
    """The sockets of all exports."""
    return [
        (Label(device=device.minor, load=0, role="listen", key=id), export.descriptor)
        for device in devices
        for id, export in device.exports.items()
    ]


def _clients(stock: Stock, device: HostedDevice) -> list[tuple[Label, int]]:
    """The descriptors of the clients that the device has let go."""
    found = [(_label(device.minor, state.number), fd) for state, fd in device.frozen]
    unfinished = unfinished_label(device.minor)
    if (memory := stock.find(unfinished)) is not None:
        found.append((unfinished, memory))
    return found


def _label(minor: int, number: int) -> Label:
    return Label(device=minor, load=0, role="connection", key=str(number))


async def _all(steps: Iterable[object]) -> None:
    """Waits for every one of them, then raises the first error."""
    for outcome in await asyncio.gather(*steps, return_exceptions=True):  # type: ignore[call-overload]
        if isinstance(outcome, BaseException):
            raise outcome
