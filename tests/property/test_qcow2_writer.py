"""Any sequence of writes, zeros, discards, flushes and reopenings has the same result as on a bytearray, without an
engine.

All layouts of the format occur, mainly small clusters and narrow refcounts, because these have many growing tables. A
discard may leave each unit unchanged or as zeros. QEMU checks every image at the end.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blkloom.image.qcow2.write.writer import Options
from qcow2_python_engine import Guest, check, create

SEARCH = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module", autouse=True)
def _tools(program: Callable[[str, str], str]) -> None:
    program("qemu-img", "qemu-utils")


@dataclass(frozen=True)
class Step:
    """kind: write, together (with `others`, which have its length), zeroes, keep (zeros without unmapping), discard,
    flush, reopen or kill.
    """

    kind: str
    offset: int
    length: int
    others: tuple[int, ...] = ()


@st.composite
def layouts(draw: st.DrawFn) -> list[str]:
    """Options of qemu-img create."""
    if draw(st.integers(0, 5)) == 0:
        return ["compat=0.10", f"cluster_size={draw(st.sampled_from([512, 4096]))}"]
    extended = draw(st.booleans())
    sizes = [16384, 65536] if extended else [512, 1024, 4096]
    found = [f"cluster_size={draw(st.sampled_from(sizes))}", f"extended_l2={'on' if extended else 'off'}"]
    found.append(f"refcount_bits={draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64]))}")
    found.append(f"lazy_refcounts={'on' if draw(st.booleans()) else 'off'}")
    return found


def steps(size: int) -> st.SearchStrategy[list[Step]]:
    kinds = st.sampled_from(
        ["write"] * 4 + ["together"] * 4 + ["zeroes", "keep", "discard", "discard", "flush", "reopen", "kill"]
    )
    near = st.integers(0, size // 512 - 1).map(lambda sector: sector * 512)
    places = st.one_of(near, st.integers(0, size - 1))
    lengths = st.one_of(st.sampled_from([1, 511, 512, 2048, 4096, 65536]), st.integers(1, size // 2))

    def step(kind: str, at: int, length: int, others: list[int]) -> Step:
        if kind != "together":
            return Step(kind, at, min(length, size - at))
        return Step(kind, at, min(length, size - max(at, *others)), tuple(others))

    one = st.builds(step, kinds, places, lengths, st.lists(places, min_size=1, max_size=12))
    return st.lists(one, min_size=1, max_size=14)


@SEARCH
@given(
    layout=layouts(),
    sequence=steps(300 << 10),
    backing=st.one_of(st.none(), st.integers(1, 400 << 10)),
    ahead=st.sampled_from([0, 4096, 4 << 20]),
)
def test_any_sequence_leaves_what_a_bytearray_holds(
    layout: list[str], sequence: list[Step], backing: int | None, ahead: int
) -> None:
    size = 300 << 10
    below = None if backing is None else (bytes(range(1, 252)) * (backing // 251 + 1))[:backing]
    options = Options(preallocate=ahead, dirty_limit=8192)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        guest = Guest(create(folder, size, *layout).read_bytes(), backing=below, options=options)
        model = bytearray((below or b"")[:size].ljust(size, b"\0"))
        killed = False
        for number, step in enumerate(sequence):
            if step.kind in ("reopen", "kill"):
                killed |= step.kind == "kill"
                guest = _reopened(guest, folder, below, options, killed=step.kind == "kill", leaks=killed)
            else:
                _do(guest, step, number, model)
            low, high = max(step.offset - 100, 0), min(step.offset + step.length + 100, size)
            assert guest.read(low, high - low) == model[low:high], step
        assert guest.read(0, size) == model
        image = guest.close()
        assert _whole(image, folder, leaks=killed)
        assert Guest(image, backing=below).read(0, size) == model


def _reopened(guest: Guest, folder: Path, below: bytes | None, options: Options, *, killed: bool, leaks: bool) -> Guest:
    if killed:
        guest.flush()
        return Guest(guest.crash(), backing=below, options=options)
    image = guest.close()
    assert _whole(image, folder, leaks=leaks)
    return Guest(image, backing=below, options=options)


def _whole(image: bytes, folder: Path, *, leaks: bool) -> bool:
    """leaks: allowed, because there was a kill."""
    said = check(image, folder)
    return not said or (leaks and "ERROR" not in said)


def _do(guest: Guest, step: Step, number: int, model: bytearray) -> None:
    end = step.offset + step.length
    if step.kind == "write":
        data = (bytes([number + 1]) * 7 + b"\0") * (step.length // 8 + 1)
        guest.write(step.offset, data[: step.length])
        model[step.offset : end] = data[: step.length]
    elif step.kind == "together":
        writes = []
        for other, offset in enumerate((step.offset, *step.others)):
            data = (bytes([number + 1, other]) * 7 + b"\0") * (step.length // 15 + 1)
            writes.append((offset, data[: step.length]))
        guest.write_together(writes)
        for offset, data in writes:
            model[offset : offset + step.length] = data
    elif step.kind in ("zeroes", "keep"):
        guest.writer.write_zeroes(step.offset, step.length, may_unmap=step.kind == "zeroes")
        model[step.offset : end] = bytes(step.length)
    elif step.kind == "discard":
        guest.writer.discard(step.offset, step.length)
        found = guest.read(step.offset, step.length)
        assert all(new in (0, old) for new, old in zip(found, model[step.offset : end], strict=True))
        model[step.offset : end] = found
    else:
        guest.flush()
