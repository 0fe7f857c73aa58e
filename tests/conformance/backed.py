"""Test target with a backend: its data is in Python's memory, and each operation first waits."""

from __future__ import annotations

import asyncio

from blkloom._engine import Extent
from blkloom.targets.backend import Backend
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes


class MemoryBackend(Backend):
    """`size` bytes of zeros. Operations take a different number of turns of the loop."""

    longest = 10_000
    most_in_flight = 5

    def __init__(self, size: int) -> None:
        self.bytes = bytearray(size)

    async def read(self, offset: Bytes, length: Bytes) -> bytes:
        await _turns(offset)
        return bytes(self.bytes[offset : offset + length])

    async def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:
        await _turns(offset)
        self.bytes[offset : offset + len(data)] = data


class Backed(TargetSpec):
    """The second half of the segment comes first in the backend."""

    name = "backed"
    summary = "bytes in a backend, for tests"

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        queue = context.backend(MemoryBackend(length))
        half, read_only = Bytes(length // 2), context.read_only
        second = Bytes(length - half)
        return LoadedTarget(
            self,
            [
                (Bytes(0), half, Extent.backend(queue, second, read_only=read_only)),
                (half, second, Extent.backend(queue, 0, read_only=read_only)),
            ],
        )


async def _turns(offset: Bytes) -> None:
    for _ in range(offset // 512 % 4):
        await asyncio.sleep(0)
