"""Sectors, bytes, and parsing of sizes."""

from __future__ import annotations

import pytest

from blkloom.units import DEVICE_LIMIT, SECTOR, Bytes, Sectors, format_size, parse_size, to_bytes, to_sectors


def test_a_sector_is_512_bytes_and_the_limit_is_signed_64_bit() -> None:
    assert SECTOR == 512
    assert DEVICE_LIMIT == 2**63


def test_sectors_become_bytes_and_bytes_whole_sectors() -> None:
    assert to_bytes(Sectors(3)) == 1536
    assert to_sectors(Bytes(1536)) == 3


@pytest.mark.parametrize(("count", "sectors"), [(0, 0), (511, 0), (512, 1), (1023, 1), (2**63 - 1, 2**54 - 1)])
def test_a_sector_that_is_not_whole_does_not_count(count: int, sectors: int) -> None:
    assert to_sectors(Bytes(count)) == sectors


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096b", 4096),
        ("8s", 4096),
        ("64K", 64 << 10),
        ("64k", 64 << 10),
        ("64KiB", 64 << 10),
        ("64KB", 64_000),
        ("10M", 10 << 20),
        ("10MB", 10_000_000),
        ("1.5GiB", 3 << 29),
        ("0.5s", 256),
        (" 2 T ", 2 << 40),
        ("1PB", 10**15),
        ("7E", 7 << 60),
        (str(2**63 - 1), 2**63 - 1),
    ],
)
def test_sizes_are_read_with_the_suffixes_of_losetup(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "M", "-1", "+1", "1e3", "0x10", "1.M", ".5M", "1Q", "1Ki", "1 2", "ten", "1_0"])
def test_what_is_not_a_size_is_refused_with_what_would_be(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write a number with one of K M G"):
        parse_size(text)


@pytest.mark.parametrize("text", [str(2**63), "8E", "8EiB", "9999999999P", "1" * 400 + ".5"])
def test_a_size_no_device_can_have_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="more than a device can hold"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (64 << 20, "64 MiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 50, "1 PiB"),
        (2**63, "8 EiB"),
    ],
)
def test_sizes_are_shown_in_the_largest_unit_that_fits(count: int, text: str) -> None:
    assert format_size(count) == text


@pytest.mark.parametrize("count", [0, 1, 512, 1 << 10, 5 << 20, 3 << 30, 1 << 40, 1 << 62])
def test_a_shown_size_reads_back(count: int) -> None:
    assert parse_size(format_size(count)) == count
