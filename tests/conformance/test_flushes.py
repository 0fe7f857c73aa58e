"""A completed flush covers every write answered before it, on any connection, whatever happens next.

A server killed by SIGKILL loses its own state, but not the kernel's page cache. So these tests do not show that flushes
reach the disk (fdatasync); a target that counts syncs shows it, and `life/test_power_cut.py` cuts the power.
"""

from __future__ import annotations

import random
import select
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest

import blkloom
from blkloom import _engine
from blkloom._engine import Extent
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget, Mapped
from blkloom.targets.spec import TargetSpec
from blkloom.testing import NbdThread
from blkloom.units import Bytes

from . import nbd_client as nbd
from .ways_in import WAYS_IN

pytestmark = pytest.mark.timeout(60)

SIZE = 4 << 20
WRITERS = 3


class Volatile(TargetSpec):
    """Keeps writes in memory until it is flushed; `durable` is what a crash would leave."""

    name = "volatile"
    durable: ClassVar[bytearray] = bytearray()
    flushed: ClassVar[int] = 0

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        Volatile.durable = bytearray(length)
        Volatile.flushed = 0
        return LoadedVolatile(self, [(Bytes(0), length, Extent.fault())], bytearray(length))


class LoadedVolatile(LoadedTarget):
    writes = flushes = True

    def __init__(self, spec: Volatile, map: Mapped, content: bytearray) -> None:
        super().__init__(spec, map)
        self._content = content

    def read(self, offset: Bytes, length: Bytes) -> bytes:
        return bytes(self._content[offset : offset + length])

    def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:
        self._content[offset : offset + len(data)] = data

    def flush(self) -> None:
        Volatile.durable[:] = self._content
        Volatile.flushed += 1


def reaches_the_disk(way: str, device: blkloom.Device, host: NbdThread, durable: Callable[[int, int], bytes]) -> None:
    """Writes, flushes and a suspend. durable: (start, end): what would be there after a power cut."""
    with WAYS_IN[way](device, host) as way_in:
        way_in.write([(5, b"one")], fua=False)
        assert durable(5, 8) == bytes(3)
        way_in.flush()
        assert durable(5, 8) == b"one"
        way_in.write([(5, b"two")], fua=True)
        assert durable(5, 8) == b"two"
        way_in.write_zeroes(5, 3, unmap=True, fast=False, fua=True)
        assert durable(5, 8) == bytes(3)
        way_in.write([(5, b"six")], fua=False)
        device.suspend()
        assert durable(5, 8) == b"six"
        device.resume()


@pytest.mark.parametrize("table", ["0 2048 volatile", "0 2048 linear blkloom:lower 0"])
@pytest.mark.parametrize("way", WAYS_IN)
def test_flush_fua_and_suspend_reach_the_target_before_they_are_answered(
    engine: _engine.Engine, host: NbdThread, way: str, table: str
) -> None:
    with (
        blkloom.open("0 2048 volatile", engine=engine, name="lower", targets=[Volatile]) as lower,
        blkloom.open(table, engine=engine, devices={"lower": lower}, targets=[Volatile]) as device,
    ):
        reaches_the_disk(way, device, host, lambda start, end: bytes(Volatile.durable[start:end]))


@pytest.mark.parametrize("table", ["0 2048 torn blkloom:below 0", "0 2048 linear blkloom:torn 0"])
@pytest.mark.parametrize("way", WAYS_IN)
def test_flush_fua_and_suspend_reach_a_backend_before_they_are_answered(
    engine: _engine.Engine, host: NbdThread, way: str, table: str
) -> None:
    """`torn` has on the device below what a flush has covered."""
    torn = "0 2048 torn blkloom:below 0" if "blkloom:torn" in table else "0 2048 zero"
    with (
        blkloom.open("0 2048 ram", engine=engine, name="below") as below,
        blkloom.open(torn, engine=engine, name="torn", devices={"below": below}) as lower,
        blkloom.open(table, engine=engine, devices={"below": below, "torn": lower}) as device,
    ):
        reaches_the_disk(way, device, host, lambda start, end: below.pread(end - start, start))


@pytest.mark.parametrize("style", nbd.Style)
def test_flush_on_one_connection_covers_writes_answered_on_others(
    engine: _engine.Engine, host: NbdThread, style: nbd.Style
) -> None:
    with blkloom.open("0 2048 volatile", engine=engine, targets=[Volatile]) as device, host.exported(device, "disk"):
        flusher, *writers = [nbd.NbdClient.unix(host.path, "disk", style) for _ in range(1 + WRITERS)]
        assert all(client.flags & nbd.CAN_MULTI_CONN for client in (flusher, *writers))
        for round_ in range(1, 50):
            for number, writer in enumerate(writers):
                assert not writer.ask(nbd.WRITE, number * 4096, payload=bytes([round_]) * 100).error
            assert not flusher.ask(nbd.FLUSH).error
            for number in range(WRITERS):
                assert Volatile.durable[number * 4096 : number * 4096 + 100] == bytes([round_]) * 100
        for client in (flusher, *writers):
            client.disconnect()


def started(blkloom_command: str, *arguments: str | Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([blkloom_command, "serve", *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 30)[0]
    assert process.stdout.readline().startswith("nbd+unix:")
    return process


@pytest.mark.parametrize("options", [[], ["--direct-io"], ["--io=threads"]], ids=["buffered", "direct", "threads"])
def test_flushed_writes_of_every_connection_survive_a_killed_server(
    blkloom: str, tmp_path: Path, options: list[str]
) -> None:
    path, address = tmp_path / "disk", tmp_path / "nbd.sock"
    path.write_bytes(bytes(SIZE))
    share = SIZE // WRITERS // 512 * 512
    answered = [bytearray(share) for _ in range(WRITERS)]
    unanswered: list[tuple[int, bytes]] = [(0, b"")] * WRITERS
    locks = [threading.Lock() for _ in range(WRITERS)]
    began = threading.Barrier(WRITERS + 1)

    def write(number: int) -> None:
        client, chance = nbd.NbdClient.unix(address), random.Random(number)
        began.wait()
        try:
            while True:
                at = chance.randrange(share)
                data = chance.randbytes(min(chance.choice([1, 512, 4096, 30_000]), share - at))
                with locks[number]:
                    unanswered[number] = at, data
                assert not client.ask(nbd.WRITE, number * share + at, payload=data).error
                with locks[number]:
                    answered[number][at : at + len(data)] = data
                    unanswered[number] = 0, b""
        except (ConnectionError, BrokenPipeError):
            return
        finally:
            client.close()

    with ThreadPoolExecutor(WRITERS) as pool, started(blkloom, path, "--socket", address, *options) as process:
        writers = [pool.submit(write, number) for number in range(WRITERS)]
        flusher = nbd.NbdClient.unix(address)
        began.wait()
        for _ in range(30):
            covered = []
            for number in range(WRITERS):
                with locks[number]:
                    covered.append(bytes(answered[number]))
            assert not flusher.ask(nbd.FLUSH).error
        process.send_signal(signal.SIGKILL)
        process.wait()
        for writer in writers:
            writer.result(30)
        flusher.close()
    content = path.read_bytes()
    for number in range(WRITERS):
        found = content[number * share : (number + 1) * share]
        at, data = unanswered[number]
        for index, byte in enumerate(found):
            allowed = {answered[number][index]}
            if at <= index < at + len(data):
                allowed.add(data[index - at])
            assert byte in allowed, f"byte {index} of writer {number}'s part"
    assert any(any(part) for part in covered)
