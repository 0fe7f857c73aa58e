"""QCOW2 images for measurements: made with QEMU's tools, on tmpfs by default, and removed at the end of the session.

Every session gets a new image, made in the same way, so that no contender benefits from clusters that another one has
allocated, and no cache has it. The data is that of the run's file on tmpfs. Source: qemu-img(1).
"""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from ground import Ground

Compression = Literal["", "zlib", "zstd"]
_PIECE: Final = 64 << 10

_CLUSTER: Final = 64 << 10
_PER_TABLE: Final = _CLUSTER // 8
_SHARED: Final = 4096
"""Host clusters."""
_STRIDE: Final = 2731
"""Odd, so that neighbours of the guest's are none on the host, and all are used."""
_COPIED: Final = np.uint64(1 << 63)


@dataclass(frozen=True)
class Qcow2Image:
    """Parameters of an image. size: bytes of the disk; 0 for the size of the run's files. filled: every cluster has
    data from the start. layers: number of backing images; all are empty except the lowest, which has all data. shared:
    every cluster is allocated, and many share their host cluster, so that a disk of any size has all of its metadata
    and little data. compression: of every cluster. raw: a raw file with the same data instead of an image. on_disk: on
    the machine's disk, after all pending writes to it.
    """

    size: int = 0
    filled: bool = False
    layers: int = 0
    shared: bool = False
    compression: Compression = ""
    raw: bool = False
    on_disk: bool = False

    def sized(self, ground: Ground) -> Ground:
        """The ground with the image's size in place of its own."""
        found = copy(ground)
        found.size = self.size or ground.size
        return found

    @contextmanager
    def made(self, ground: Ground) -> Iterator[Path]:
        """The path of a new one. ground: as `sized` gave it. Raises GroundError, OSError."""
        source = ground.tmpfs_file()
        place = ground.disk_folder() if self.on_disk else ground.quick_folder()
        with tempfile.TemporaryDirectory(prefix="blkloom-bench-", dir=place) as folder:
            path = Path(folder) / ("disk.raw" if self.raw else "disk.qcow2")
            if self.compression:
                source = _compressible(Path(folder) / "source.raw", ground.size)
                options = f"compression_type={self.compression}"
                _qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, str(source), str(path))
                source.unlink()
            elif self.filled:
                _copy(source, path, ground.size, "raw" if self.raw else "qcow2")
            elif self.layers:
                self._chain(Path(folder), source, path, ground.size)
            elif self.raw:
                with path.open("xb") as file:
                    file.truncate(ground.size)
            elif self.shared:
                _shared(source, path, ground.size)
            else:
                _qemu_img("create", "-f", "qcow2", str(path), str(ground.size))
            if self.on_disk:
                os.sync()
            yield path

    def _chain(self, folder: Path, source: Path, path: Path, size: int) -> None:
        below = folder / "layer0.qcow2"
        _copy(source, below, size, "qcow2")
        for number in range(1, self.layers + 1):
            above = path if number == self.layers else folder / f"layer{number}.qcow2"
            _qemu_img("create", "-f", "qcow2", "-b", str(below), "-F", "qcow2", str(above))
            below = above


def _copy(source: Path, path: Path, size: int, form: Literal["qcow2", "raw"]) -> None:
    """Copy the first `size` bytes of a file to an image with all clusters allocated in order."""
    words = f"driver=raw,size={size},file.driver=file,file.filename={source}"
    _qemu_img("convert", "--image-opts", "-S", "0", "-O", form, words, str(path))


def _shared(source: Path, path: Path, size: int) -> None:
    """Make an image in which guest cluster g has the contents of host cluster g * _STRIDE modulo _SHARED. The refcounts
    count the references, as if snapshots shared the clusters. No tool makes such an image, so this function writes its
    parts; `qemu-img check` finds no errors. Source: QEMU docs/interop/qcow2. size: of the disk, a multiple of the range
    of an L2 table.
    """
    tables = size // _CLUSTER // _PER_TABLE
    first_table, first_data = 4, 4 + tables  # header, refcount table, refcount block, L1 table (of one cluster)
    counts = np.zeros(_CLUSTER // 2, ">u2")
    counts[: first_data + _SHARED] = 1
    counts[first_data : first_data + _SHARED] = tables * _PER_TABLE // _SHARED
    l1 = (np.arange(first_table, first_data, dtype=np.uint64) * _CLUSTER | _COPIED).astype(">u8")
    hosts = first_data + np.arange(_PER_TABLE, dtype=np.uint64) * _STRIDE % _SHARED
    l2 = (hosts * _CLUSTER).astype(">u8").tobytes()
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        *(b"QFI\xfb", 3, 0, 0, _CLUSTER.bit_length() - 1, size, 0),
        *(tables, 3 * _CLUSTER, _CLUSTER, 1, 0, 0, 0, 0, 0, 4, 104),
    )
    with path.open("xb") as file, source.open("rb") as data:
        for number, part in enumerate((header, struct.pack(">Q", 2 * _CLUSTER), counts.tobytes(), l1.tobytes())):
            file.seek(number * _CLUSTER)
            file.write(part)
        file.seek(first_table * _CLUSTER)
        for _ in range(tables):
            file.write(l2)
        for _ in range(_SHARED):
            file.write(data.read(_CLUSTER))


def _compressible(path: Path, size: int) -> Path:
    """Data that compresses to about half: each page is half random, half zeros."""
    page = 4096
    with path.open("xb", buffering=0) as file:
        for _ in range(0, size, _PIECE):
            file.write(b"".join(os.urandom(page // 2) + bytes(page // 2) for _ in range(_PIECE // page)))
    return path


def _qemu_img(verb: str, *words: str) -> None:
    command = ["qemu-img", verb, "-q", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
