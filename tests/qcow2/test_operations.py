"""Random operations on images of every kind, compared with a bytearray, and checked by QEMU at the end."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import blkloom

from . import qemu
from .attached import first_difference, table_of
from .operations import Model, Operation, operations
from .shapes import Made, Shape, make, shapes
from .slow_image import SlowImage

pytestmark = pytest.mark.usefixtures("qemu_tools")

SIZES = st.sampled_from([64 << 10, 300 * 512, 1 << 20])
AUTO, IN_USE = 2, 1
SEARCH = settings(
    max_examples=settings().max_examples // 2, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class Keeper:
    """Does what is done to an image while its device is suspended or closed, as an administrator would."""

    def __init__(self, made: Made, model: Model) -> None:
        self._made, self._model = made, model
        self._most = 2 if made.shape.refcount_bits < 8 else 4
        self.snapshots = dict(made.snapshots)

    def maintain(self, operation: Operation) -> None:
        """Takes, applies or deletes a snapshot where the image can have one; else only checks it."""
        path, shape = self._made.path, self._made.shape
        checked = qemu.check(path)
        assert checked.whole, checked.said
        counts_enough = shape.refcount_bits >= 8 or (shape.refcount_bits >= 2 and not shape.compressed)
        if shape.data_file or not counts_enough:
            return
        names = sorted(self.snapshots)
        verb = operation.seed % 3
        if verb == 0 or not names:
            if len(names) < self._most - 1:
                name = f"t{operation.seed}"
                qemu.qemu_img("snapshot", "-c", name, path)
                self.snapshots[name] = bytes(self._model.content)
        elif verb == 1:
            if shape.bitmap:
                return  # QEMU refuses that: its bitmaps know nothing of such a change
            name = names[operation.seed % len(names)]
            qemu.qemu_img("snapshot", "-a", name, path)
            self._model.content[:] = self.snapshots[name]
        else:
            name = names[operation.seed % len(names)]
            qemu.qemu_img("snapshot", "-d", name, path)
            del self.snapshots[name]


def run(made: Made, sequence: list[Operation], *options: str) -> None:
    """Does it all and lets QEMU judge. Raises AssertionError."""
    model = Model(made.content)
    keeper = Keeper(made, model)
    dirty = bitmaps_of(made)
    table = table_of(made.path, made.size, *options)
    device = blkloom.open(table)
    try:
        for operation in sequence:
            if operation.kind == "suspend":
                device.suspend()
                keeper.maintain(operation)
                device.resume()
            elif operation.kind in ("reopen", "snapshot"):
                device.close()
                if operation.kind == "snapshot":
                    keeper.maintain(operation)
                device = blkloom.open(table)
            else:
                model.do(device, operation)
        model.compare(device)
    finally:
        device.close()
    judge(made, model, keeper.snapshots)
    judge_bitmaps(made, model, dirty)


def bitmaps_of(made: Made) -> dict[str, list[bool]]:
    """What each persistent bitmap says, by name."""
    image = SlowImage(made.path.read_bytes())
    assert not any(bitmap.flags & IN_USE for bitmap in image.bitmaps())
    return {bitmap.name: image.dirty_ranges(bitmap) for bitmap in image.bitmaps()}


def judge_bitmaps(made: Made, model: Model, before: dict[str, list[bool]]) -> None:
    """Enabled ones know of every change and of nothing else; others are as they were."""
    after = bitmaps_of(made)
    assert after.keys() == before.keys()
    for bitmap in SlowImage(made.path.read_bytes()).bitmaps():
        if not bitmap.flags & AUTO:
            assert after[bitmap.name] == before[bitmap.name]
            continue
        bits = bitmap.granularity
        touched = {n for at, end in model.touched for n in range(at >> bits, (end - 1 >> bits) + 1)}
        changed = {
            n
            for n in touched
            if made.content[n << bits : n + 1 << bits] != bytes(model.content[n << bits : n + 1 << bits])
        }
        old, new = ({n for n, dirty in enumerate(says[bitmap.name]) if dirty} for says in (before, after))
        assert old | changed <= new <= old | touched, bitmap


def judge(made: Made, model: Model, snapshots: dict[str, bytes]) -> None:
    checked = qemu.check(made.path)
    assert checked.whole, checked.said
    assert not first_difference(qemu.content(made.path), bytes(model.content))
    for name, content in snapshots.items():
        assert not first_difference(qemu.content(made.path, snapshot=name), content), f"snapshot {name}"
    if made.shape.data_file == "raw":
        raw = made.data_file.read_bytes()[: made.size].ljust(made.size, b"\0")
        assert not first_difference(raw, bytes(model.content)), "the raw data file by itself"
    shared = SlowImage(made.path.read_bytes()).check().shared
    assert not shared, shared


@SEARCH
@given(data=st.data(), shape=shapes(), size=SIZES, seed=st.integers(0, 1 << 16))
def test_any_sequence_leaves_what_a_bytearray_holds(data: st.DataObject, shape: Shape, size: int, seed: int) -> None:
    sequence = data.draw(operations(size=size, cluster=shape.cluster))
    with tempfile.TemporaryDirectory() as folder:
        run(make(Path(folder), shape, size=size, seed=seed), sequence)


@SEARCH
@given(data=st.data(), shape=shapes(largest_cluster_bits=12), seed=st.integers(0, 1 << 16))
def test_small_clusters_and_many_tables(data: st.DataObject, shape: Shape, seed: int) -> None:
    size = 2 << 20
    sequence = data.draw(operations(size=size, cluster=32 * shape.cluster, most=20))
    with tempfile.TemporaryDirectory() as folder:
        run(make(Path(folder), shape, size=size, seed=seed, steps=0), sequence)


@settings(SEARCH, max_examples=max(settings().max_examples // 10, 1))
@given(data=st.data(), bits=st.integers(17, 21), extended=st.booleans(), seed=st.integers(0, 1 << 16))
def test_large_clusters(data: st.DataObject, bits: int, extended: bool, seed: int) -> None:
    shape = Shape(cluster_bits=bits, extended=extended, backing="raw", backing_fit="shorter")
    size = 5 << 20
    sequence = data.draw(operations(size=size, cluster=shape.cluster, most=6))
    with tempfile.TemporaryDirectory() as folder:
        run(make(Path(folder), shape, size=size, seed=seed, steps=2), sequence)


@settings(SEARCH, max_examples=max(settings().max_examples // 5, 1))
@given(data=st.data(), shape=shapes(), option=st.sampled_from(["discard=ignore", "compact_zeroes", "direct_io"]))
def test_options_change_nothing_a_guest_reads(data: st.DataObject, shape: Shape, option: str) -> None:
    size = 300 * 512
    sequence = data.draw(operations(size=size, cluster=shape.cluster))
    with tempfile.TemporaryDirectory() as folder:
        run(make(Path(folder), shape, size=size), sequence, option)


@SEARCH
@given(data=st.data(), shape=shapes(), seed=st.integers(0, 1 << 16))
def test_qemu_goes_on_where_we_stopped_and_we_where_qemu_did(data: st.DataObject, shape: Shape, seed: int) -> None:
    size = 300 * 512
    ours = [data.draw(operations(size=size, cluster=shape.cluster, most=4, keeper=False)) for _ in range(2)]
    theirs = data.draw(operations(size=size, cluster=shape.cluster, most=4, keeper=False))
    with tempfile.TemporaryDirectory() as folder:
        made = make(Path(folder), shape, size=size, seed=seed)
        model = Model(made.content)
        for turn in ours:
            with blkloom.open(table_of(made.path, size)) as device:
                for operation in turn:
                    model.do(device, operation)
                model.compare(device)
            for operation in theirs:
                _by_qemu(made.path, operation)
            model = Model(qemu.content(made.path))
        checked = qemu.check(made.path)
        assert checked.whole, checked.said


def _by_qemu(path: Path, operation: Operation) -> None:
    at, length = operation.offset // 512 * 512, -(-operation.length // 512) * 512
    if operation.kind in ("write", "fua"):
        qemu.qemu_io(path, f"write -P {operation.seed + 100} {at} {length}")
    elif operation.kind in ("zeroes", "zeroes_unmap"):
        qemu.qemu_io(path, f"write -z {'-u ' if operation.kind == 'zeroes_unmap' else ''}{at} {length}")
    elif operation.kind == "discard":
        qemu.qemu_io(path, f"discard {at} {length}")
