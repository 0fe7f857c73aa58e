"""Backing chains: opened from the names in images, and flattened for any cluster sizes and lengths of the layers."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blkloom
from blkloom.errors import BackingError
from blkloom.image import cluster_entries
from blkloom.image.chain import Chain
from blkloom.image.errors import CorruptImage, UnsupportedImage
from blkloom.image.open_chain import open_chain
from blkloom.image.path_policy import PathPolicy
from blkloom.image.qcow2.driver import Qcow2Format
from blkloom.targets.holding import SharedFiles
from blkloom.targets.load_context import LoadContext
from qcow2_by_hand import ByHand

SIZE = 64 << 10


def opened(path: Path) -> tuple[Chain, LoadContext]:
    context = LoadContext(SharedFiles(), read_only=True, shared=True)
    return open_chain(str(path), context, PathPolicy.of_image(str(path)), format=Qcow2Format()), context


@st.composite
def stacks(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    """From the bottom up: kind, cluster bits, length in sectors, seed."""
    kinds = draw(st.lists(st.sampled_from(["v2", "v3", "extended"]), min_size=1, max_size=5))
    if draw(st.booleans()):
        kinds.insert(0, "raw")
    lengths = st.integers(1, SIZE // 512 + 40)
    return [
        (kind, draw(st.integers(14, 15) if kind == "extended" else st.integers(9, 16)), draw(lengths), number)
        for number, kind in enumerate(kinds)
    ]


def make(folder: Path, stack: list[tuple[str, int, int, int]]) -> tuple[Path, bytes]:
    """The stack's files, and what its top reads as, computed a sector at a time."""
    below: bytes = b""
    path = folder
    backing = None
    for number, (kind, bits, sectors, seed) in enumerate(stack):
        dice, size = random.Random(seed * 7919 + bits), sectors * 512
        if kind == "raw":
            path = folder / "layer0"
            below = dice.randbytes(size)
            path.write_bytes(below)
            backing, form = path.name.encode(), b"raw"
            continue
        image = ByHand(size, bits, 2 if kind == "v2" else 3, kind == "extended", backing=backing)
        if backing:
            image.backing_format = form
        content = bytearray(below[:size].ljust(size, b"\0"))
        for cluster in range(-(-size // image.cluster)):
            _cluster(image, cluster, content, dice)
        path = image.write(folder / f"layer{number}")
        backing, form, below = path.name.encode(), b"qcow2", bytes(content)
    return path, below


def _cluster(image: ByHand, number: int, content: bytearray, dice: random.Random) -> None:
    at, end = number * image.cluster, min((number + 1) * image.cluster, len(content))
    # The whole host cluster has something, also where the disk ends inside it.
    data = bytes(dice.choices(range(1, 256), k=64)) * (image.cluster // 64)
    state = dice.choice(["nothing", "nothing", "data", "zero", "compressed"])
    if state == "data" and image.extended:
        allocated = dice.getrandbits(32)
        zero = dice.getrandbits(32) & ~allocated
        image.data(number, data, zero << 32 | allocated)
        step = image.cluster // 32
        for sub in range(32):
            low, high = at + sub * step, min(at + (sub + 1) * step, end)
            if low < high and allocated >> sub & 1:
                content[low:high] = data[sub * step :][: high - low]
            elif low < high and zero >> sub & 1:
                content[low:high] = bytes(high - low)
    elif state == "data":
        image.data(number, data)
        content[at:end] = data[: end - at]
    elif state == "compressed":
        image.compress(number, data, skip=dice.randrange(512))
        content[at:end] = data[: end - at]
    elif state == "zero" and image.version == 3:
        image.entry(number, 0 if image.extended else 1, 0xFFFFFFFF << 32)
        content[at:end] = bytes(end - at)


@settings(deadline=None)
@given(stack=stacks(), piece=st.sampled_from([512, 1536, 20480, 1 << 20]))
def test_any_stack_reads_as_its_layers_say(
    stack: list[tuple[str, int, int, int]], piece: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, content = make(tmp_path_factory.mktemp("stack"), stack)
    if stack[-1][0] == "raw":
        return
    with blkloom.open(f"0 {len(content) // 512} qcow2 {path}", read_only=True) as device:
        for at in range(0, len(content), piece):
            assert device.pread(min(piece, len(content) - at), at) == content[at : at + piece], hex(at)
        found = device.extents(0, len(content))
        assert sum(length for _, length, _ in found) == len(content)
        for at, length, flags in found:
            assert not flags & 2 or not any(content[at : at + length]), "what is said to be zeros"
    chain, context = opened(path)
    try:
        assert chain.read(0, len(content)) == content
        unit = 1 << chain.top.unit_bits
        zeros = chain.zeros(0, len(content) // unit)
        below = chain.read(0, len(content), start=1) if len(stack) > 1 else bytes(len(content))
        for number, zero in enumerate(zeros):
            assert not zero or not any(below[number * unit : (number + 1) * unit])
    finally:
        context.close()


def test_a_chain_costs_no_more_entries_than_its_smallest_unit_asks_for(tmp_path: Path) -> None:
    path, _ = make(tmp_path, [("v3", 9, 128, 0), ("v3", 16, 128, 1)])
    chain, context = opened(path)
    try:
        assert chain.unit_bits == 9
        assert chain.entries(0, 128).size == 128
        assert (chain.entries(0, 128) != cluster_entries.SHOWS_THROUGH).all()
    finally:
        context.close()


def overlay(folder: Path, name: str, backing: bytes, form: bytes | None = b"qcow2") -> Path:
    return ByHand(SIZE, backing=backing, backing_format=form).write(folder / name)


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c", "d"]])
def test_a_chain_that_leads_back_to_itself_is_found(tmp_path: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        overlay(tmp_path, name, names[(number + 1) % len(names)].encode())
    with pytest.raises(CorruptImage, match="the backing chain is a cycle"):
        opened(tmp_path / "a")


def test_a_chain_that_leads_back_by_another_name_of_the_file_is_found(tmp_path: Path) -> None:
    overlay(tmp_path, "a", b"link")
    os.link(tmp_path / "a", tmp_path / "link")
    with pytest.raises(CorruptImage, match="the backing chain is a cycle"):
        opened(tmp_path / "a")


def test_a_format_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(512))
    with pytest.raises(UnsupportedImage, match="format 'vmdk'"):
        opened(overlay(tmp_path, "a", b"base", b"vmdk"))


def test_a_backing_file_said_to_be_raw_is_raw_whatever_it_looks_like(tmp_path: Path) -> None:
    base = ByHand(SIZE).write(tmp_path / "base")
    chain, context = opened(overlay(tmp_path, "a", b"base", b"raw"))
    assert chain.read(0, 4096) == base.read_bytes()[:4096]
    context.close()


@pytest.mark.parametrize("form", ["qcow2", "raw"])
def test_a_backing_file_of_no_said_format_is_looked_at_with_a_warning(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = ByHand(SIZE)
    base.data(0, b"inside")
    raw = base.build() if form == "qcow2" else b"inside".ljust(SIZE, b"\0")
    (tmp_path / "base").write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        chain, context = opened(overlay(tmp_path, "a", b"base", None))
    assert chain.read(0, 6) == b"inside"
    context.close()
    assert f"looks like {form}" in caplog.text


def test_a_backing_file_that_must_be_an_image_and_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(SIZE))
    with pytest.raises(CorruptImage, match="base: header: no QCOW2 image"):
        opened(overlay(tmp_path, "a", b"base"))


def test_backing_files_are_opened_for_reading_only_and_claimed_with_others(tmp_path: Path) -> None:
    ByHand(SIZE).write(tmp_path / "base")
    (tmp_path / "base").chmod(0o444)
    paths = [overlay(tmp_path, name, b"base") for name in ("a", "b")]
    with blkloom.open(f"0 128 qcow2 {paths[0]}", read_only=True) as first:
        with blkloom.open(f"0 128 qcow2 {paths[1]}", read_only=True) as second:
            assert first.pread(512, 0) == second.pread(512, 0)
        (tmp_path / "base").chmod(0o644)
        with pytest.raises(blkloom.errors.BusyError):
            blkloom.open(f"0 8 loop {tmp_path / 'base'}")


def test_a_name_outside_of_the_gate_is_refused_at_any_depth(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(b"secret" * 1000)
    overlay(inside, "b", b"../secret", b"raw")
    with pytest.raises(BackingError, match=r"inside/b: its backing file .* outside"):
        opened(overlay(inside, "a", b"b"))


def test_what_metadata_cannot_say_fails_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = ByHand(1 << 20)
    image.data(0, b"good")
    image.entry(1, 1 << 57)
    image.entry(2, 0x200)
    image.entry(3, 1 << 40)
    image.data(4, b"fine")
    path = image.write(tmp_path / "disk.qcow2")
    with blkloom.open(path, read_only=True) as device, caplog.at_level(logging.ERROR):
        assert device.pread(4, 0) == b"good"
        for number in (1, 2, 3):
            with pytest.raises(OSError, match="Input/output"):
                device.pread(512, number * 4096)
        assert device.pread(4, 4 * 4096) == b"fine"
        assert "wants_check=1" in device.status()[0][3]
    assert "past the end of the file" in caplog.text


def test_an_l2_table_out_of_the_file_costs_only_what_it_describes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = ByHand(1 << 20, cluster_bits=9)
    image.data(64, b"second table")
    raw = bytearray(image.build())
    raw[2 * 512 : 2 * 512 + 8] = (1 << 40).to_bytes(8, "big")
    path = tmp_path / "disk.qcow2"
    path.write_bytes(raw)
    with blkloom.open(path, read_only=True) as device, caplog.at_level(logging.ERROR):
        with pytest.raises(OSError, match="Input/output"):
            device.pread(512, 0)
        assert device.pread(12, 64 * 512) == b"second table"
    assert "L2 table 0 begins at 0x10000000000, past the end" in caplog.text


def test_data_that_the_file_ends_inside_of_is_zeros_from_there(tmp_path: Path) -> None:
    image = ByHand(SIZE)
    image.data(0, b"x" * 4096)
    path = image.write(tmp_path / "disk.qcow2")
    os.truncate(path, path.stat().st_size - 1000)
    with blkloom.open(path, read_only=True) as device:
        assert device.pread(4096, 0) == b"x" * 3096 + bytes(1000)
