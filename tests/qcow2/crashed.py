"""What must be true of an image after a crash, by the slow model; kinds of images that are crashed."""

from __future__ import annotations

from . import qemu
from .attached import attached, first_difference, read_all
from .recording import REDO_LOG, SECTOR
from .shapes import Made, Shape
from .slow_image import SlowImage
from .workload import Promise, redo_log_of

AUTO, IN_USE = 2, 1
"""Flags of bitmaps."""

SHAPES = {
    "plain": Shape(cluster_bits=12),
    "tiny clusters, wide counts": Shape(cluster_bits=9, refcount_bits=64),
    "tiny clusters, one bit": Shape(cluster_bits=9, refcount_bits=1),
    "v2": Shape(version=2, cluster_bits=10),
    "snapshots": Shape(cluster_bits=10, snapshots=2),
    "snapshots, tiny": Shape(cluster_bits=9, snapshots=1, refcount_bits=8),
    "compressed": Shape(cluster_bits=12, compressed=True, snapshots=1),
    "extended": Shape(cluster_bits=14, extended=True),
    "extended, backed, snapshot": Shape(cluster_bits=14, extended=True, backing="raw", snapshots=1),
    "backed": Shape(cluster_bits=12, backing="qcow2", backing_fit="shorter"),
    "data file": Shape(cluster_bits=12, data_file="cooked"),
    "raw data file": Shape(cluster_bits=12, data_file="raw"),
    "lazy": Shape(cluster_bits=12, lazy=True),
    "lazy, tiny, snapshot": Shape(cluster_bits=9, lazy=True, snapshots=1),
    "bitmap": Shape(cluster_bits=12, bitmap=True),
    "bitmap, snapshot, lazy": Shape(cluster_bits=10, bitmap=True, snapshots=1, lazy=True),
    "data file, extended, backed, lazy": Shape(
        cluster_bits=14, data_file="cooked", extended=True, backing="raw", lazy=True
    ),
    "extended, compressed, lazy": Shape(
        cluster_bits=14, extended=True, compressed=True, compression="zstd", lazy=True, snapshots=1
    ),
    "v2, backed, snapshot": Shape(version=2, cluster_bits=10, backing="raw", snapshots=1),
}


def check(
    files: dict[str, bytes],
    below: bytes,
    before: list[bytes],
    promise: Promise,
    allowed: list[frozenset[bytes]],
    where: str,
) -> SlowImage:
    """The image of these files, which must be consistent. below: contents of the backing image. before: sectors at the
    beginning. allowed: what each sector may hold now.
    """
    image = SlowImage(files["image"], data_file=files.get("data"), backing=below)
    found = image.check()
    assert not found.corruptions, f"{where}: {found.corruptions[:3]}"
    assert not found.shared, f"{where}: {found.shared[:3]}"
    content = image.content()
    for number, values in enumerate(allowed):
        piece = content[number * SECTOR : (number + 1) * SECTOR]
        assert piece in values, (
            f"{where}: sector {number:#x} is {piece[:8].hex()}, and may be {sorted(v[:8].hex() for v in values)}"
        )
    assert {snapshot.name for snapshot in image.snapshots()} == promise.snapshots.keys(), where
    for snapshot in image.snapshots():
        difference = first_difference(image.content(snapshot), promise.snapshots[snapshot.name])
        assert not difference, f"{where}: snapshot {snapshot.name!r}: {difference}"
    for bitmap in image.bitmaps():
        if bitmap.flags & AUTO and not bitmap.flags & IN_USE and image.autoclear & 1:
            dirty = image.dirty_ranges(bitmap)
            per = (1 << bitmap.granularity) // SECTOR
            missed = [n for n in promise.changed if before[n] not in allowed[n] and not dirty[n // per]]
            assert not missed, f"{where}: bitmap {bitmap.name!r} does not know of sectors {missed[:5]}"
    return image


def below_of(made: Made) -> bytes:
    """What a guest reads of the backing image."""
    for path in made.path.parent.glob("disk-base.*"):
        return path.read_bytes() if path.suffix == ".raw" else qemu.content(path)
    return b""


def show_others(
    made: Made,
    files: dict[str, bytes],
    image: SlowImage,
    where: str,
    killed: dict[str, bytes] | None = None,
) -> None:
    """QEMU and we ourselves must find the same in the crashed image as the slow model. killed: the files before the
    replay of a redo log, which gives `files`.
    """
    kept = {path: path.read_bytes() for path in [made.path, made.data_file] if path.exists()}
    made.path.write_bytes(files["image"])
    if "data" in files:
        made.data_file.write_bytes(files["data"])
    try:
        content = image.content()
        if image.dirty:
            found = qemu.check(made.path, repair="all")
        else:
            found = qemu.check(made.path)
            assert not found.corruptions, f"{where}: {found.said}"
        assert not found.errors, f"{where}: {found.said}"
        assert qemu.content(made.path) == content, where
        opened = killed or files
        made.path.write_bytes(opened["image"])
        if "data" in files:
            made.data_file.write_bytes(opened["data"])
        with redo_log_of(opened[REDO_LOG] if killed else b""), attached(made.path, made.size) as device:
            assert read_all(device) == content, f"{where}: we read something else"
            device.pwrite(b"\xee" * 4096, made.size // 2 // SECTOR * SECTOR)
        after = qemu.check(made.path)
        assert not after.corruptions, f"{where}, written to after it: {after.said}"
        assert not after.errors, f"{where}, written to after it: {after.said}"
        if image.dirty:
            assert not after.leaks, f"{where}: a dirty image was not put right: {after.said}"
    finally:
        for path, data in kept.items():
            path.write_bytes(data)
