"""Clients between two workers: what of them is unfinished, as part of their states or in a memfd a device.

Bytes received and not served, and replies not taken, ride in each `ConnectionState`; where a device's clients
have many together, in one memfd, which is labelled as memory of load 0: thousands of clients take one descriptor.
The memfd is in the stock from `pack` to `unpack`. On the event loop.
"""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import Sequence
from typing import Final

from blkloom.control.states import ConnectionState, Label
from blkloom.export.nbd.session import Moving, Unfinished
from blkloom.worker.stock import Stock

_log = logging.getLogger(__name__)

_MANY: Final = 48 << 10
"""Bytes of a device's clients from which on they go in a memfd."""


def unfinished_label(minor: int) -> Label:
    """Of the memfd."""
    return Label(device=minor, load=0, role="memory", key="unfinished")


def pack(
    stock: Stock, minor: int, clients: Sequence[tuple[ConnectionState, Moving]]
) -> list[tuple[ConnectionState, int]]:
    """The clients of a device with what is unfinished of them, and their sockets. What no memfd can be had for
    rides in the states, too.
    """
    if sum(len(moving.unfinished.initial) + len(moving.unfinished.unsent) for _, moving in clients) > _MANY:
        try:
            memory = _stored([moving.unfinished for _, moving in clients])
        except OSError as error:
            _log.error("device %d: no memory for what its clients have under way: %s", minor, error)
        else:
            stock.put(unfinished_label(minor), memory)
            at = 0
            for state, moving in clients:
                lengths = len(moving.unfinished.initial), len(moving.unfinished.unsent)
                state.stored = (at, *lengths)
                at += sum(lengths)
    for state, moving in clients:
        unfinished = moving.unfinished
        if state.stored is None:
            state.initial, state.unsent = _text(unfinished.initial), _text(unfinished.unsent)
        if unfinished.skipping:
            state.skipping = (unfinished.skipping[0], _text(unfinished.skipping[1]))
    return [(state, moving.descriptor) for state, moving in clients]


def _stored(clients: Sequence[Unfinished]) -> int:
    """A memfd with all of it, one after the other."""
    memory = os.memfd_create("blkloom-unfinished", os.MFD_CLOEXEC)
    try:
        for unfinished in clients:
            for left in (memoryview(unfinished.initial), memoryview(unfinished.unsent)):
                while left:
                    left = left[os.write(memory, left) :]
    except BaseException:
        os.close(memory)
        raise
    return memory


def unpack(stock: Stock, minor: int, states: Sequence[ConnectionState]) -> list[Unfinished]:
    """What is unfinished of each; the memfd is closed. Raises OSError where it is not there."""
    memory = stock.take(unfinished_label(minor))
    try:
        return [_unpacked(stock, minor, state, memory) for state in states]
    finally:
        if memory is not None:
            os.close(memory)


def _unpacked(stock: Stock, minor: int, state: ConnectionState, memory: int | None) -> Unfinished:
    skipping = (state.skipping[0], base64.b64decode(state.skipping[1])) if state.skipping else None
    initial, unsent = base64.b64decode(state.initial), base64.b64decode(state.unsent)
    if state.stored is not None:
        if memory is None:
            raise FileNotFoundError(f"what clients of device {minor} had under way was lost with the worker before")
        at, received, replies = state.stored
        initial, unsent = _read(memory, at, received), _read(memory, at + received, replies)
    # A worker of a former version has what it received of a client in a memfd of the client's number.
    former = stock.take(Label(device=minor, load=0, role="memory", key=str(state.number)))
    if former is not None:
        initial = _read(former, 0, os.fstat(former).st_size)
        os.close(former)
    return Unfinished(initial, unsent, skipping)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _read(fd: int, at: int, length: int) -> bytes:
    pieces = []
    while length:
        piece = os.pread(fd, length, at)
        if not piece:
            raise EOFError(f"{length} bytes at {at} of what clients had under way are not there")
        pieces.append(piece)
        at, length = at + len(piece), length - len(piece)
    return b"".join(pieces)
