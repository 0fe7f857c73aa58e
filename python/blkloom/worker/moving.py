"""Packs the unfinished bytes of clients for a hand-over between two workers.

Bytes that were received but not served, and replies that were not read, are part of each `ConnectionState`. If the
clients of a device have many such bytes, they go into one memfd, labelled as memory of load 0: one descriptor is enough
for thousands of clients. The memfd is in the store from `pack` to `unpack`. Runs on the event loop.
"""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import Sequence
from typing import Final

from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.states import ConnectionState, Label
from blkloom.export.exporter import Client, Unfinished

_log = logging.getLogger(__name__)

_MANY: Final = 48 << 10
"""From this number of bytes on, a memfd is used."""


def unfinished_label(minor: int) -> Label:
    """Of the memfd."""
    return Label(device=minor, load=0, role="memory", key="unfinished")


def pack(store: DescriptorStore, minor: int, clients: Sequence[Client]) -> list[tuple[ConnectionState, int]]:
    """Packs the clients of a device: states with their unfinished bytes, and descriptors. If no memfd can be made, all
    bytes go into the states.
    """
    if sum(len(unfinished.initial) + len(unfinished.unsent) for _, _, unfinished in clients) > _MANY:
        try:
            memory = _stored([unfinished for _, _, unfinished in clients])
        except OSError as error:
            _log.error("device %d: no memory for what its clients have under way: %s", minor, error)
        else:
            store.put(unfinished_label(minor), memory)
            at = 0
            for state, _, unfinished in clients:
                lengths = len(unfinished.initial), len(unfinished.unsent)
                state.stored = (at, *lengths)
                at += sum(lengths)
    for state, _, unfinished in clients:
        if state.stored is None:
            state.initial, state.unsent = _text(unfinished.initial), _text(unfinished.unsent)
        if unfinished.skipping:
            state.skipping = (unfinished.skipping[0], _text(unfinished.skipping[1]))
    return [(state, descriptor) for state, descriptor, _ in clients]


def _stored(clients: Sequence[Unfinished]) -> int:
    """Writes all bytes into a memfd, one client after the other."""
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


def unpack(store: DescriptorStore, minor: int, states: Sequence[ConnectionState]) -> list[Unfinished]:
    """Unpacks the unfinished bytes of each client, and closes the memfd. Raises OSError if the memfd is missing."""
    memory = store.take(unfinished_label(minor))
    try:
        return [_unpacked(store, minor, state, memory) for state in states]
    finally:
        if memory is not None:
            os.close(memory)


def _unpacked(store: DescriptorStore, minor: int, state: ConnectionState, memory: int | None) -> Unfinished:
    skipping = (state.skipping[0], base64.b64decode(state.skipping[1])) if state.skipping else None
    initial, unsent = base64.b64decode(state.initial), base64.b64decode(state.unsent)
    if state.stored is not None:
        if memory is None:
            raise FileNotFoundError(f"what clients of device {minor} had under way was lost with the worker before")
        at, received, replies = state.stored
        initial, unsent = _read(memory, at, received), _read(memory, at + received, replies)
    # A worker of a former version used one memfd for each client, with the number of the client.
    former = store.take(Label(device=minor, load=0, role="memory", key=str(state.number)))
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
