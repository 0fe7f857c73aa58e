"""Maintenance with QEMU's tools while the device is suspended, and the state after the resume."""

from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
from pathlib import Path

import pytest

import blkloom
from blkloom.errors import BlkloomError
from blkloom.image.attachment import Attachment
from blkloom.image.qcow2.state.image import Image
from blkloom.image.qcow2.write.writability import Writability
from blkloom.image.qcow2.write.writer import Writer

from . import qemu
from .attached import attached, first_difference, read_all, table_of
from .shapes import Shape, make
from .slow_image import SlowImage

pytestmark = pytest.mark.usefixtures("qemu_tools")

MIB = 1 << 20


@pytest.mark.parametrize("shape", [Shape(), Shape(cluster_bits=12, lazy=True), Shape(cluster_bits=14, extended=True)])
def test_suspending_leaves_a_clean_image_that_qemu_may_have(tmp_path: Path, shape: Shape) -> None:
    made = make(tmp_path, shape, size=MIB)
    with attached(made.path, made.size) as device:
        device.pwrite(b"x" * 70000, 1000)
        device.suspend()
        checked = qemu.check(made.path)
        assert checked.whole, checked.said
        assert not SlowImage(made.path.read_bytes()).dirty
        wanted = qemu.content(made.path)
        assert wanted[1000:71000] == b"x" * 70000
        qemu.qemu_io(made.path, "write -P 9 128k 64k")
        device.resume()
        assert device.pread(64 << 10, 128 << 10) == b"\x09" * (64 << 10), "what was cached before is still believed"
        with pytest.raises(qemu.QemuError, match="lock"):
            qemu.qemu_io(made.path, "write -P 9 0 64k")


def test_a_resized_image_is_a_larger_device_after_resuming(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12), size=MIB)
    with attached(made.path, made.size) as device:
        device.suspend()
        qemu.qemu_img("resize", made.path, "3M")
        device.resume()
        assert device.size == 3 * MIB
        device.pwrite(b"y" * 4096, 3 * MIB - 4096)
        assert not first_difference(device.pread(MIB, 0), made.content)
    assert qemu.check(made.path).whole
    assert qemu.content(made.path)[-4096:] == b"y" * 4096


def test_what_became_unusable_stays_suspended_until_it_is_mended(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12), size=MIB)
    with attached(made.path, made.size) as device:
        device.suspend()
        good = made.path.read_bytes()
        made.path.write_bytes(b"nothing" + good[7:])
        with pytest.raises((OSError, BlkloomError), match=str(made.path)):
            device.resume()
        assert device.suspended
        made.path.write_bytes(good)
        device.resume()
        assert not first_difference(read_all(device), made.content)


@pytest.mark.parametrize("lock", ["lock=on", "lock=off"])
def test_an_image_replaced_by_another_is_the_other_one_after_resuming(tmp_path: Path, lock: str) -> None:
    made = make(tmp_path, Shape(cluster_bits=12), size=MIB)
    other = tmp_path / "other.qcow2"
    with attached(made.path, made.size, lock) as device:
        device.pwrite(b"x" * 4096, 0)
        device.suspend()
        qemu.qemu_img("convert", "-f", "qcow2", "-O", "qcow2", made.path, other)
        qemu.qemu_io(other, "write -P 7 64k 64k")
        made.path.rename(tmp_path / "former.qcow2")
        with pytest.raises(BlkloomError, match="No such file"):
            device.resume()
        assert device.suspended
        other.rename(made.path)
        device.resume()
        assert device.pread(4096, 0) == b"x" * 4096
        assert device.pread(64 << 10, 64 << 10) == b"\7" * (64 << 10)
        device.pwrite(b"y" * 4096, 0)
        qemu.qemu_io(tmp_path / "former.qcow2", "write -P 8 0 4k")  # no longer used by the device
        device.suspend()
        device.resume()
        assert device.pread(4096, 0) == b"y" * 4096
    assert qemu.check(made.path).whole


def test_a_backing_file_replaced_or_left_while_suspended_is_not_held_any_longer(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, backing="qcow2"), size=MIB, steps=0)
    (base,) = (path for path in tmp_path.iterdir() if path != made.path and path.suffix == ".qcow2")
    again, elsewhere = tmp_path / "again.qcow2", tmp_path / "elsewhere.qcow2"
    with attached(made.path, made.size) as device:
        before = read_all(device)
        device.suspend()
        qemu.qemu_img("convert", "-f", "qcow2", "-O", "qcow2", base, again)
        again.rename(base)
        device.resume()
        assert not first_difference(read_all(device), before)
        with pytest.raises(qemu.QemuError, match="lock"):
            qemu.qemu_io(base, "write -P 9 0 64k")
        device.suspend()
        qemu.qemu_img("convert", "-f", "qcow2", "-O", "qcow2", base, elsewhere)
        qemu.qemu_img("rebase", "-u", "-b", elsewhere, "-F", "qcow2", made.path)
        device.resume()
        qemu.qemu_io(base, "write -P 9 0 64k")
        assert not first_difference(read_all(device), before)


def test_rebasing_committing_and_amending_while_suspended(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, backing="qcow2"), size=MIB)
    flat = tmp_path / "flat.raw"
    flat.write_bytes(made.content)
    with attached(made.path, made.size) as device:
        device.suspend()
        qemu.qemu_img("amend", "-o", "lazy_refcounts=on", made.path)
        qemu.qemu_img("commit", "-q", made.path)
        device.resume()
        assert not first_difference(read_all(device), made.content)
        device.suspend()
        qemu.qemu_img("rebase", "-b", "", made.path)
        device.resume()
        assert not first_difference(read_all(device), made.content)
        device.pwrite(b"z" * 4096, 0)
    assert qemu.check(made.path).whole


def test_what_an_image_does_not_stand_on_any_more_is_let_go_of(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, backing="qcow2"), size=MIB)
    below = Path(json.loads(qemu.qemu_img("info", "--output=json", made.path))["full-backing-filename"])
    with attached(made.path, made.size) as device:
        device.suspend()
        qemu.qemu_img("rebase", "-b", "", made.path)
        device.resume()
        qemu.qemu_io(below, "write -P 9 0 64k")
        assert not first_difference(read_all(device), made.content)


@pytest.mark.parametrize(("step", "flush"), [("flush", True), ("close", True), ("close", False)])
def test_what_could_not_be_written_back_is_still_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, flush: bool
) -> None:
    def full(_writer: Writer) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made = make(tmp_path, Shape(cluster_bits=12), size=MIB, steps=0)
    with attached(made.path, made.size) as device:
        device.pwrite(b"a" * 70000, 1000)
        with monkeypatch.context() as patch:
            patch.setattr(Writer, step, full)
            with pytest.raises(OSError, match="No space"):
                device.suspend(flush=flush)
            assert not device.suspended
        assert device.pread(70000, 1000) == b"a" * 70000
        device.pwrite(b"b" * 4096, MIB - 4096)
        device.suspend()
        assert qemu.check(made.path).whole
        device.resume()
        assert device.pread(70000, 1000) == b"a" * 70000
    assert qemu.content(made.path)[1000:71000] == b"a" * 70000


def test_what_is_written_after_suspending_failed_at_the_last_step_is_announced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, lazy=True), size=MIB, steps=0)
    with attached(made.path, made.size) as device:
        device.pwrite(b"a" * 4096, 0)
        assert SlowImage(made.path.read_bytes()).dirty
        set_header = Writability.set_header

        def half(writability: Writability, **fields: int) -> None:
            set_header(writability, **fields)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr(Writability, "set_header", half)
            with pytest.raises(OSError, match="Input/output"):
                device.suspend()
        device.pwrite(b"b" * 4096, MIB // 2)
        assert SlowImage(made.path.read_bytes()).dirty
    assert qemu.check(made.path).whole
    assert qemu.content(made.path) == b"a" * 4096 + bytes(MIB // 2 - 4096) + b"b" * 4096 + bytes(MIB // 2 - 4096)


def test_memory_is_given_up_with_the_image_and_does_not_wait_for_a_collection(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, compressed=True, bitmap=True), size=MIB)
    gc.collect()
    gc.disable()
    try:
        with attached(made.path, made.size) as device:
            for _ in range(3):
                assert read_all(device)
                device.pwrite(b"x" * 4096, 0)
                device.suspend()
                assert not _alive(Image, Writer, Attachment)
                device.resume()
        assert not _alive(Image, Writer, Attachment)
    finally:
        gc.enable()


def _alive(*kinds: type) -> list[object]:
    return [thing for thing in gc.get_objects() if isinstance(thing, kinds)]


def test_a_snapshot_taken_while_suspended_keeps_its_content(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12), size=MIB)
    with attached(made.path, made.size) as device:
        device.suspend()
        qemu.qemu_img("snapshot", "-c", "before", made.path)
        device.resume()
        for at in range(0, MIB, 5000):
            device.pwrite(at.to_bytes(4, "big") * 300, at) if at + 1200 <= MIB else None
    assert qemu.check(made.path).whole
    assert not first_difference(qemu.content(made.path, snapshot="before"), made.content)


def test_a_dirty_image_is_repaired_when_it_is_opened(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, lazy=True), size=MIB, steps=0)
    # qemu-io ends without closing the image: counts are behind, and the dirty bit says so.
    command = ["qemu-io", "-f", "qcow2", str(made.path), "-c", "write -P 5 0 128k", "-c", "flush", "-c", "abort"]
    subprocess.run(command, capture_output=True, check=False)
    assert SlowImage(made.path.read_bytes()).dirty
    with blkloom.open(table_of(made.path, made.size)) as device:
        assert device.pread(128 << 10, 0) == b"\5" * (128 << 10)
        device.pwrite(b"\6" * 4096, 512 << 10)
    checked = qemu.check(made.path)
    assert checked.whole, checked.said
