"""Headers that QEMU refuses are refused, so that all readers of an image see the same disk."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import blkloom
from blkloom.errors import BlkloomError

from . import qemu
from .attached import attached, read_all, table_of

pytestmark = pytest.mark.usefixtures("qemu_tools")

SIZE = 1 << 20
CLUSTER = 1 << 16
FORMAT, BITMAPS, ENCRYPTION, DATA_FILE = 0xE2792ACA, 0x23852875, 0x0537BE77, 0x44415441

Harm = Callable[[bytearray], None]


def _field(offset: int, form: str, *values: int) -> Harm:
    return lambda data: struct.pack_into(form, data, offset, *values)


def _extensions(*pairs: tuple[int, bytes], autoclear: int = 0) -> Harm:
    """These in place of all there are; the backing file's name moves behind them."""

    def harm(data: bytearray) -> None:
        length = int.from_bytes(data[100:104], "big")
        raw = b"".join(
            struct.pack(">II", kind, len(value)) + value.ljust(-(-len(value) // 8) * 8, b"\0") for kind, value in pairs
        )
        at, size = struct.unpack_from(">QI", data, 8)
        name = bytes(data[at : at + size]) if at else b""
        raw += bytes(8)
        data[length:CLUSTER] = (raw + name).ljust(CLUSTER - length, b"\0")
        if at:
            struct.pack_into(">Q", data, 8, length + len(raw))
        struct.pack_into(">Q", data, 88, autoclear)

    return harm


REFUSED: dict[str, Harm] = {
    "a snapshot table of nothing that is not aligned": _field(64, ">Q", 1),
    "a snapshot table of nothing past all files": _field(64, ">Q", 1 << 63),
    "a refcount table that ends past all files": _field(48, ">Q", (1 << 63) - CLUSTER),
    "extensions that end within a header of their own": _field(8, ">Q", 511),
    "an end of extensions that reaches past their end": _field(112, ">II", 0, 1 << 20),
    "a long name of a format": _extensions((FORMAT, b"raw" + bytes(13))),
    "a bitmaps extension that is short": _extensions((BITMAPS, bytes(8))),
    "a bitmaps extension that is long": _extensions((BITMAPS, bytes(32))),
    "no bitmaps": _extensions((BITMAPS, struct.pack(">IIQQ", 0, 0, 64, CLUSTER)), autoclear=1),
    "bitmaps with reserved bits": _extensions((BITMAPS, struct.pack(">IIQQ", 1, 1, 64, CLUSTER)), autoclear=1),
    "bitmaps without a directory": _extensions((BITMAPS, struct.pack(">IIQQ", 1, 0, 0, CLUSTER)), autoclear=1),
    "bitmaps with a directory not aligned": _extensions((BITMAPS, struct.pack(">IIQQ", 1, 0, 64, 99)), autoclear=1),
    "an encryption header and no encryption": _extensions((ENCRYPTION, bytes(16))),
}
OURS: dict[str, Harm] = {
    "two formats, alike": _extensions((FORMAT, b"raw"), (FORMAT, b"raw")),
    "two formats": _extensions((FORMAT, b"qcow2"), (FORMAT, b"raw")),
    "two data files": _extensions((DATA_FILE, b"one"), (DATA_FILE, b"two")),
    "a backing file's name without a length": _field(16, ">I", 0),
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """With a backing file."""
    base = tmp_path / "base.raw"
    base.write_bytes(b"\5" * SIZE)
    path = tmp_path / "disk.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", path, cwd=tmp_path)
    return path


def _harm(path: Path, harm: Harm) -> None:
    data = bytearray(path.read_bytes())
    harm(data)
    path.write_bytes(data)


def _is_refused(path: Path) -> None:
    for read_only in (True, False):
        with pytest.raises(BlkloomError, match="header: ") as refused:
            blkloom.open(table_of(path, SIZE), read_only=read_only)
        assert str(path) in str(refused.value)


@pytest.mark.parametrize("harm", REFUSED.values(), ids=REFUSED)
def test_a_header_that_qemu_refuses_is_refused(image: Path, harm: Harm) -> None:
    _harm(image, harm)
    with pytest.raises(qemu.QemuError, match=r"can't open|Could not open"):
        qemu.run("qemu-io", "-r", "-f", "qcow2", image, "-c", "read 0 512")
    _is_refused(image)


@pytest.mark.parametrize("harm", OURS.values(), ids=OURS)
def test_a_header_that_readers_understand_differently_is_refused(image: Path, harm: Harm) -> None:
    _harm(image, harm)
    _is_refused(image)


def test_unknown_extensions_may_stand_there_twice(image: Path) -> None:
    _harm(image, _extensions((0x1234, b"one"), (0x1234, b"two"), (FORMAT, b"raw")))
    with attached(image, SIZE) as device:
        device.pwrite(b"w" * 512, 0)
        assert read_all(device) == b"w" * 512 + b"\5" * (SIZE - 512)
    assert b"one" in (header := image.read_bytes()[:CLUSTER])
    assert b"two" in header


@pytest.mark.parametrize(("form", "taken"), [("file", True), ("host_device", False)])
def test_a_drivers_name_as_a_format_holds_for_what_it_drives(image: Path, form: str, taken: bool) -> None:
    _harm(image, _extensions((FORMAT, form.encode())))
    if taken:
        assert qemu.content(image) == b"\5" * SIZE
        with attached(image, SIZE, read_only=True) as device:
            assert read_all(device) == b"\5" * SIZE
    else:
        with pytest.raises(qemu.QemuError, match="block device"):
            qemu.content(image)
        with pytest.raises(BlkloomError, match=f"has the format '{form}'"):
            blkloom.open(table_of(image, SIZE))
