"""Names in images that are reached through symbolic links refer to the same files as in QEMU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import blkloom
from blkloom.errors import BackingError

from . import qemu
from .attached import attached, read_all, table_of

pytestmark = pytest.mark.usefixtures("qemu_tools")

SIZE = 128 << 10


@pytest.fixture
def linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """vm/disk.qcow2 leads to store/image.qcow2, and beside both there is a base.qcow2 that is another one: that of vm a
    link too, to deep/base.qcow2, and beside all of them is a root.raw.
    """
    for folder in ("vm", "store", "deep"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "root.raw").write_bytes(folder.encode().ljust(SIZE, b"."))
    for folder in ("store", "deep"):
        options = ("-b", "root.raw", "-F", "raw")
        qemu.qemu_img("create", "-q", "-f", "qcow2", *options, "base.qcow2", cwd=tmp_path / folder)
        qemu.qemu_io(tmp_path / folder / "base.qcow2", f"write -P {ord(folder[0])} 64k 64k")
    options = ("-b", "base.qcow2", "-F", "qcow2")
    qemu.qemu_img("create", "-q", "-f", "qcow2", *options, "image.qcow2", cwd=tmp_path / "store")
    (tmp_path / "vm" / "disk.qcow2").symlink_to("../store/image.qcow2")
    (tmp_path / "vm" / "base.qcow2").symlink_to("../deep/base.qcow2")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["{}/vm/disk.qcow2", "vm/disk.qcow2", "store/../vm/disk.qcow2", "disk.qcow2"])
def test_relative_names_begin_beside_the_names_that_images_were_reached_by(
    linked: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "/" not in name:
        monkeypatch.chdir(linked / "vm")
    path = Path(name.format(linked))
    theirs = qemu.content(path)
    assert (theirs[:2], theirs[-1:]) == (b"vm", b"d")
    with attached(path, SIZE, f"allow_backing={linked}", read_only=True) as device:
        assert read_all(device) == theirs
        device.suspend()
        device.resume()
        assert read_all(device) == theirs


def test_the_image_by_its_own_name_has_its_own_neighbours(linked: Path) -> None:
    path = linked / "store" / "image.qcow2"
    theirs = qemu.content(path)
    assert theirs.startswith(b"store")
    with attached(path, SIZE, read_only=True) as device:
        assert read_all(device) == theirs


def test_what_lies_beside_the_link_is_judged_like_anything_else(linked: Path) -> None:
    with pytest.raises(BackingError, match=f"is {linked}/deep/base.qcow2, outside .*allow_backing={linked}/deep "):
        blkloom.open(table_of(linked / "vm" / "disk.qcow2", SIZE), read_only=True)
    os.unlink(linked / "vm" / "base.qcow2")
    with pytest.raises(BackingError, match=f"'base.qcow2' was looked for at '{linked}/vm/base.qcow2'"):
        blkloom.open(table_of(linked / "vm" / "disk.qcow2", SIZE), read_only=True)


def test_a_relative_data_file_lies_beside_the_name_of_its_image_and_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    options = ("-o", "data_file=data.raw")
    qemu.qemu_img("create", "-q", "-f", "qcow2", *options, "disk.qcow2", str(SIZE), cwd=folder)
    qemu.run("qemu-io", "-f", "qcow2", "disk.qcow2", "-c", "write -P 7 0 128k", cwd=folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(qemu.QemuError, match=r"data\.raw"):  # QEMU looks in the directory where it runs
        qemu.content(Path("images/disk.qcow2"))
    with attached(Path("images/disk.qcow2"), SIZE, read_only=True) as device:
        assert read_all(device) == b"\7" * SIZE
    (folder / "data.raw").rename(tmp_path / "data.raw")
    with pytest.raises(BackingError, match=f"looked for at '{folder}/data.raw': No such file") as refused:
        blkloom.open(table_of(Path("images/disk.qcow2"), SIZE), read_only=True)
    assert "qemu-img amend -o data_file=/" in refused.value.cure
    qemu.qemu_img("amend", "-o", f"data_file={tmp_path}/data.raw", "images/disk.qcow2")
    with attached(Path("images/disk.qcow2"), SIZE, f"allow_backing={tmp_path}", read_only=True) as device:
        assert read_all(device) == b"\7" * SIZE
