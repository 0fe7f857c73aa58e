"""Untrusted images give a clear error or correct bytes. See `hostile`."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blkloom
from blkloom import Device
from blkloom.errors import BackingError

from . import qemu
from .attached import attached, first_difference, read_all, table_of
from .hostile import examine
from .make_corpus import stored, unharmed
from .mutations import NAMES, mutate
from .shapes import Shape, make
from .slow_image import CORRUPT, SlowImage

pytestmark = pytest.mark.usefixtures("qemu_tools")

CORPUS = stored()
WHOLE = unharmed()


def test_the_corpus_is_there() -> None:
    assert {name.split("_")[0] for name in CORPUS} == {"refused", "broken", "reads"}


@pytest.mark.parametrize("name", CORPUS)
def test_a_stored_image_is_met_as_its_name_says(tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(CORPUS[name])
    found = examine(path, writable=False)
    assert path.read_bytes() == CORPUS[name], "reading wrote to the image"
    manner = name.split("_", maxsplit=1)[0]
    assert bool(found.refused) == (manner == "refused"), found.refused
    if manner == "refused":
        assert found.refused.startswith(str(path)) or str(path) in found.refused, "the error does not say which file"
    else:
        assert (found.content is not None) == (manner == "reads")
    if found.content is not None:
        try:
            theirs = qemu.content(path)
        except qemu.QemuError:
            return  # QEMU is stricter with broken bitmaps and the like
        assert not first_difference(found.content, theirs)


@pytest.mark.parametrize("name", CORPUS)
def test_a_stored_image_is_borne_when_written_to(tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(CORPUS[name])
    examine(path, writable=True)


@settings(deadline=None)
@given(name=st.sampled_from(sorted(WHOLE)), seed=st.integers(0, 1 << 48), writable=st.booleans())
def test_a_mutated_image_is_borne(name: str, seed: int, writable: bool) -> None:
    data, what = mutate(WHOLE[name], random.Random(seed))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disk.qcow2"
        path.write_bytes(data)
        found = examine(path, writable=writable)
        if writable:
            return
        assert path.read_bytes() == data, "reading wrote to the image"
        if found.content:
            try:
                theirs = qemu.content(path)
            except qemu.QemuError:
                return
            assert not first_difference(found.content, theirs), what


# The path policy


@pytest.mark.parametrize("name", [name for name in NAMES if name.strip(b"\0.") and b"\0" not in name])
def test_a_data_file_with_a_name_of_the_images_choice_is_not_opened(tmp_path: Path, name: bytes) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, data_file="cooked"), size=64 << 10)
    old = str(made.data_file).encode()
    data = made.path.read_bytes()
    made.path.write_bytes(_renamed(data, old, name))
    found = examine(made.path, writable=False)
    assert found.refused


def _renamed(data: bytes, old: bytes, new: bytes) -> bytes:
    """The data file's name in its extension, which may become longer or shorter."""
    at = data.index(old) - 8
    end = at + 8 + (len(old) + 7) // 8 * 8
    rest = data[end:4096]
    extension = data[at : at + 4] + len(new).to_bytes(4, "big") + new.ljust((len(new) + 7) // 8 * 8, b"\0")
    return (data[:at] + extension + rest)[:4096].ljust(4096, b"\0") + data[4096:]


def test_a_refused_backing_file_says_how_to_allow_it_and_is_opened_when_allowed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "images", tmp_path / "elsewhere"
    inside.mkdir()
    outside.mkdir()
    made = make(outside, Shape(), size=64 << 10, name="base")
    path = inside / "disk.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", made.path, "-F", "qcow2", path)
    with pytest.raises(BackingError, match="allow") as refused:
        blkloom.open(table_of(path, 64 << 10))
    assert str(made.path) in str(refused.value)
    with attached(path, 64 << 10, f"allow_backing={outside}", read_only=True) as device:
        assert read_all(device) == made.content


def test_a_link_inside_the_folder_leads_outside_and_is_refused(tmp_path: Path) -> None:
    inside, outside = tmp_path / "images", tmp_path / "elsewhere"
    inside.mkdir()
    outside.mkdir()
    made = make(outside, Shape(), size=64 << 10, name="base")
    (inside / "base.qcow2").symlink_to(made.path)
    path = inside / "disk.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", path, cwd=inside)
    with pytest.raises(BackingError, match="allow"):
        blkloom.open(table_of(path, 64 << 10), read_only=True)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_circle_of_backing_files_is_found(tmp_path: Path, length: int) -> None:
    paths = [tmp_path / f"image{number}.qcow2" for number in range(length)]
    for path in paths:
        qemu.qemu_img("create", "-q", "-f", "qcow2", path, "64K")
    for number, path in enumerate(paths):
        below = paths[(number + 1) % length].name
        qemu.qemu_img("rebase", "-u", "-b", below, "-F", "qcow2", path)
    with pytest.raises(BackingError, match=r"itself|loop|circle"):
        blkloom.open(table_of(paths[0], 64 << 10), read_only=True)


def test_an_image_that_is_its_own_data_file_is_refused(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12, data_file="cooked"), size=64 << 10)
    made.path.write_bytes(_renamed(made.path.read_bytes(), str(made.data_file).encode(), b"disk.qcow2"))
    assert examine(made.path, writable=True).refused


def test_a_chain_of_many_thousands_is_refused_or_read_but_not_recursed_into(tmp_path: Path) -> None:
    first = tmp_path / "image0.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", first, "64K")
    qemu.qemu_io(first, "write -P 7 0 64K")
    template = tmp_path / "image1.qcow2"
    qemu.qemu_img(
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=512",
        "-b",
        "image0000.qcow2",
        "-F",
        "qcow2",
        "-u",
        template,
        "64K",
    )
    data = template.read_bytes()
    first.rename(tmp_path / "image0000.qcow2")
    count = 1500
    for number in range(1, count):
        name = f"image{number - 1:04}.qcow2".encode()
        (tmp_path / f"image{number:04}.qcow2").write_bytes(data.replace(b"image0000.qcow2", name))
    found = examine(tmp_path / f"image{count - 1:04}.qcow2", writable=False)
    assert found.refused or found.content == b"\7" * (64 << 10)


# Sizes


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ("cluster_size=2M", "2E"),
        ("cluster_size=2M,extended_l2=on", "1E"),
        ("cluster_size=64k", "2P"),
        ("cluster_size=64k,extended_l2=on", "1P"),
        ("cluster_size=512", "128G"),
    ],
)
def test_the_largest_disks_take_little_memory(tmp_path: Path, options: str, size: str) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, size)
    found = examine(path, writable=True)
    assert not found.refused
    checked = qemu.check(path)
    assert checked.whole, checked.said


# Metadata found wrong while writing


def test_writing_where_metadata_overlaps_marks_the_image_corrupt_and_harms_nothing(tmp_path: Path) -> None:
    made = make(tmp_path, Shape(cluster_bits=12), size=1 << 20, steps=0)
    qemu.qemu_io(made.path, "write -P 1 0 64k")
    data = bytearray(made.path.read_bytes())
    image = SlowImage(bytes(data))
    block = int.from_bytes(image.bytes_at(image.table_offset, 8), "big")
    data[block : block + image.cluster] = bytes(image.cluster)  # as if all clusters were free
    made.path.write_bytes(data)
    with attached(made.path, made.size) as device:
        assert _fails(device), "the error was not noticed"
        assert device.pread(64 << 10, 0) == b"\1" * (64 << 10)
    after = SlowImage(made.path.read_bytes())
    assert after.incompatible & CORRUPT, "the corrupt bit is not set"
    assert after.content()[: 64 << 10] == b"\1" * (64 << 10)


def _fails(device: Device) -> bool:
    """Whether writing where nothing is yet fails sooner or later."""
    try:
        for at in range(64 << 10, device.size, 4096):
            device.pwrite(b"\2" * 4096, at)
        device.flush()
    except OSError:
        return True
    return False
