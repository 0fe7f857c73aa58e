"""Images of every kind that QEMU wrote: read completely, in pieces, and their snapshots."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from . import qemu
from .attached import attached, first_difference, read_all
from .shapes import Shape, make, shapes
from .slow_image import SlowImage

pytestmark = pytest.mark.usefixtures("qemu_tools")

SIZES = st.sampled_from([64 << 10, 300 * 512, 1 << 20, (1 << 20) + 512])


@settings(max_examples=settings().max_examples // 2, deadline=None)
@given(shape=shapes(), size=SIZES, seed=st.integers(0, 1 << 16))
def test_every_kind_of_image_reads_as_qemu_reads_it(shape: Shape, size: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = make(Path(folder), shape, size=size, seed=seed)
        before = made.path.read_bytes()
        with attached(made.path, size, read_only=True) as device:
            assert not first_difference(read_all(device), made.content)
            assert not first_difference(read_all(device, 3 * 512), made.content), "in small pieces, a second time"
        for name, content in made.snapshots.items():
            with attached(made.path, len(content), f"snapshot={name}", read_only=True) as device:
                assert not first_difference(read_all(device), content), name
        assert made.path.read_bytes() == before, "reading wrote to the image"


@settings(max_examples=settings().max_examples // 4, deadline=None)
@given(shape=shapes(), seed=st.integers(0, 1 << 16))
def test_attaching_for_writing_and_writing_nothing_changes_no_byte(shape: Shape, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = make(Path(folder), shape, size=300 * 512, seed=seed)
        before = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        with attached(made.path, made.size) as device:
            assert not first_difference(read_all(device), made.content)
            device.flush()
            device.suspend()
            device.resume()
            assert not first_difference(read_all(device), made.content)
        assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == before


def test_a_segment_may_be_a_part_of_the_image_and_lie_anywhere_in_the_table(tmp_path: Path) -> None:
    import blkloom

    made = make(tmp_path, Shape(cluster_bits=12), size=256 << 10, seed=3)
    table = f"0 8 zero\n8 100 qcow2 {made.path}\n108 4 zero\n"
    with blkloom.open(table, read_only=True) as device:
        assert read_all(device) == bytes(4096) + made.content[: 100 * 512] + bytes(2048)


def test_a_table_longer_than_the_image_is_refused(tmp_path: Path) -> None:
    import blkloom

    made = make(tmp_path, Shape(), size=64 << 10)
    with pytest.raises(blkloom.errors.BlkloomError, match=r"128|65536|64"):
        blkloom.open(f"0 129 qcow2 {made.path}", read_only=True)


@pytest.mark.parametrize("depth", [2, 17, 100])
def test_a_chain_reads_through_every_layer(tmp_path: Path, depth: int) -> None:
    size, below = 256 << 10, ""
    for number in range(depth):
        path = tmp_path / f"layer{number}.qcow2"
        words = ["-b", below, "-F", "qcow2"] if below else []
        qemu.qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", *words, path, str(size))
        at = number * 5000 // 512 * 512 % (size - 4096)
        qemu.qemu_io(path, f"write -P {number % 255 + 1} {at} 3072")
        below = path.name
    with attached(path, size, read_only=True) as device:
        assert not first_difference(read_all(device), qemu.content(path))


def test_the_slow_model_agrees_with_qemu(tmp_path: Path) -> None:
    for seed, shape in enumerate([Shape(cluster_bits=9, snapshots=1), Shape(cluster_bits=14, extended=True), Shape()]):
        made = make(tmp_path, shape, size=128 << 10, seed=seed, name=f"disk{seed}")
        image = SlowImage(made.path.read_bytes())
        assert image.content() == made.content
        assert not image.check().corruptions
