"""Program: reads and writes a block device or an NBD export, and prints what each operation does.

    device_io.py /dev/mapper/NAME|nbd+unix://... "read SECTOR COUNT" "write SECTOR COUNT VALUE" flush ...

A read prints a checksum of the data, a failed operation the name of its error. Blocks of a write have the same bytes.
For the system's Python, which has libnbd's module.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import sys

SECTOR = 512


class BlockDevice:
    """Past the page cache."""

    def __init__(self, path: str) -> None:
        self._device = os.open(path, os.O_RDWR | os.O_DIRECT)

    def read(self, offset: int, size: int) -> bytes:
        """Raises OSError."""
        with mmap.mmap(-1, size) as memory:
            os.preadv(self._device, [memory], offset)
            return bytes(memory)

    def write(self, offset: int, data: bytes) -> None:
        """Raises OSError."""
        with mmap.mmap(-1, len(data)) as memory:
            memory[:] = data
            os.pwritev(self._device, [memory], offset)

    def flush(self) -> None:
        """Raises OSError."""
        os.fsync(self._device)


class Export:
    """Over NBD."""

    def __init__(self, uri: str) -> None:
        import nbd

        self._error = nbd.Error
        self._export = nbd.NBD()
        self._export.connect_uri(uri)

    def read(self, offset: int, size: int) -> bytes:
        """Raises OSError."""
        try:
            return bytes(self._export.pread(size, offset))
        except self._error as error:
            raise OSError(error.errnum, error.string) from error

    def write(self, offset: int, data: bytes) -> None:
        """Raises OSError."""
        try:
            self._export.pwrite(data, offset)
        except self._error as error:
            raise OSError(error.errnum, error.string) from error

    def flush(self) -> None:
        """Raises OSError."""
        try:
            self._export.flush()
        except self._error as error:
            raise OSError(error.errnum, error.string) from error


def main(place: str, operations: list[str]) -> None:
    """Does one after the other, whatever fails."""
    device = Export(place) if place.startswith("nbd") else BlockDevice(place)
    for text in operations:
        name, *numbers = text.split()
        try:
            answer = _do(device, name, [int(number) for number in numbers])
        except OSError as error:
            answer = errno.errorcode[error.errno or 0]
        print(f"{text}: {answer}")


def _do(device: BlockDevice | Export, name: str, numbers: list[int]) -> str:
    if name == "flush":
        device.flush()
        return "done"
    sector, count, *value = numbers
    if name == "read":
        return hashlib.sha256(device.read(sector * SECTOR, count * SECTOR)).hexdigest()[:16]
    device.write(sector * SECTOR, bytes(value) * (count * SECTOR))
    return "done"


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
