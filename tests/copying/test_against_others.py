"""`blkloom copy` beside nbdcopy and qemu-img convert: the same bytes, and holes at the same places."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Copy
from .shapes import SHAPES, data_of, make

Program = Callable[[str, str], str]


@pytest.fixture(params=SHAPES)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A disk of each shape."""
    return make(tmp_path / "disk.img", SHAPES[request.param])


def run(*words: str | Path) -> str:
    """The output of a command that succeeds."""
    return subprocess.run([*map(str, words)], capture_output=True, text=True, check=True).stdout


def test_a_file_is_copied_with_its_size_and_holes(copy: Copy, program: Program, disk: Path, tmp_path: Path) -> None:
    copied, theirs = tmp_path / "copy.img", tmp_path / "theirs.img"
    copy(disk, copied)
    assert copied.read_bytes() == disk.read_bytes()
    run(program("nbdcopy", "libnbd-bin"), disk, theirs)
    assert theirs.read_bytes() == copied.read_bytes()
    assert data_of(copied) == data_of(theirs)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["copy.img", "disk.img", "theirs.img"]


def test_a_made_image_has_what_qemu_img_would_have_put_there(
    copy: Copy, program: Program, disk: Path, tmp_path: Path
) -> None:
    qemu = program("qemu-img", "qemu-utils")
    image, theirs, back = tmp_path / "disk.qcow2", tmp_path / "theirs.qcow2", tmp_path / "back.img"
    copy(disk, image)
    run(qemu, "check", image)
    assert "identical" in run(qemu, "compare", "-f", "raw", "-F", "qcow2", disk, image)
    run(qemu, "convert", "-f", "raw", "-O", "qcow2", disk, theirs)
    infos = [json.loads(run(qemu, "info", "--output=json", path)) for path in (image, theirs)]
    assert infos[0]["virtual-size"] == infos[1]["virtual-size"]
    allocated = [
        [
            (piece["start"], piece["length"])
            for piece in json.loads(run(qemu, "map", "--output=json", path))
            if piece["data"]
        ]
        for path in (image, theirs)
    ]
    assert sum(length for _, length in allocated[0]) == sum(length for _, length in allocated[1])
    copy(image, back)
    size = disk.stat().st_size
    assert back.read_bytes() == disk.read_bytes().ljust(-(-size // 512) * 512, b"\0")


def test_a_target_with_old_contents_has_the_new_ones(copy: Copy, disk: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.img"
    size = disk.stat().st_size
    old.write_bytes(b"\xff" * (size + 5000))
    copy("-n", disk, old)
    assert old.read_bytes() == disk.read_bytes() + b"\xff" * 5000
    copy("--force", "--verify", disk, old)
    assert old.read_bytes() == disk.read_bytes()


@pytest.mark.parametrize("shape", ["data and holes", "zeros in data"])
def test_zeros_take_space_if_that_is_wished(copy: Copy, tmp_path: Path, shape: str) -> None:
    disk = make(tmp_path / "disk.img", SHAPES[shape])
    copy("--allocated", disk, tmp_path / "copy.img")
    assert (tmp_path / "copy.img").read_bytes() == disk.read_bytes()
    assert (tmp_path / "copy.img").stat().st_blocks * 512 >= disk.stat().st_size
    copy("--sparse", "0", disk, tmp_path / "as_it_is.img")
    assert data_of(tmp_path / "as_it_is.img") == data_of(disk)
