"""A worker that is killed at any time loses no completed write, and leaves a consistent image.

A device works on an image while all changes of its files, and of the memory of its redo log, are recorded. Then the
process is "killed" at many points of the record, also in the middle of a change: the kernel has everything that was
written, synced or not, and the log is as it was. After the replay of the log there is no corruption, and each sector
has the data of the last completed write, or of the one in flight. A replay that is killed is done again, with the same
result. If the power fails during a replay, what a completed flush covered is there. The slow model checks this; QEMU
and blkloom open some of the images, and the work on some is continued and killed again.
"""

from __future__ import annotations

import os
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blkloom.image.qcow2.write.writer import Writer
from blkloom.image.redo_log import RedoLog

from .crashed import SHAPES, below_of, check, show_others
from .recording import REDO_LOG, SECTOR, Event, Recorder
from .shapes import Made, Shape, make, shapes
from .workload import Workload

pytestmark = pytest.mark.usefixtures("qemu_tools")

CUTS = int(os.environ.get("BLKLOOM_FUZZ_CASES", "0")) or 30
"""Deaths a workload."""
EVERY = 15
"""One in so many is shown to QEMU, and to ourselves."""


class Replay:
    """The replay of the redo log of a killed process, recorded behind what that process has done."""

    def __init__(self, killed: Recorder) -> None:
        self.begin = len(killed.log)
        """The first event of the replay."""
        self.recorder = killed
        self.redo_log = bytes(killed.files[REDO_LOG])
        self.run()

    def run(self) -> None:
        """Replays all of the log as it was found."""
        memory = os.memfd_create("redo-log")
        os.write(memory, self.redo_log)
        log = RedoLog(memory)
        if not log.is_empty:
            log.replay(self, lambda: self._sync("data"))  # type: ignore[arg-type]
            assert log.is_empty
        log.close()

    def write(self, offset: int, data: bytes) -> None:
        """See `Storage.write`; of the image."""
        self.recorder.do(Event("image", "write", offset, data))

    def sync(self) -> None:
        """See `Storage.sync`; of the image."""
        self._sync("image")

    def _sync(self, file: str) -> None:
        self.recorder.do(Event(file if file in self.recorder.files else "image", "sync"))


def _kill(folder: Path, shape: Shape, *options: str, seed: int, steps: int, cuts: int, size: int) -> None:
    """Runs a workload, kills it, and continues one of the killed."""
    made = make(folder, shape, size=size, seed=seed, steps=4)
    below, before = below_of(made), [made.content[at : at + SECTOR] for at in range(0, size, SECTOR)]
    dice, redo_log = random.Random(seed), b""
    for generation in range(2):
        workload = Workload(made, seed + generation, options=options, redo_log=redo_log)
        workload.run(steps)
        recorder = workload.watch.recorder
        last = len(recorder.log)
        for number in range(cuts):
            point = dice.randrange(last + 1)
            where = f"generation {generation}, death {number}, before event {point} of {last}"
            killed = recorder.killed(point, dice)
            found = {name: bytes(content) for name, content in killed.files.items()}
            replay = Replay(killed)
            files = {name: bytes(content) for name, content in killed.files.items()}
            promise = workload.promised(point)
            image = check(files, below, before, promise, promise.completed, where)
            if not generation:  # the record of a later one does not know what was not durable before
                _cut_power(replay, dice, below, before, workload, point, where)
            _kill_replay(replay, files, dice, where)
            if number % EVERY == 0:
                show_others(made, files, image, where, found)
        snapshots = {snapshot.name: promise.snapshots[snapshot.name] for snapshot in image.snapshots()}
        made = replace(made, content=image.content(), snapshots=snapshots)
        _put(made, found)
        redo_log = found[REDO_LOG]


def _cut_power(
    replay: Replay, dice: random.Random, below: bytes, before: list[bytes], workload: Workload, point: int, where: str
) -> None:
    """The power fails during the replay, or at its end; there is no log after that."""
    at = dice.randint(replay.begin, len(replay.recorder.log))
    files = replay.recorder.after_crash(at, dice)
    promise = workload.promised(point)
    check(files, below, before, promise, promise.allowed, f"{where}, power cut in its replay before event {at}")


def _kill_replay(replay: Replay, files: dict[str, bytes], dice: random.Random, where: str) -> None:
    """Replays again, after a part of the replay and after all of it."""
    events = len(replay.recorder.log)
    partly = replay.recorder.killed(dice.randint(replay.begin, events), dice)
    for again in (partly, replay.recorder):
        replay.recorder = again
        replay.run()
        assert {name: bytes(content) for name, content in again.files.items()} == files, f"{where}, replayed again"


def _put(made: Made, files: dict[str, bytes]) -> None:
    made.path.write_bytes(files["image"])
    if "data" in files:
        made.data_file.write_bytes(files["data"])


@pytest.mark.parametrize("kind", SHAPES)
def test_no_death_corrupts_the_image_or_loses_a_completed_write(tmp_path: Path, kind: str) -> None:
    shape = SHAPES[kind]
    size = 96 * shape.cluster if shape.cluster < 4096 else 192 << 10
    _kill(tmp_path, shape, seed=1, steps=30, cuts=CUTS, size=size)


@settings(
    max_examples=max(settings().max_examples // 10, 1), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    shape=shapes(largest_cluster_bits=14),
    seed=st.integers(0, 1 << 30),
    option=st.sampled_from([(), ("preallocate=0",), ("compact_zeroes",), ("discard=ignore",)]),
)
def test_no_death_corrupts_any_other_kind_of_image(shape: Shape, seed: int, option: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        size = min(96 * shape.cluster, 256 << 10)
        _kill(Path(folder), shape, *option, seed=seed, steps=25, cuts=25, size=size)


def test_neither_does_a_death_while_the_log_is_emptied_without_being_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "_limit", Writer.flush)
    for kind in ("plain", "snapshots, tiny", "lazy", "backed"):
        folder = tmp_path / kind.replace(", ", "-")
        folder.mkdir()
        _kill(folder, SHAPES[kind], seed=7, steps=25, cuts=CUTS // 2, size=96 << 10)
