"""Compressed clusters: valid data gives exactly one cluster, invalid data gives an error."""

from __future__ import annotations

import random
import resource
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from blkloom.image.errors import CorruptImage, DamagedCluster
from blkloom.image.qcow2.format.compressed import read_compressed, unpack
from blkloom.image.qcow2.format.header import Compression
from blkloom.image.qcow2.format.tables import COMPRESSED
from qcow2_by_hand import MemoryFile

BITS = 16
CLUSTER = 1 << BITS


def packed(data: bytes, compression: Compression, level: int = 6) -> bytes:
    if compression is Compression.ZSTD:
        return zstandard.ZstdCompressor(level=level).compress(data)
    packer = zlib.compressobj(level, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def read(raw: bytes, compression: Compression, *, skip: int = 0) -> bytes:
    sectors = (skip + len(raw) - 1) // 512 - skip // 512
    entry = COMPRESSED | skip | sectors << 62 - (BITS - 8)
    return read_compressed(MemoryFile(bytes(skip) + raw), entry, BITS, compression)  # type: ignore[arg-type] # only reads


@pytest.mark.parametrize("compression", list(Compression))
@given(data=st.binary(max_size=300), times=st.integers(1, 9), skip=st.integers(0, 2000))
def test_a_cluster_comes_out_whatever_its_place_and_what_follows_it(
    compression: Compression, data: bytes, times: int, skip: int
) -> None:
    cluster = (data * (times * 100)).ljust(CLUSTER, b"z")[:CLUSTER]
    assert read(packed(cluster, compression) + b"\xa5" * 700, compression, skip=skip) == cluster


@pytest.mark.parametrize("compression", list(Compression))
def test_incompressible_clusters_come_out_too(compression: Compression) -> None:
    cluster = random.Random(1).randbytes(CLUSTER)
    raw = packed(cluster, compression)
    assert unpack(raw, CLUSTER, compression) == cluster


@pytest.mark.parametrize("compression", list(Compression))
def test_too_little_data_is_damage(compression: Compression) -> None:
    with pytest.raises(DamagedCluster, match=r"holds 100 bytes instead of 65536|Unknown frame"):
        read(packed(bytes(100), compression), compression)


@pytest.mark.parametrize("compression", list(Compression))
def test_no_more_than_a_cluster_is_ever_made(compression: Compression) -> None:
    bomb = packed(bytes(64 << 20), compression, 9)
    assert read(bomb, compression) == bytes(CLUSTER)


@pytest.mark.parametrize("compression", list(Compression))
def test_noise_is_damage(compression: Compression) -> None:
    with pytest.raises(DamagedCluster, match=f"compressed cluster at 0x0.*{compression.name.lower()}"):
        read(b"\xff" * 900, compression)


def wide(data: bytes, window_log: int, **flags: bool) -> bytes:
    """A zstd frame that does not say how long it is, with a window of so many bytes."""
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, write_content_size=False, **flags)  # type: ignore[arg-type]
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = packer.compress(data) + packer.flush()
    assert zstandard.get_frame_parameters(frame).window_size == 1 << window_log
    return frame


@contextmanager
def memory_bounded(most: int) -> Iterator[None]:
    """So many bytes more than this process has."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[5]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.parametrize("window_log", [23, 24, 27])
@pytest.mark.parametrize("checksum", [False, True])
def test_a_window_larger_than_a_cluster_takes_no_memory(window_log: int, checksum: bool) -> None:
    noise = random.Random(window_log).randbytes(CLUSTER // 2)
    cluster = noise + noise  # whose second half refers as far back as there is anything
    frame = wide(cluster, window_log, write_checksum=checksum)
    assert len(frame) < CLUSTER * 3 // 4
    with memory_bounded(16 << 20):
        assert read(frame, Compression.ZSTD) == cluster


def test_every_frame_of_several_may_have_a_large_window() -> None:
    cluster = random.Random(2).randbytes(CLUSTER)
    skipped = struct.pack("<II", 0x184D2A53, 5) + b"what?"
    parts = [wide(cluster[:1000], 24, write_checksum=True), skipped, wide(cluster[1000:], 27)]
    with memory_bounded(16 << 20):
        assert read(b"".join(parts), Compression.ZSTD) == cluster


def test_a_frame_of_nothing_with_the_largest_window_is_damage() -> None:
    # Magic, a frame header without content size, a window descriptor of 2^31 bytes, one empty last block.
    frame = struct.pack("<IBB", 0xFD2FB528, 0, (31 - 10) << 3) + b"\x01\x00\x00"
    with pytest.raises(DamagedCluster, match="zstd"):
        read(frame, Compression.ZSTD)


@given(noise=st.binary(max_size=64), at=st.integers(0, 60), window_log=st.sampled_from([17, 24]))
def test_a_damaged_frame_gives_a_cluster_or_an_error(noise: bytes, at: int, window_log: int) -> None:
    frame = wide(bytes(CLUSTER), window_log)
    with suppress(DamagedCluster):
        assert len(read(frame[:at] + noise + frame[at + len(noise) :], Compression.ZSTD)) == CLUSTER


def test_data_past_the_end_of_the_file_is_corrupt() -> None:
    with pytest.raises(CorruptImage, match="past the end of the file"):
        read_compressed(MemoryFile(bytes(512)), COMPRESSED | 512, BITS, Compression.ZLIB)  # type: ignore[arg-type]
