"""Power cuts under a persistent snapshot: the store and the origin are on a disk of the target `torn`.

A checker that knows the format only from the kernel's documentation reads the store of every state, beside blkloom.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

import blkloom
from blkloom.units import Sectors

CHUNK = 512
CHUNKS = 96
SIZE = CHUNK * CHUNKS
STORE = 4 * CHUNKS
"""Chunks of the store: an area has 32 exceptions, so several are in use."""


def exceptions_of(store: bytes) -> dict[int, int]:
    """Chunks of the store by chunks of the origin."""
    magic, valid, version, chunk = struct.unpack_from("<4I", store)
    if magic == 0:
        return {}
    assert (magic, valid, version, chunk) == (0x70416E53, 1, 1, CHUNK // 512)
    found: dict[int, int] = {}
    area = 1
    while True:
        for old, new in struct.iter_unpack("<2Q", store[area * CHUNK : (area + 1) * CHUNK]):
            if not new:
                return found
            assert old not in found, f"two exceptions of chunk {old}"
            found[old] = new
        area += CHUNK // 16 + 1


def seen_by_the_kernel(origin: bytes, store: bytes) -> bytes:
    """What a snapshot with this store shows."""
    found = bytearray(origin)
    for old, new in exceptions_of(store).items():
        found[old * CHUNK : (old + 1) * CHUNK] = store[new * CHUNK : (new + 1) * CHUNK]
    return bytes(found)


@pytest.mark.parametrize("seed", range(6))
def test_a_power_cut_leaves_the_snapshot_as_it_was(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    before = chance.randbytes(SIZE)
    disk = tmp_path / "disk"
    disk.write_bytes(before + bytes(STORE * CHUNK))
    sectors = CHUNKS + STORE
    devices: dict[str, blkloom.Device] = {}

    def opened(name: str, table: str) -> blkloom.Device:
        devices[name] = blkloom.open(table, name=name, devices=devices)
        return devices[name]

    torn = opened("torn", f"0 {sectors} torn {disk} 0 1 seed={seed}")
    opened("real", f"0 {CHUNKS} linear blkloom:torn 0")
    opened("cow", f"0 {STORE} linear blkloom:torn {CHUNKS}")
    origin = opened("origin", f"0 {CHUNKS} snapshot-origin blkloom:real")
    opened("snapshot", f"0 {CHUNKS} snapshot blkloom:real blkloom:cow P {CHUNK // 512}")
    for _ in range(chance.randrange(1, 60)):
        first = chance.randrange(CHUNKS)
        count = chance.randrange(1, min(9, CHUNKS - first + 1))
        origin.pwrite(chance.randbytes(count * CHUNK), first * CHUNK)
        if not chance.randrange(8):
            origin.flush()
    torn.message(Sectors(0), ["cut"])
    torn.message(Sectors(0), ["states", "40", str(tmp_path / "state")])
    for device in reversed(devices.values()):
        device.close(flush=False)

    states = sorted(tmp_path.glob("state.*"))
    assert states
    for state in states:
        contents = state.read_bytes()
        assert seen_by_the_kernel(contents[:SIZE], contents[SIZE:]) == before
        (tmp_path / "real").write_bytes(contents[:SIZE])
        (tmp_path / "cow").write_bytes(contents[SIZE:])
        with blkloom.open(f"0 {CHUNKS} snapshot {tmp_path}/real {tmp_path}/cow P 1") as snapshot:
            assert snapshot.pread(SIZE, 0) == before


@pytest.mark.parametrize("seed", range(4))
def test_a_power_cut_in_a_merge_loses_nothing(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    disk = tmp_path / "disk"
    disk.write_bytes(chance.randbytes(SIZE) + bytes(STORE * CHUNK))
    devices: dict[str, blkloom.Device] = {}

    def opened(name: str, table: str) -> blkloom.Device:
        devices[name] = blkloom.open(table, name=name, devices=devices)
        return devices[name]

    torn = opened("torn", f"0 {CHUNKS + STORE} torn {disk} 0 1 seed={seed}")
    opened("real", f"0 {CHUNKS} linear blkloom:torn 0")
    opened("cow", f"0 {STORE} linear blkloom:torn {CHUNKS}")
    snapshot = opened("snapshot", f"0 {CHUNKS} snapshot blkloom:real blkloom:cow P 1")
    for chunk in chance.sample(range(CHUNKS), 70):
        snapshot.pwrite(chance.randbytes(CHUNK), chunk * CHUNK)
    snapshot.flush()
    expected = snapshot.pread(SIZE, 0)
    devices.pop("snapshot").close()
    merge = opened("merge", f"0 {CHUNKS} snapshot-merge blkloom:real blkloom:cow P 1")
    wanted = chance.randrange(2, 70)
    while int(merge.status()[0][3].split("/")[0]) > wanted:
        assert merge.pread(SIZE, 0) == expected
    torn.message(Sectors(0), ["cut"])
    torn.message(Sectors(0), ["states", "20", str(tmp_path / "state")])
    for device in reversed(devices.values()):
        device.close(flush=False)
    for state in tmp_path.glob("state.*"):
        contents = state.read_bytes()
        assert seen_by_the_kernel(contents[:SIZE], contents[SIZE:]) == expected
