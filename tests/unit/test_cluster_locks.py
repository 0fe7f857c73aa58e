"""Requests to the same clusters of a target with coroutines run one after the other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

import blkloom
from async_target import PATIENCE, Asynchronous, Calls, Gate, LoadedAsynchronous, table, until_faults
from blkloom import entries
from blkloom._engine import ClusterTable, Extent, File
from blkloom.device.cluster_locks import ClusterLock, ClusterLocks
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import RETRY, Retry
from blkloom.units import Bytes

CLUSTER = 2048

Step = tuple[str, int, int]
steps = st.lists(
    st.tuples(st.just("enter"), st.integers(0, 5), st.integers(0, 4))
    | st.tuples(st.just("leave"), st.integers(0, 30), st.just(0)),
    max_size=60,
)


@given(steps)
def test_a_lock_is_had_exactly_when_all_before_it_that_touch_its_clusters_have_left(steps: list[Step]) -> None:
    locks = ClusterLocks()
    entered: list[tuple[ClusterLock, range | None]] = []
    gone: set[ClusterLock] = set()
    told: set[ClusterLock] = set()

    def meet(one: range | None, other: range | None) -> bool:
        return one is None or other is None or not set(one).isdisjoint(other)

    def has(at: int) -> bool:
        clusters = entered[at][1]
        return all(
            entered[before][0] in gone and has(before) for before in range(at) if meet(clusters, entered[before][1])
        )

    for what, number, length in steps:
        if what == "enter":
            lock, clusters = ClusterLock(), range(number, number + length) if length else None
            free = all(one in gone and has(at) for at, (one, held) in enumerate(entered) if meet(held, clusters))
            assert locks.is_free(clusters) == free
            entered.append((lock, clusters))
            assert locks.enter(lock, clusters) == has(len(entered) - 1) == free
            if free:
                told.add(lock)
        elif entered and (lock := entered[number % len(entered)][0]) not in gone:
            gone.add(lock)
            told.update(locks.leave(lock))
        for at, (lock, _) in enumerate(entered):
            if lock not in gone:
                assert (lock in told) == has(at)


class Clustered(LoadedAsynchronous):
    """Clusters of a scratch file, mapped when first touched, in coroutines that wait for the test before they do so."""

    prepares_writes = True
    prepared: ClassVar[list[int]] = []

    def __init__(self, spec: Asynchronous, context: LoadContext, length: Bytes) -> None:
        super().__init__(spec, context, length)
        scratch = os.memfd_create("scratch")
        os.ftruncate(scratch, length)
        self._table = ClusterTable(length, CLUSTER, [File(scratch, writable=True, label="scratch")])
        os.close(scratch)
        self.map = [(Bytes(0), length, Extent.table(self._table))]

    async def read(self, offset: Bytes, length: Bytes) -> Retry:
        await self._fill("read", offset, length)
        return RETRY

    async def write(self, offset: Bytes, data: bytes, *, fua: bool) -> Retry:
        await self._fill("write", offset, Bytes(len(data)))
        return RETRY

    def prepare_writes(self, writes: Sequence[tuple[Bytes, Bytes]]) -> Sequence[int]:
        self.prepared.extend(offset for offset, _ in writes)
        return ()

    async def discard(self, offset: Bytes, length: Bytes) -> None:
        self.log.append(("begins", "discard", offset))

    async def _fill(self, operation: str, offset: Bytes, length: Bytes) -> None:
        self.log.append(("begins", operation, offset))
        await self.act(operation, offset)
        for cluster in range(offset // CLUSTER, -(-(offset + length) // CLUSTER)):
            self._table.fill(cluster, 1, entries.data(cluster * CLUSTER))
        self.log.append(("ends", operation, offset))


@pytest.mark.parametrize("second", ["read", "write"])
def test_a_second_request_to_a_cluster_begins_when_the_first_has_ended(second: str) -> None:
    gate = Gate()
    log: list[tuple[Any, ...]] = []
    with Calls() as call, blkloom.Device(table(Asynchronous(log, lambda *_: gate.wait(), Clustered))) as device:
        first = call(device.pread, 512, 0)
        gate.until_arrived()
        other = call(device.pread, 512, 1024) if second == "read" else call(device.pwrite, b"w" * 512, 1024)
        elsewhere = call(device.pread, 512, CLUSTER)
        gate.until_arrived(2)
        until_faults(device, 3)
        assert ("begins", second, 1024) not in log
        assert ("begins", "read", CLUSTER) in log, "another cluster is not waited for"
        gate.open()
        for ended in (first, other, elsewhere):
            ended.result(PATIENCE)
        assert device.pread(1024, 512) == bytes(512) + (b"w" * 512 if second == "write" else bytes(512))
    assert log.index(("ends", "read", 0)) < log.index(("begins", second, 1024))


def test_a_request_that_spans_clusters_waits_for_each_of_them() -> None:
    gates = {0: Gate(), CLUSTER: Gate()}
    log: list[tuple[Any, ...]] = []

    async def act(operation: str, offset: int) -> None:
        if operation == "read":
            await gates[offset].wait()

    with Calls() as call, blkloom.Device(table(Asynchronous(log, act, Clustered), sectors=64)) as device:
        reads = [call(device.pread, 512, offset) for offset in gates]
        for gate in gates.values():
            gate.until_arrived()
        discard = call(device.discard, 512, 2 * CLUSTER)
        until_faults(device, 3)
        gates[0].open()
        reads[0].result(PATIENCE)
        assert ("begins", "discard", 512) not in log
        gates[CLUSTER].open()
        discard.result(PATIENCE)
    assert ("begins", "discard", 512) in log


def test_writes_to_a_cluster_that_a_handler_is_busy_with_are_not_prepared() -> None:
    gate = Gate()
    Clustered.prepared.clear()
    with (
        Calls() as call,
        blkloom.Device(table(Asynchronous([], lambda *_: gate.wait(), Clustered), sectors=64)) as device,
    ):
        read = call(device.pread, 512, 0)
        gate.until_arrived()
        writes = call(device.batch, [("w", b"w" * 512, number * CLUSTER + 512) for number in range(8)])
        gate.until_arrived(8)  # they have begun, but for the one that waits
        gate.open()
        read.result(PATIENCE)
        assert writes.result(PATIENCE) == [512] * 8
    assert 512 not in Clustered.prepared
    assert set(Clustered.prepared) <= {number * CLUSTER + 512 for number in range(1, 8)}


def test_a_chain_of_requests_to_one_cluster_is_as_long_as_they_come() -> None:
    gate = Gate()

    class PlainWrite(Clustered):
        prepares_writes = False

        def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:  # type: ignore[override]
            self.log.append(("write", offset))

    log: list[tuple[Any, ...]] = []
    with Calls() as call, blkloom.Device(table(Asynchronous(log, lambda *_: gate.wait(), PlainWrite))) as device:
        read = call(device.pread, 512, 0)
        gate.until_arrived()
        writes = call(device.batch, [("w", b"w", number % 512) for number in range(3000)])
        until_faults(device, 256)
        gate.open()
        read.result(PATIENCE)
        assert set(writes.result(PATIENCE)) == {1}
