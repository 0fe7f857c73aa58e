"""Every target, over every access path, with and without io_uring, compared with the slow model.

Hypothesis generates sequences of requests. Each answer, and finally the contents of the backing files, must be as in
the model. To add a target, add a line to `targets_under_test`; to add an access path, a line to `ways_in`.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import hypothesis
import pytest
from hypothesis import strategies as st

import blkloom
from blkloom import _engine
from blkloom.errors import BackingError
from blkloom.testing import NbdThread

from .backing_files import FILE, first_contents, write_in_extents, write_sparse
from .file_systems import NAMES, FileSystems
from .model import SECTOR, Model
from .targets_under_test import TARGETS
from .under_test import UnderTest
from .ways_in import WAYS_IN, WayIn

pytestmark = pytest.mark.timeout(900 if "BLKLOOM_FUZZ_CASES" in os.environ else 120)

Io = Literal["auto", "threads"]
MOST = 1 << 63
"""Offsets reach this far."""
# A fuzzing run's cases are shared among the combinations of target, way in and io.
FUZZING = int(os.environ.get("BLKLOOM_FUZZ_CASES", "0")) // 100
CASES = 5


@dataclass(frozen=True)
class Ground:
    """Where devices are made."""

    engine: _engine.Engine
    host: NbdThread
    directories: Mapping[str, Path]
    file_systems: FileSystems

    def filled(self, text: str) -> str:
        """A table with the directories it needs in it. Skips what cannot be had here."""
        needed = {name: self.file_systems.place(name) for name in NAMES if f"{{{name}}}" in text}
        if "{blk}" in text and "blk" not in self.directories:
            pytest.skip("block devices are missing (losetup takes root and /dev/loop-control)")
        return text.format_map({**self.directories, **needed})


@pytest.fixture(scope="module", params=["auto", "threads"])
def ground(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, file_systems: FileSystems
) -> Iterator[Ground]:
    engine = _engine.Engine(io=request.param, loops=2)
    disk = tmp_path_factory.mktemp("disk")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as memory:
        host = NbdThread(engine, disk / "nbd.sock")
        with block_devices(tmp_path_factory.mktemp("blk")) as blocks:
            yield Ground(engine, host, {"mem": Path(memory), "disk": disk} | blocks, file_systems)
        host.close()
    engine.close()


@contextmanager
def block_devices(folder: Path) -> Iterator[dict[str, Path]]:
    """{"blk": folder} with links `a` and `b` to the kernel's loop devices; {} where there can be none."""
    losetup = shutil.which("losetup") or shutil.which("losetup", path="/usr/sbin:/sbin")
    if os.geteuid() != 0 or losetup is None or not os.path.exists("/dev/loop-control"):
        yield {}
        return
    with ExitStack() as stack:
        for name in ("a", "b"):
            backing = folder / f"{name}.img"
            backing.write_bytes(bytes(FILE))
            done = subprocess.run([losetup, "--find", "--show", backing], capture_output=True, text=True, check=True)
            (folder / name).symlink_to(device := done.stdout.strip())
            stack.callback(subprocess.run, [losetup, "--detach", device], check=True)
        yield {"blk": folder}


@contextmanager
def made(case: UnderTest, ground: Ground) -> Iterator[tuple[blkloom.Device, Model, dict[str, bytearray]]]:
    """The device of a case, its model, and the contents the model expects of each file."""
    tables = {name: ground.filled(text) for name, text in {**case.below, "": case.table}.items()}
    contents: dict[str, bytearray] = {}
    for path in sorted(set(re.findall(r"\S*/\S+", " ".join(tables.values())))):
        contents[path] = first_contents(path[-1])
        write = write_in_extents if case.allocated and path[-1] not in case.sparse else write_sparse
        size = case.cut.get(path[-1], FILE)
        contents[path][size:] = bytes(FILE - size)
        write(path, contents[path][:size])
    devices: dict[str, blkloom.Device] = {}
    models: dict[str, Model] = {}
    with ExitStack() as stack:
        for name, table in tables.items():
            devices[name] = stack.enter_context(
                blkloom.open(
                    table,
                    name=name,
                    engine=ground.engine,
                    read_only=case.read_only,
                    direct_io=case.direct_io,
                    targets=case.targets,
                    devices=devices,
                )
            )
            models[name] = Model(table, contents, own=case.own, below=models, read_only=case.read_only)
        yield devices[""], models[""], contents


# Requests


@st.composite
def ranges(draw: st.DrawFn, model: Model) -> tuple[int, int]:
    """(offset, length) in the device, often at a boundary, often unaligned, now and then large."""
    size = model.size
    near = st.builds(lambda at, off: at + off, st.sampled_from(model.boundaries), st.integers(-700, 700))
    aligned = st.integers(0, size // SECTOR).map(lambda sector: sector * SECTOR)
    offset = min(max(draw(near | aligned | st.integers(0, size)), 0), size)
    short, long = st.integers(0, 1500), st.integers(0, size)
    sectors = st.integers(1, 40).map(lambda count: count * SECTOR)
    length = draw(short | sectors | long | st.sampled_from([4096, 32768, 65536, size]))
    return offset, min(length, size - offset)


@st.composite
def outside(draw: st.DrawFn, model: Model) -> tuple[int, int]:
    """(offset, length) that reach past the end by a byte or by far."""
    beyond = draw(st.sampled_from([1, 511, 512, 4096]))
    if draw(st.booleans()):
        offset = draw(st.integers(max(0, model.size - (1 << 20)), model.size))
        return offset, model.size - offset + beyond
    return draw(st.sampled_from([model.size, model.size + beyond, MOST - 4096, MOST - 1, 2 * MOST - 4096])), beyond


@st.composite
def cut(draw: st.DrawFn, model: Model, offset: int, length: int) -> list[int]:
    """Where to cut a range in pieces, from its start: at random, at boundaries, or not at all."""
    if length < 2 or draw(st.booleans()):
        return []
    points = set(draw(st.lists(st.integers(1, length - 1), max_size=4)))
    return sorted(points | set(draw(st.sampled_from([[], model.splits(offset, length)[:8]]))))


def pieces(offset: int, length: int, cuts: list[int]) -> list[tuple[int, int]]:
    edges = [0, *cuts, length]
    return [(offset + first, last - first) for first, last in pairwise(edges)]


class Session:
    """One device, by one way in, beside its model. files: what it is made of."""

    def __init__(self, device: blkloom.Device, way: WayIn, model: Model, data: st.DataObject, files: list[str]) -> None:
        self.device = device
        self.way = way
        self.model = model
        self.data = data
        self.files = files
        self.looked = False

    def draw(self, strategy: st.SearchStrategy[Any], label: str) -> Any:
        return self.data.draw(strategy, label)

    def outcome(self, own: set[int], request: Callable[[], object], *, may_fail: set[int] | None = None) -> bool:
        """Whether the request succeeded; it must fail if `own` is not empty, with one of those errnos."""
        expected = self.way.errnos(own)
        try:
            request()
        except OSError as error:
            if error.errno not in expected | (may_fail or set()):
                raise AssertionError(f"failed, expected {names(expected)}") from error
            return False
        assert not expected, f"succeeded, expected {names(expected)}"
        return True

    def read(self) -> None:
        offset, length = self.draw(ranges(self.model), "read")
        cuts, df = self.draw(cut(self.model, offset, length), "cut at"), self.draw(st.booleans(), "df")
        found: list[bytes] = []

        def request() -> None:
            found.append(self.way.read(pieces(offset, length, cuts), df=df))

        if self.outcome(self.model.errors_of_read(offset, length), request):
            self.check(offset, found[0])

    def write(self) -> None:
        offset, length = self.draw(ranges(self.model), "write")
        cuts, fua = self.draw(cut(self.model, offset, length), "cut at"), self.draw(st.booleans(), "fua")
        new = random.Random(self.draw(st.integers(0, 1 << 16), "data")).randbytes(length)
        parts = [(at, new[at - offset : at - offset + count]) for at, count in pieces(offset, length, cuts)]
        own = self.errors_of_change(offset, length)
        if self.outcome(own, lambda: self.way.write(parts, fua=fua)):
            self.model.write(offset, new)
        else:
            self.settle(offset, new)

    def write_zeroes(self) -> None:
        offset, length = self.draw(ranges(self.model), "write zeroes")
        unmap, fast, fua = (self.draw(st.booleans(), flag) for flag in ("unmap", "fast", "fua"))
        own = self.errors_of_change(offset, length)
        may_fail = {errno.EOPNOTSUPP} if fast else set()

        def request() -> None:
            self.way.write_zeroes(offset, length, unmap=unmap, fast=fast, fua=fua)

        if self.outcome(own, request, may_fail=may_fail):
            self.model.write(offset, bytes(length))
        else:
            self.settle(offset, bytes(length))

    def discard(self) -> None:
        offset, length = self.draw(ranges(self.model), "discard")
        own = self.errors_of_change(offset, length)
        fua = self.draw(st.booleans(), "fua")
        done = self.outcome(own, lambda: self.way.discard(offset, length, fua=fua))
        if done and not self.model.keeps_discarded(offset, length):
            self.model.write(offset, bytes(length))
        else:
            self.settle(offset, bytes(length))

    def flush(self) -> None:
        self.way.flush()

    def suspend(self) -> None:
        self.device.suspend()
        self.device.resume()

    def reload(self) -> None:
        """The same table once more, for devices whose bytes are not the table's own."""
        assert self.device.table is not None
        if not any(segment.target.name in KEEPING for segment in self.device.table.segments):
            try:
                self.device.load(self.device.table)
            except BackingError:
                if not self.looked:
                    raise
                return  # no block map any more, and the file has got holes since
            self.device.resume()

    def another_opens(self) -> None:
        """Another program opens the files, which may end a block map."""
        self.looked = True
        for path in self.files:
            os.close(os.open(path, os.O_RDONLY))

    def cache(self) -> None:
        self.way.cache(*self.draw(ranges(self.model), "cache"))

    def extents(self) -> None:
        offset, length = self.draw(ranges(self.model).filter(lambda found: found[1] > 0), "extents")
        found = self.way.extents(offset, length, one=self.draw(st.booleans(), "one"))
        for start, count, flags in found or ():
            assert flags in (0, 1, 2, 3)
            assert offset <= start
            assert start + count <= offset + length
            if flags & 2:
                assert not self.model.errors_of_read(start, count)
                assert not any(self.model.read(start, count)), f"{count} bytes at {start} are not zeros"

    def past_the_end(self) -> None:
        offset, length = self.draw(outside(self.model), "past the end")
        requests: dict[str, tuple[int, Callable[[], object]]] = {
            "read": (errno.EINVAL, lambda: self.way.read([(offset, length)], df=False)),
            "write": (errno.ENOSPC, lambda: self.way.write([(offset, bytes(length))], fua=False)),
            "write zeroes": (
                errno.ENOSPC,
                lambda: self.way.write_zeroes(offset, length, unmap=True, fast=False, fua=False),
            ),
            "discard": (errno.EINVAL, lambda: self.way.discard(offset, length, fua=False)),
            "cache": (errno.EINVAL, lambda: self.way.cache(offset, length)),
            "extents": (errno.EINVAL, lambda: self.way.extents(offset, length, one=False) is not None or refuse()),
        }
        name = self.draw(st.sampled_from(sorted(requests)), "request")
        number, request = requests[name]
        changes = self.model.read_only and name in ("write", "write zeroes", "discard")
        self.outcome({number} | ({errno.EROFS} if changes else set()), request)

    def everything(self) -> None:
        """All that can be read must be as the model has it."""
        for run in self.model.runs:
            if run.kind != "error":
                self.check(run.start, self.way.read([(run.start, run.end - run.start)], df=False))

    def check(self, offset: int, found: bytes) -> None:
        expected = self.model.read(offset, len(found))
        if found != expected:
            at = next(at for at, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other)
            raise AssertionError(f"byte {offset + at} of a read of {len(found)} bytes at {offset} is wrong")

    def errors_of_change(self, offset: int, length: int) -> set[int]:
        own = self.model.errors_of_change(offset, length, errno.ENOSPC)
        if self.model.read_only and not own:  # a request for nothing: a server may say so or not
            own = self.way.errnos({errno.EROFS}) - {errno.EROFS}
        return own

    def settle(self, offset: int, new: bytes) -> None:
        """A change that may have been made in part, or not at all: takes what is there now."""
        for part in self.model.parts(offset, len(new)):
            if part.run.kind != "error":
                at, length = offset + part.start, part.end - part.start
                seen = self.way.read([(at, length)], df=False)
                assert self.model.allowed(at, seen, new[part.start : part.end]), "neither old nor new bytes"
                self.model.write(at, seen)


def names(errnos: set[int]) -> list[str]:
    return sorted(errno.errorcode[number] for number in errnos)


def refuse() -> None:
    """Stands in for a request that a way in does not know."""
    raise OSError(errno.EINVAL, "not known here")


STEPS = (
    *("read", "write", "write") * 2,
    *("write_zeroes", "discard", "flush", "cache", "extents", "past_the_end", "suspend", "reload", "another_opens"),
)
KEEPING = frozenset({"ram", "pattern", "growing", "async-growing", "backed", "snapshot"})
"""Targets whose bytes go with their table."""


def cases_of(case: UnderTest) -> int:
    return max(case.examples or CASES, FUZZING)


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("case", TARGETS)
def test_requests_do_what_the_model_says(case: str, way: str, ground: Ground) -> None:
    ground.filled(TARGETS[case].table)  # skips before Hypothesis begins

    @hypothesis.settings(
        max_examples=cases_of(TARGETS[case]),
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        database=None,
    )
    @hypothesis.given(st.data())
    def run(data: st.DataObject) -> None:
        with made(TARGETS[case], ground) as (device, model, contents):
            assert device.size == model.size
            with WAYS_IN[way](device, ground.host) as way_in:
                session = Session(device, way_in, model, data, list(contents))
                for step in data.draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=25), "steps"):
                    getattr(session, step)()
                session.everything()
                device.flush()
        for path, content in contents.items():
            if path in model.logs:
                continue
            found = Path(path).read_bytes()
            if path[-1] in TARGETS[case].cut:
                found = found.ljust(len(content), b"\0")
            assert found == content, f"{path} differs from the model's"

    run()
