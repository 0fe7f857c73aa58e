"""Data that a coroutine fills in never replaces data that a client wrote after the coroutine had read its source.

A target keeps clusters of a slow source in a scratch file, as a cache does. Handlers read the source, wait, and fill
the cluster; writes go to the scratch file or through to the source; clusters are evicted. Clients write, read back, and
read each other's clusters at the same time. Hypothesis chooses where and how long each handler waits.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any, ClassVar

from hypothesis import given, settings
from hypothesis import strategies as st

import blkloom
from async_target import table
from blkloom import entries
from blkloom._engine import ClusterTable, Extent, File
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import RETRY, LoadedTarget, Retry
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes, Sectors

SECTOR = 512
CLUSTER = 2048
CLUSTERS = 4
SIZE = CLUSTERS * CLUSTER
CLIENTS = 3


class Cache(TargetSpec):
    """waits: how many turns of the loop handlers wait, one after the other. through: for each write, whether it goes to
    the source.
    """

    waits: Sequence[int]
    through: Sequence[bool]
    source: bytearray

    name: ClassVar[str] = "cache"

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return LoadedCache(self, context, length)


class LoadedCache(LoadedTarget):
    writes = True

    def __init__(self, spec: Cache, context: LoadContext, length: Bytes) -> None:
        self._segment = context.segment()
        self._scratch = os.memfd_create("cache")
        os.ftruncate(self._scratch, length)
        self._table = ClusterTable(length, CLUSTER, [File(self._scratch, writable=True, label="cache")])
        self._waits, self._through, self.source = cycle(spec.waits), cycle(spec.through), spec.source
        super().__init__(spec, [(Bytes(0), length, Extent.table(self._table))])

    async def _wait(self) -> None:
        for _ in range(next(self._waits)):
            await asyncio.sleep(0)

    def _missing(self, cluster: int) -> bool:
        return self._table.entry(cluster) == entries.FAULT

    async def read(self, offset: Bytes, length: Bytes) -> Retry:
        for cluster in range(offset // CLUSTER, -(-(offset + length) // CLUSTER)):
            if self._missing(cluster):
                at = cluster * CLUSTER
                data = bytes(self.source[at : at + CLUSTER])
                await self._wait()
                os.pwrite(self._scratch, data, at)
                self._table.fill(cluster, 1, entries.data(at))
        return RETRY

    async def write(self, offset: Bytes, data: bytes, *, fua: bool) -> Retry | None:
        clusters = range(offset // CLUSTER, -(-(offset + len(data)) // CLUSTER))
        if not (next(self._through) and all(self._missing(cluster) for cluster in clusters)):
            return await self.read(offset, Bytes(len(data)))
        await self._wait()
        self.source[offset : offset + len(data)] = data
        await self._wait()
        return None

    async def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool, fast: bool) -> None:
        await self.read(offset, length)
        for at in range(offset, offset + length, SECTOR):
            if self._missing(at // CLUSTER):  # evicted since
                self.source[at : at + SECTOR] = bytes(SECTOR)
            else:
                os.pwrite(self._scratch, bytes(SECTOR), at)

    def message(self, words: list[str]) -> None:
        """Evicts a cluster."""
        cluster = int(words[0])
        if not self._missing(cluster):
            self._table.fill(cluster, 1, entries.FAULT)
            self._segment.synchronize()
            self.source[cluster * CLUSTER : (cluster + 1) * CLUSTER] = os.pread(
                self._scratch, CLUSTER, cluster * CLUSTER
            )

    def close(self) -> None:
        os.close(self._scratch)


Step = tuple[str, int, int]
clients_steps = st.lists(
    st.lists(
        st.tuples(
            st.sampled_from(["write", "write", "write", "read", "read all", "zero", "evict"]),
            st.integers(0, SIZE // SECTOR - 1),
            st.integers(1, 6),
        ),
        min_size=5,
        max_size=25,
    ),
    min_size=CLIENTS,
    max_size=CLIENTS,
)


class Client:
    """Owns every third sector, writes it and knows what is in it. Sectors of others it only reads."""

    def __init__(self, device: blkloom.Device, number: int, start: threading.Barrier) -> None:
        self.device = device
        self.number = number
        self.start = start
        self.expected = {at: bytes(SECTOR) for at in range(SIZE // SECTOR) if at % CLIENTS == number}

    def run(self, steps: Sequence[Step]) -> None:
        self.start.wait()
        for version, (what, sector, count) in enumerate(steps):
            own = sector - sector % CLIENTS + self.number
            own = own if own in self.expected else self.number
            if what == "write":
                self.expected[own] = bytes([version + 1, self.number + 1]) * (SECTOR // 2)
                self.device.pwrite(self.expected[own], own * SECTOR)
            elif what == "zero":
                self.expected[own] = bytes(SECTOR)
                self.device.write_zeroes(own * SECTOR, SECTOR)
            elif what == "read all":
                self.device.pread(min(count * CLUSTER, SIZE - sector * SECTOR), sector * SECTOR)
            elif what == "evict":
                self.device.message(Sectors(0), [str(sector * SECTOR // CLUSTER)])
            self.check(own)

    def check(self, own: int) -> None:
        assert self.device.pread(SECTOR, own * SECTOR) == self.expected[own], f"sector {own} of client {self.number}"


@settings(deadline=None)
@given(
    clients_steps,
    st.lists(st.integers(0, 12), min_size=1, max_size=8),
    st.lists(st.booleans(), min_size=1, max_size=4),
)
def test_no_write_that_was_answered_is_covered(steps: list[list[Step]], waits: list[int], through: list[bool]) -> None:
    target = Cache(waits, through, bytearray(SIZE))
    with blkloom.Device(table(target, sectors=SIZE // SECTOR)) as device, ThreadPoolExecutor(CLIENTS) as pool:
        start = threading.Barrier(CLIENTS)
        clients = [Client(device, number, start) for number in range(CLIENTS)]
        ended: list[Any] = [pool.submit(client.run, own) for client, own in zip(clients, steps, strict=True)]
        for one in ended:
            one.result(60)
        device.flush()
        for client in clients:
            for sector in client.expected:
                client.check(sector)
