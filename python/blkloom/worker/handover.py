"""Devices on their way from one worker to another: frozen here, received there, or thawed again.

At a drained instant the clients are taken out of the engine (requests begun are answered, what waits at
a suspended device is taken back as bytes), the devices are suspended, and all that makes them goes out
as states and labelled descriptors. A device's claims and memory are in its stock already. Bytes received
from a client and not served ride in its `ConnectionState`, or, when they are many, in a memfd labelled
as memory of load 0 with the connection's number. On the event loop.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final, Literal

from blkloom.control.messages import MOST_DESCRIPTORS, Drop, Happened, Keep
from blkloom.control.states import ConnectionState, DeviceState, Label
from blkloom.errors import ListenError

if TYPE_CHECKING:
    from blkloom.worker.host import Host
    from blkloom.worker.hosted import HostedDevice
    from blkloom.worker.stock import Stock

_log = logging.getLogger(__name__)

_LONG: Final = 64 << 10
"""Base64 characters of `ConnectionState.initial` from which on they go in a memfd."""


async def freeze(host: Host, timeout: float | None) -> list[DeviceState]:
    """Everything stands still from here on, and its connections have been said in `Keep`s. timeout:
    seconds for each step. Raises DrainError, or OSError of a flush; then all goes on as before.
    """
    devices = list(host.devices.values())
    try:
        await _all(device.detach_clients(timeout) for device in devices)
        await _all(device.stop_moving(timeout) for device in devices)
        states = [device.state() for device in devices]
        for device, state in zip(devices, states, strict=True):
            say_keep(host.tell, _clients(host.stock, device, state))
    except BaseException:
        await thaw(host)
        raise
    return states


async def thaw(host: Host) -> None:
    """As before `freeze`."""
    for device in host.devices.values():
        labels = [label for label in host.stock.labels(device.minor) if label.load == 0 and label.role == "memory"]
        labels += [_label(device.minor, "connection", state.number) for state, _ in device.frozen]
        host.stock.discard(labels)
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
        fd = stock.take(_label(device.minor, "connection", connection.number))
        rest = stock.take(_label(device.minor, "memory", connection.number))
        if rest is not None:
            connection.initial = _read(rest)
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


def say_keep(
    tell: Callable[[Keep | Drop | Happened, Sequence[int]], None], labelled: Sequence[tuple[Label, int]]
) -> None:
    """Has descriptors stored, in as many messages as it takes."""
    for at in range(0, len(labelled), MOST_DESCRIPTORS):
        some = labelled[at : at + MOST_DESCRIPTORS]
        tell(Keep(labels=[label for label, _ in some]), [fd for _, fd in some])


def _clients(stock: Stock, device: HostedDevice, state: DeviceState) -> list[tuple[Label, int]]:
    """The descriptors of the connections in `state`; long rests are moved out of it."""
    found = []
    for index, (connection, fd) in enumerate(device.frozen):
        found.append((_label(device.minor, "connection", connection.number), fd))
        if len(connection.initial) > _LONG:
            label = _label(device.minor, "memory", connection.number)
            stock.put(label, _written(connection.initial))
            found.append((label, stock.find(label) or -1))
            state.connections[index] = ConnectionState(
                export=connection.export,
                number=connection.number,
                structured=connection.structured,
                extended=connection.extended,
                contexts=connection.contexts,
                max_payload=connection.max_payload,
            )
    return found


def _label(minor: int, role: Literal["connection", "memory"], number: int) -> Label:
    return Label(device=minor, load=0, role=role, key=str(number))


def _written(initial: str) -> int:
    fd = os.memfd_create("blkloom-received", os.MFD_CLOEXEC)
    try:
        left = memoryview(base64.b64decode(initial))
        while left:
            left = left[os.write(fd, left) :]
    except BaseException:
        os.close(fd)
        raise
    return fd


def _read(fd: int) -> str:
    with open(fd, "rb") as file:
        file.seek(0)
        return base64.b64encode(file.read()).decode("ascii")


async def _all(steps: Iterable[object]) -> None:
    """Waits for every one of them, then raises the first error."""
    for outcome in await asyncio.gather(*steps, return_exceptions=True):  # type: ignore[call-overload]
        if isinstance(outcome, BaseException):
            raise outcome
