"""Messages of vhost-user and the configuration space, against the places of QEMU's documentation and virtio_blk.h."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkloom.export.vhost_user.configuration import Disk
from blkloom.export.vhost_user.messages import (
    Configuration,
    Feature,
    Header,
    Inflight,
    Log,
    ProtocolError,
    Region,
    VringAddresses,
    VringEvent,
    VringValue,
    format_regions,
    parse_regions,
    reply,
    request,
)

NUMBER = st.integers(0, (1 << 64) - 1)
HALF = st.integers(0, (1 << 32) - 1)


@given(HALF, st.booleans(), st.binary(max_size=64))
def test_a_request_is_read_as_it_was_written(number: int, needs_reply: bool, payload: bytes) -> None:
    data = request(number, payload, needs_reply=needs_reply)
    assert data[12:] == payload
    assert Header.parse(data[:12]) == Header(number, needs_reply, len(payload))


@pytest.mark.parametrize("flags", [0, 2, 3, 5])
def test_answers_and_other_versions_are_no_requests(flags: int) -> None:
    with pytest.raises(ProtocolError, match="flags"):
        Header.parse(struct.pack("=III", 1, flags, 0))


def test_a_long_payload_is_refused_before_it_is_received() -> None:
    with pytest.raises(ProtocolError, match="4097 bytes"):
        Header.parse(struct.pack("=III", 5, 1, 4097))


def test_an_answer_has_the_flags_of_one() -> None:
    assert reply(1, b"12") == struct.pack("=III", 1, 5, 2) + b"12"


@given(HALF, HALF, NUMBER, NUMBER, NUMBER, NUMBER)
def test_payloads_are_read_as_they_are_written(
    vring: int, value: int, first: int, second: int, third: int, fourth: int
) -> None:
    number = VringValue(vring, value)
    assert VringValue.parse(number.format()) == number
    addresses = VringAddresses(vring, value, first, second, third, fourth)
    assert addresses.format() == struct.pack("=IIQQQQ", vring, value, first, second, third, fourth)
    assert VringAddresses.parse(addresses.format()) == addresses
    region = Region(first, second, third, fourth)
    assert parse_regions(format_regions([region, region])) == [region, region]
    inflight = Inflight(first, second, vring & 0xFFFF, value & 0xFFFF)
    assert Inflight.parse(inflight.format()) == Inflight.parse(inflight.format()[:20]) == inflight
    log = Log(first, second)
    assert Log.parse(log.format()) == log
    configuration = Configuration(vring, value, 1, b"data")
    assert Configuration.parse(configuration.format()) == configuration


@given(st.integers(0, 255), st.booleans())
def test_an_event_is_read_as_it_is_written(vring: int, present: bool) -> None:
    event = VringEvent(vring, present)
    assert VringEvent.parse(event.format()) == event
    assert event.format()[:2] == bytes([vring, 0 if present else 1])


@given(st.binary(max_size=40))
def test_payloads_of_any_bytes_are_read_or_refused(payload: bytes) -> None:
    for parse in (
        VringValue.parse,
        VringAddresses.parse,
        VringEvent.parse,
        parse_regions,
        Configuration.parse,
        Log.parse,
    ):
        with suppress(ProtocolError):
            parse(payload)


def test_the_configuration_has_its_fields_at_the_places_of_the_header() -> None:
    disk = Disk(size=3 << 20, logical=1024, optimal=65536, discard=8192)
    space = disk.space()
    at = {"capacity": (0, "<Q"), "size_max": (8, "<I"), "seg_max": (12, "<I"), "blk_size": (20, "<I")}
    at |= {"physical_block_exp": (24, "B"), "alignment_offset": (25, "B"), "min_io_size": (26, "<H")}
    at |= {"opt_io_size": (28, "<I"), "wce": (32, "B"), "num_queues": (34, "<H"), "max_discard_sectors": (36, "<I")}
    at |= {"max_discard_seg": (40, "<I"), "discard_sector_alignment": (44, "<I")}
    at |= {"max_write_zeroes_sectors": (48, "<I"), "max_write_zeroes_seg": (52, "<I")}
    at |= {"write_zeroes_may_unmap": (56, "B")}
    found = {name: struct.unpack_from(form, space, place)[0] for name, (place, form) in at.items()}
    assert found == {
        "capacity": 6144,
        "size_max": 262144,
        "seg_max": 126,
        "blk_size": 1024,
        "physical_block_exp": 2,
        "alignment_offset": 0,
        "min_io_size": 4,
        "opt_io_size": 64,
        "wce": 1,
        "num_queues": 64,
        "max_discard_sectors": 4194304,
        "max_discard_seg": 32,
        "discard_sector_alignment": 16,
        "max_write_zeroes_sectors": 4194304,
        "max_write_zeroes_seg": 32,
        "write_zeroes_may_unmap": 1,
    }
    assert len(space) == 256
    assert not any(space[57:])


def test_a_read_only_disk_offers_nothing_that_writes() -> None:
    writes = Feature.DISCARD | Feature.WRITE_ZEROES
    assert Disk(size=512).features() & (writes | Feature.READ_ONLY) == writes
    assert Disk(size=512, read_only=True).features() & (writes | Feature.READ_ONLY) == Feature.READ_ONLY
