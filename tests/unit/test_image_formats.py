"""Image formats: one file and one line in the registry add a read-only format."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import blkloom
import xor_format
from blkloom.device.open_device import whole_file
from blkloom.errors import BackingError, UsageError
from blkloom.image.registry import FORMATS, FormatEntry, format_of_name
from blkloom.targets.registry import builtin_targets
from qcow2_by_hand import ByHand
from xor_format import image_of

DOCS = Path(__file__).parents[2] / "docs"
DISK = random.Random(5).randbytes(3 * 65536 + 1536)
SECTORS = len(DISK) // 512


@pytest.fixture
def image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An image of `DISK`, in a format of which the registry has a line."""
    monkeypatch.setitem(FORMATS, "xor", FormatEntry("xor_format:Xor", (".xor",)))
    path = tmp_path / "disk.xor"
    path.write_bytes(image_of(DISK))
    return path


def test_a_file_named_like_an_image_of_the_format_is_the_disk_in_it(image: Path) -> None:
    with blkloom.open(image) as device:
        assert device.size == len(DISK)
        assert device.pread(len(DISK), 0) == DISK
        assert device.pread(1024, 65536 - 512) == DISK[65536 - 512 :][:1024]
        device.suspend()
        device.resume()
        assert device.pread(512, len(DISK) - 512) == DISK[-512:]
        with pytest.raises(OSError, match="Read-only file system"):
            device.pwrite(bytes(512), 0)


def test_tables_name_the_format_with_the_options_of_every_image(image: Path) -> None:
    line = f"0 {SECTORS} xor {image} 2 lock=off cache=1048576"
    target = blkloom.parse_table(line, targets=builtin_targets()).segments[0].target
    assert [target.name, *target.format()] == line.split()[2:]
    with blkloom.open(line) as device:
        assert device.pread(4096, 512) == DISK[512:][:4096]
        assert device.contexts == ("qemu:allocation-depth",)
    with pytest.raises(blkloom.TableError, match="unknown option: 'snapshot=x'"):
        blkloom.parse_table(f"0 8 xor {image} 1 snapshot=x", targets=builtin_targets())


def test_images_of_other_formats_stand_on_it(image: Path, tmp_path: Path) -> None:
    above = ByHand(1 << 20, backing=b"disk.xor", backing_format=b"xor")
    above.data(3, b"x" * above.cluster)
    (tmp_path / "top.qcow2").write_bytes(above.build())
    expected = bytearray(DISK.ljust(1 << 20, b"\0"))
    expected[3 * above.cluster : 4 * above.cluster] = b"x" * above.cluster
    with blkloom.open(tmp_path / "top.qcow2", read_only=True) as device:
        assert device.pread(1 << 20, 0) == expected


def test_what_is_wrong_with_an_image_refuses_the_table(image: Path) -> None:
    image.write_bytes(b"no image" * 4096)
    with pytest.raises(BackingError, match="no xor image"):
        blkloom.open(image)


def test_a_name_says_the_format_and_a_format_that_there_is_not_is_refused(tmp_path: Path) -> None:
    assert [format_of_name(name) for name in ("a.QCOW2", "b.qcow", "c.img", "d")] == ["qcow2", "qcow2", "raw", "raw"]
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    with pytest.raises(UsageError, match="no image format is named 'vmdk'"):
        whole_file(path, format="vmdk")


def test_the_documented_example_is_the_one_that_runs() -> None:
    shown = (DOCS / "writing-a-format.md").read_text().split("```python\n")[1].split("```")[0]
    assert shown == Path(xor_format.__file__).read_text()
