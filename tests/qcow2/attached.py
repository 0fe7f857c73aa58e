"""Images as devices of this process, and test operations that are also applied to a bytearray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import blkloom
from blkloom import Device

SECTOR = 512


def table_of(path: Path, size: int, *options: str) -> str:
    """A table that serves the first `size` bytes of the image."""
    count = [str(len(options)), *options] if options else []
    return " ".join(["0", str(size // SECTOR), "qcow2", str(path), *count])


@contextmanager
def attached(path: Path, size: int, *options: str, read_only: bool = False) -> Iterator[Device]:
    with blkloom.open(table_of(path, size, *options), read_only=read_only) as device:
        yield device


def await_check(device: Device) -> None:
    """Returns when the background check of its image has ended."""
    while "checking=1" in device.status()[0][3]:
        pass


def read_all(device: Device, piece: int = 1 << 20) -> bytes:
    """The whole device."""
    size = device.size
    return b"".join(device.pread(min(piece, size - at), at) for at in range(0, size, piece))


def first_difference(found: bytes, wanted: bytes) -> str:
    """Where, and what is there, for a message a person can use."""
    if len(found) != len(wanted):
        return f"{len(found)} bytes instead of {len(wanted)}"
    pieces = range(0, len(found), SECTOR)
    at = next((at for at in pieces if found[at : at + SECTOR] != wanted[at : at + SECTOR]), None)
    if at is None:
        return ""
    return f"sector at {at:#x}: {found[at : at + 16].hex()} instead of {wanted[at : at + 16].hex()}"


def sparse_copy(source: Path, target: Path) -> Path:
    """A copy with the holes of the original."""
    with source.open("rb") as old, target.open("wb") as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        at = 0
        while at < size:
            try:
                at = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(old.fileno(), at, os.SEEK_HOLE)
            os.copy_file_range(old.fileno(), new.fileno(), end - at, at, at)
            at = end
    return target
