"""Images of every kind of the format, made by QEMU's tools.

A `Shape` says which kind. `make` builds an image with clusters in every state (data, zeros plain and allocated,
compressed, discarded, shared with a snapshot), and returns the expected contents of the disk.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hypothesis import strategies as st

from . import qemu

Backing = Literal["", "raw", "qcow2"]
DataFile = Literal["", "cooked", "raw"]
Fit = Literal["same", "shorter", "longer"]


@dataclass(frozen=True)
class Shape:
    """What `qemu-img create` is asked for, and what is put into the image afterwards."""

    version: Literal[2, 3] = 3
    cluster_bits: int = 16
    refcount_bits: int = 16
    extended: bool = False
    data_file: DataFile = ""
    backing: Backing = ""
    backing_fit: Fit = "same"
    compression: Literal["zlib", "zstd"] = "zlib"
    compressed: bool = False
    snapshots: int = 0
    lazy: bool = False
    bitmap: bool = False
    preallocated: bool = False

    @property
    def cluster(self) -> int:
        return 1 << self.cluster_bits

    def options(self, data_file: Path) -> str:
        """For `qemu-img create -o`."""
        found = [f"compat={'0.10' if self.version == 2 else '1.1'}", f"cluster_size={self.cluster}"]
        if self.version == 3:
            found += [f"refcount_bits={self.refcount_bits}", f"extended_l2={'on' if self.extended else 'off'}"]
            found += [f"compression_type={self.compression}", f"lazy_refcounts={'on' if self.lazy else 'off'}"]
        if self.data_file:
            found += [f"data_file={data_file}", f"data_file_raw={'on' if self.data_file == 'raw' else 'off'}"]
        if self.preallocated:
            found.append("preallocation=metadata")
        return ",".join(found)


def possible(shape: Shape) -> bool:
    """Whether the format (and QEMU) has such images at all."""
    if shape.version == 2 and (
        shape.refcount_bits != 16
        or shape.extended
        or shape.data_file
        or shape.lazy
        or shape.bitmap
        or shape.compression != "zlib"
    ):
        return False
    if shape.extended and shape.cluster_bits < 14:
        return False
    if shape.data_file and (shape.compressed or shape.snapshots):
        return False
    if shape.data_file == "raw" and shape.backing:
        return False
    if shape.preallocated and shape.backing and not shape.extended:
        return False
    return not shape.snapshots or _snapshots_fit(shape.refcount_bits, shape.compressed)


def _snapshots_fit(refcount_bits: int, compressed: bool) -> bool:
    """Every snapshot is one more use of a cluster, and compressed ones share clusters."""
    return refcount_bits >= (8 if compressed else 2)


@st.composite
def shapes(draw: st.DrawFn, *, largest_cluster_bits: int = 16) -> Shape:
    """Any possible one, the unusual as likely as the usual."""
    version: Literal[2, 3] = draw(st.sampled_from([3, 3, 3, 2]))
    extended = version == 3 and draw(st.booleans())
    smallest = 14 if extended else 9
    data_file: DataFile = draw(st.sampled_from(["", "", "cooked", "raw"])) if version == 3 else ""
    refcount_bits = draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64])) if version == 3 else 16
    backing: Backing = draw(st.sampled_from(["", "raw", "qcow2"])) if data_file != "raw" else ""
    compressed = not data_file and draw(st.booleans())
    snapshots = not data_file and _snapshots_fit(refcount_bits, compressed)
    return Shape(
        version=version,
        cluster_bits=draw(st.integers(smallest, max(smallest, largest_cluster_bits))),
        refcount_bits=refcount_bits,
        extended=extended,
        data_file=data_file,
        backing=backing,
        backing_fit=draw(st.sampled_from(["same", "shorter", "longer"])) if backing else "same",
        compression=draw(st.sampled_from(["zlib", "zstd"])) if version == 3 else "zlib",
        compressed=compressed,
        snapshots=draw(st.integers(0, 2)) if snapshots else 0,
        lazy=version == 3 and draw(st.booleans()),
        bitmap=version == 3 and draw(st.booleans()),
        preallocated=(not backing or extended) and draw(st.booleans()),
    )


@dataclass
class Made:
    """An image as it lies in its folder. content: what a guest reads. snapshots: the same by name."""

    shape: Shape
    path: Path
    size: int
    content: bytes
    snapshots: dict[str, bytes] = field(default_factory=dict)

    @property
    def data_file(self) -> Path:
        return self.path.with_suffix(".data")


def make(folder: Path, shape: Shape, *, size: int, seed: int = 0, name: str = "disk", steps: int = 6) -> Made:
    """Builds one. size: bytes, a multiple of 512. steps: things QEMU writes before (and between) the
    snapshots; none leaves the image empty. Raises QemuError.
    """
    dice = random.Random(seed)
    path = folder / f"{name}.qcow2"
    words: list[str | Path] = []
    if shape.backing:
        below = _backing(folder, shape, size, dice, name)
        words = ["-b", below, "-F", shape.backing]
    options = shape.options(path.with_suffix(".data"))
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", options, *words, path, str(size))
    made = Made(shape, path, size, b"")
    if shape.bitmap:
        qemu.qemu_img("bitmap", "--add", "-g", "65536", path, "b0")
        qemu.qemu_img("bitmap", "--add", "--disable", path, "off")
    for number in range(shape.snapshots + 1):
        if number:
            qemu.qemu_img("snapshot", "-c", f"s{number}", path)
            made.snapshots[f"s{number}"] = qemu.content(path)
        if steps:
            compressed = _compressed(shape, size, dice, folder, steps) if not number else []
            qemu.qemu_io(path, *compressed, *(_step(shape, size, dice, folder) for _ in range(steps)))
    made.content = qemu.content(path)
    return made


def _backing(folder: Path, shape: Shape, size: int, dice: random.Random, name: str) -> Path:
    """512-byte granular, so that an end inside a cluster of the overlay happens."""
    lengths = {"same": size, "shorter": max(size // 3 // 512, 1) * 512, "longer": size + 3 * 512}
    length = lengths[shape.backing_fit]
    raw = folder / f"{name}-base.raw"
    raw.write_bytes(dice.randbytes(length))
    if shape.backing == "raw":
        return raw
    path = folder / f"{name}-base.qcow2"
    qemu.qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", raw, path)
    raw.unlink()
    qemu.qemu_io(path, f"write -z 0 {min(length, 8192)}")
    return path


def _compressed(shape: Shape, size: int, dice: random.Random, folder: Path, most: int) -> list[str]:
    """Commands for qemu-io, which writes compressed clusters only where nothing is yet."""
    if not shape.compressed or shape.preallocated:
        return []
    clusters = range((size + shape.cluster - 1) // shape.cluster)
    chosen = dice.sample(clusters, min(most, len(clusters)))
    return [
        f"write -c -s {_pattern(folder, dice, packable=True)} {at} {min(shape.cluster, size - at)}"
        for at in (number * shape.cluster for number in chosen)
    ]


def _step(shape: Shape, size: int, dice: random.Random, folder: Path) -> str:
    """One command for qemu-io."""
    kind = dice.choice(["write", "write", "unaligned", "zero", "unmap", "discard"])
    clusters = max(size // shape.cluster, 1)
    first = dice.randrange(clusters)
    start = first * shape.cluster
    length = min(dice.randint(1, 4) * shape.cluster, size - start)
    if kind in ("write", "unaligned"):
        if kind == "unaligned":
            start = dice.randrange(size // 512) * 512
            length = min(dice.randint(1, max(2 * shape.cluster // 512, 1)) * 512, size - start)
        return f"write -s {_pattern(folder, dice)} {start} {length}"
    if kind == "discard":
        return f"discard {start} {length}"
    return f"write -z {'-u ' if kind == 'unmap' else ''}{start} {length}"


def _pattern(folder: Path, dice: random.Random, *, packable: bool = False) -> Path:
    """A file of bytes that qemu-io repeats over what it writes; an odd length, so that no two clusters are equal."""
    path = folder / f"pattern-{dice.randrange(1 << 32):08x}"
    data = dice.randbytes(dice.choice([509, 1021, 65521]))
    path.write_bytes(bytes(byte & 3 for byte in data) if packable else data)
    return path
