"""Units are types: sectors and bytes never mix as bare integers inside blkloom.

`Sectors` and `Bytes` are ints that only add to and compare with their own kind as far as mypy is
concerned (NewType); the functions here are the only crossings. `parse_size` and `format_size`
speak losetup's and dmsetup's suffixes. Source: dmsetup(8), losetup(8) "K/KiB, KB".
"""

from __future__ import annotations

import re
from typing import Final, NewType

Sectors = NewType("Sectors", int)
"""A count or a position in units of 512 bytes, the unit of every table."""

Bytes = NewType("Bytes", int)
"""A count or a position in bytes."""

SECTOR: Final = 512
DEVICE_LIMIT: Final = Bytes(1 << 63)
"""No device may reach this many bytes (offsets are signed 64-bit everywhere below)."""

_SUFFIXES: Final = {
    "": 1,
    "b": 1,
    "s": SECTOR,
    **{f"{letter}{tail}": 1024**power for power, letter in enumerate("kmgtpe", 1) for tail in ("", "ib")},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgtpe", 1)},
}


def to_bytes(count: Sectors) -> Bytes:
    """Sectors as bytes."""
    return Bytes(count * SECTOR)


def to_sectors(count: Bytes) -> Sectors:
    """Whole sectors in `count` bytes, rounded down (as the loop driver floors a file's size)."""
    return Sectors(count // SECTOR)


def round_up_to_sector(count: Bytes) -> Bytes:
    """The next whole number of sectors, in bytes."""
    return Bytes(-(-count // SECTOR) * SECTOR)


def parse_size(text: str) -> Bytes:
    """`"64M"`, `"1.5GiB"`, `"10MB"`, `"8s"` (sectors) or plain bytes as a number of bytes.

    Raises ValueError naming the text and the suffixes understood.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if not match or match[2].lower() not in _SUFFIXES:
        raise ValueError(
            f"'{text}' is not a size; write a number with one of K M G T P E (1024), KB MB GB ... (1000) or s (sectors)"
        )
    value = (
        float(match[1]) * _SUFFIXES[match[2].lower()]
        if "." in match[1]
        else int(match[1]) * _SUFFIXES[match[2].lower()]
    )
    if value >= DEVICE_LIMIT:
        raise ValueError(f"'{text}' is more than a device can hold (2^63 bytes)")
    return Bytes(int(value))


def format_size(count: int) -> str:
    """A person's form of a byte count: `"64 MiB"`, `"1.5 GiB"`, `"512 B"`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} EiB"
