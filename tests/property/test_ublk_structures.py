"""Values of the ublk driver: bytes to values and back, and parameters against the offsets in ublk_cmd.h."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from blkloom.export.ublk.structures import (
    FEATURES_LENGTH,
    INFO_LENGTH,
    DeviceInfo,
    Feature,
    Parameters,
    State,
    parse_features,
)

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
BLOCKS = st.integers(9, 12).map(lambda shift: 1 << shift)


@given(
    st.builds(
        DeviceInfo,
        queues=U16,
        depth=U16,
        most_bytes=U32,
        number=U32,
        state=U16,
        server=st.integers(-1, 1 << 22),
        flags=U64,
        tag=U64,
    )
)
def test_information_survives_its_bytes(info: DeviceInfo) -> None:
    assert len(info.format()) == INFO_LENGTH == 64
    assert DeviceInfo.parse(info.format()) == info


def test_information_has_its_fields_at_the_offsets_of_the_header() -> None:
    info = DeviceInfo(
        queues=2, depth=64, most_bytes=1 << 18, number=7, state=State.QUIESCED, server=42, flags=0x5A, tag=0x1234
    )
    data = info.format()
    assert struct.unpack_from("=HHH", data, 0) == (2, 64, 2)
    assert struct.unpack_from("=IIi", data, 8) == (1 << 18, 7, 42)
    assert struct.unpack_from("=QQ", data, 24) == (0x5A, 0x1234)


@given(
    size=st.integers(0, 1 << 40).map(lambda sectors: sectors * 512),
    logical=BLOCKS,
    physical=BLOCKS,
    optimal=st.integers(9, 31).map(lambda shift: 1 << shift),
    discard=st.sampled_from([0, 512, 4096, 65536, 1 << 20]),
    read_only=st.booleans(),
    rotational=st.booleans(),
)
def test_parameters_are_what_the_driver_reads(
    size: int, logical: int, physical: int, optimal: int, discard: int, read_only: bool, rotational: bool
) -> None:
    data = Parameters(
        size=size,
        logical=logical,
        physical=physical,
        minimum=physical,
        optimal=optimal,
        most_bytes=1 << 18,
        discard=discard,
        read_only=read_only,
        rotational=rotational,
    ).format()
    length, types = struct.unpack_from("=II", data, 0)
    assert (length, types) == (len(data), 3)
    attributes, logical_shift, physical_shift, optimal_shift, minimum_shift = struct.unpack_from("=IBBBB", data, 8)
    assert attributes == read_only | rotational << 1 | 1 << 2 | 1 << 3, "always a volatile cache, with FUA"
    assert (1 << logical_shift, 1 << physical_shift) == (logical, physical)
    assert (1 << optimal_shift, 1 << minimum_shift) == (optimal, physical)
    assert struct.unpack_from("=IIQQ", data, 16) == (512, 0, size // 512, 0)
    alignment, granularity, longest, zeroes, segments = struct.unpack_from("=IIIIH", data, 40)
    assert (alignment, segments) == (0, 1 if discard else 0)
    assert granularity == (discard or logical), "the driver refuses 0"
    assert longest * 512 % (discard or 512) == 0
    assert (longest > 0) == bool(discard)
    assert (zeroes > 0) == (not read_only)


@given(bits=U64)
def test_features_that_are_unknown_are_kept(bits: int) -> None:
    data = struct.pack("=Q", bits)
    assert len(data) == FEATURES_LENGTH
    assert int(parse_features(data)) == bits
    assert (Feature.UPDATE_SIZE in parse_features(data)) == bool(bits >> 10 & 1)
