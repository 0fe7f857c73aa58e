"""The block sizes that an export announces: those of its device, within the limits of the protocol."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import ClassVar

import pytest

import blkloom
from blkloom import Device, _engine
from blkloom.export.nbd.codes import Info
from blkloom.export.nbd.events import Answered, Transmission
from blkloom.export.nbd.handshake import Handshake
from blkloom.export.nbd.offer import BlockSizes, Catalogue
from blkloom.export.nbd.session import NbdExport
from blkloom.table import parse_table
from blkloom.table.syntax import Syntax, integer
from blkloom.targets.limits import BlockLimits
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.registry import builtin_targets
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes

MAXIMUM = 32 << 20


class Choosy(TargetSpec):
    """Zeros with limits: `choosy <logical> <optimal>`."""

    logical: int
    optimal: int

    name: ClassVar[str] = "choosy"
    arguments: ClassVar[Syntax] = (integer("logical"), integer("optimal"))

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return LoadedChoosy(self, [(Bytes(0), length, _engine.Extent.zero(discard_writes=True))])


class LoadedChoosy(LoadedTarget):
    spec: Choosy

    def limits(self) -> BlockLimits:
        return BlockLimits(self.spec.logical, self.spec.optimal)


def a_device(table: str) -> Device:
    return blkloom.open(table, targets=[Choosy])


@pytest.fixture
def device() -> Iterator[Device]:
    with a_device("0 64 choosy 4096 65536") as device:
        yield device


def sizes_of(device: _engine.Device) -> BlockSizes:
    return NbdExport("disk", _engine.Export(device)).offer().block_sizes


# What is told


def test_a_device_that_takes_sectors_takes_anything() -> None:
    with a_device("0 64 choosy 512 4096") as device:
        assert sizes_of(device) == BlockSizes(1, 4096, MAXIMUM)


@pytest.mark.parametrize("logical", [1024, 2048, 4096, 65536])
def test_larger_blocks_are_the_minimum(logical: int) -> None:
    with a_device(f"0 1280 choosy {logical} {logical}") as device:
        assert sizes_of(device) == BlockSizes(logical, logical, MAXIMUM)


def test_the_optimal_size_is_preferred_also_where_anything_is_taken() -> None:
    with a_device("0 64 choosy 512 65536") as device:
        assert sizes_of(device) == BlockSizes(1, 65536, MAXIMUM)


def test_no_preferred_size_is_larger_than_a_request_may_be() -> None:
    assert BlockSizes.fitting(1 << 30, 4096, 1 << 31) == BlockSizes(4096, MAXIMUM, MAXIMUM)


@pytest.mark.parametrize(("sectors", "minimum"), [(64, 4096), (60, 2048), (62, 1024), (63, 1), (8, 4096)])
def test_the_size_is_a_multiple_of_the_minimum(sectors: int, minimum: int) -> None:
    with a_device(f"0 {sectors} choosy 4096 4096") as device:
        assert sizes_of(device) == BlockSizes(minimum, 4096, MAXIMUM)


def test_a_device_without_a_table_takes_anything() -> None:
    with Device() as device:
        assert sizes_of(device) == BlockSizes()


def test_a_device_that_only_the_engine_knows_takes_anything() -> None:
    engine = _engine.Engine(loops=1)
    try:
        device = _engine.Device(engine, _engine.Map([(0, 4096, 0, _engine.Extent.zero())]))
        assert sizes_of(device) == BlockSizes()
        device.close()
    finally:
        engine.close()


def test_sizes_given_with_the_export_count_more_than_the_device(device: Device) -> None:
    export = NbdExport("disk", _engine.Export(device), block_sizes=BlockSizes(1, 512, 1 << 20))
    assert export.offer().block_sizes == BlockSizes(1, 512, 1 << 20)


def test_a_device_wants_what_the_devices_below_want(device: Device) -> None:
    table = "0 16 linear blkloom:lower 8"
    with blkloom.open(table, devices={"lower": device}) as above:
        assert sizes_of(above) == BlockSizes(4096, 65536, MAXIMUM)


# When it is asked


def reload(device: Device, text: str) -> None:
    device.load(parse_table(text, targets=builtin_targets().extended([Choosy])))
    device.resume()


def go(export: NbdExport, *infos: int) -> Transmission:
    """One client that chooses the export."""
    name = export.name.encode()
    data = struct.pack(f">I{len(name)}sH{len(infos)}H", len(name), name, len(infos), *infos)
    handshake = Handshake(Catalogue({export.name: export.offer}))
    handshake.next_event()
    handshake.receive_data(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 7, len(data)) + data)
    handshake.next_event()
    chosen = handshake.next_event()
    assert isinstance(chosen, Transmission)
    return chosen


def told(minimum: int, preferred: int) -> bytes:
    return struct.pack(">HIII", Info.BLOCK_SIZE, minimum, preferred, MAXIMUM)


def test_each_client_hears_of_the_table_of_its_time(device: Device) -> None:
    export = NbdExport("disk", _engine.Export(device))
    assert told(4096, 65536) in go(export, Info.BLOCK_SIZE).data
    reload(device, "0 64 choosy 1024 4096")
    assert told(1024, 4096) in go(export, Info.BLOCK_SIZE).data
    reload(device, "0 64 zero")
    assert told(1, 4096) in go(export, Info.BLOCK_SIZE).data


def test_an_inactive_table_has_no_say(device: Device) -> None:
    export = NbdExport("disk", _engine.Export(device))
    device.load(parse_table("0 64 zero", targets=builtin_targets()))
    assert told(4096, 65536) in go(export, Info.BLOCK_SIZE).data


def test_clients_that_do_not_ask_are_let_in_and_not_told(device: Device) -> None:
    chosen = go(NbdExport("disk", _engine.Export(device)))
    assert struct.pack(">H", Info.BLOCK_SIZE) + struct.pack(">I", 4096) not in chosen.data
    assert chosen.offer.size == 64 * 512


def test_go_right_after_info_tells_the_same_sizes_even_if_the_table_changed(device: Device) -> None:
    export = NbdExport("disk", _engine.Export(device))
    handshake = Handshake(Catalogue({"disk": export.offer}))
    handshake.next_event()
    handshake.receive_data(struct.pack(">I", 3))
    handshake.next_event()
    data = struct.pack(">I4sHH", 4, b"disk", 1, Info.BLOCK_SIZE)
    for option in (6, 7):
        handshake.receive_data(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)
        answered = handshake.next_event()
        assert isinstance(answered, Answered | Transmission)
        assert told(4096, 65536) in answered.data
        reload(device, "0 64 zero")
