"""Background checks in single steps between requests, over many sessions: no crash corrupts the image, each clean close
leaves exact refcounts, and no correct refcount is reported as wrong.
"""

from __future__ import annotations

import random
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blkloom.image.qcow2.format.header import Incompatible
from blkloom.image.qcow2.write import background_check, recount
from blkloom.image.qcow2.write.writer import Options
from qcow2.recording import Event, Recorder
from qcow2.slow_image import SlowImage
from qcow2_python_engine import Disk, Guest, check, create

CLUSTERS = 200
CUTS = 60
"""Crashes a run."""


@dataclass(eq=False)
class _RecordedDisk(Disk):
    """recorder: of what is done to an image."""

    recorder: Recorder = field(default_factory=lambda: Recorder({}))

    def write(self, offset: int, data: bytes) -> None:
        super().write(offset, data)
        self.recorder.do(Event("image", "write", offset, bytes(data)))

    def zero(self, offset: int, length: int) -> None:
        super().zero(offset, length)
        self.recorder.do(Event("image", "zero", offset, length=length))

    def punch(self, offset: int, length: int) -> bool:
        self.recorder.do(Event("image", "punch", offset, length=length))
        return super().punch(offset, length)

    def sync(self) -> None:
        super().sync()
        self.recorder.do(Event("image", "sync"))

    def truncate(self, size: int) -> None:
        super().truncate(size)
        self.recorder.do(Event("image", "truncate", size))


@dataclass(frozen=True)
class _Kind:
    cluster: int
    options: list[str]
    snapshots: bool = False
    backed: bool = False


KINDS = {
    "v2": _Kind(1024, ["compat=0.10"]),
    "v2, backed, snapshots": _Kind(1024, ["compat=0.10"], snapshots=True, backed=True),
    "wide counts, snapshots": _Kind(512, ["refcount_bits=64"], snapshots=True),
    "one bit, backed": _Kind(512, ["refcount_bits=1"], backed=True),
    "lazy, snapshots": _Kind(512, ["lazy_refcounts=on"], snapshots=True),
}


class _Sessions:
    """One image, written to in session after session, everything recorded."""

    def __init__(self, folder: Path, kind: _Kind, dice: random.Random) -> None:
        self.folder, self.kind, self.dice = folder, kind, dice
        self.size = CLUSTERS * kind.cluster
        self.path = create(folder, self.size, f"cluster_size={kind.cluster}", *kind.options)
        self.below = dice.randbytes(self.size // 2) if kind.backed else None
        self.content = bytearray((self.below or b"").ljust(self.size, b"\0"))
        self.recorder = Recorder({"image": bytearray(self.path.read_bytes())})
        self._names: list[str] = []
        self._number = 0
        self._exact = True

    def run(self, requests: int, *, steps: list[int]) -> None:
        """A session with so many requests. steps: how many of the check come between two of them, one is chosen."""
        changed: list[int] = []
        options = Options(preallocate=self.dice.choice([0, 4096]))
        guest = Guest(self.path.read_bytes(), backing=self.below, options=options, checked=changed.append)
        assert isinstance(guest.disk, _RecordedDisk)
        guest.disk.recorder = self.recorder
        for _ in range(requests):
            self._request(guest)
            for _ in range(self.dice.choice(steps)):
                guest.writer.work()
        assert guest.read(0, self.size) == self.content
        closed = guest.close()
        assert not sum(changed) or not self._exact, "what was right was put right"
        self._exact = not guest.image.header.incompatible & Incompatible.DIRTY
        assert not self._exact or not check(closed, self.folder), "nothing leaks"
        assert SlowImage(closed, backing=self.below or b"").content() == self.content
        self.path.write_bytes(closed)

    def keep(self) -> None:
        """QEMU has the image, takes a snapshot or deletes one."""
        if not self.kind.snapshots:
            return
        self._number += 1
        if self._names and self.dice.random() < 0.6:
            words = ["-d", self._names.pop()]
        else:
            self._names.append(f"s{self._number}")
            words = ["-c", self._names[-1]]
        subprocess.run(["qemu-img", "snapshot", *words, str(self.path)], check=True)
        self.recorder.do(Event("image", "replace", data=self.path.read_bytes()))

    def _request(self, guest: Guest) -> None:
        self._number += 1
        at = self.dice.randrange(self.size // 512) * 512
        length = min(self.dice.choice([512, *(n * self.kind.cluster for n in (1, 2, 5))]), self.size - at)
        kind = self.dice.choice(["write", "write", "write", "together", "together", "discard", "zero", "flush"])
        if kind == "write":
            guest.write(at, bytes([self._number & 0xFF]) * length)
            self.content[at : at + length] = bytes([self._number & 0xFF]) * length
        elif kind == "together":
            places = [self.dice.randrange(self.size // 512) * 512 for _ in range(self.dice.choice([2, 20]))]
            writes = [(place, bytes([self._number & 0xFF]) * min(length, self.size - place)) for place in places]
            guest.write_together(writes)
            for place, data in writes:
                self.content[place : place + len(data)] = data
        elif kind == "discard":
            guest.writer.discard(at, length)
            self.content[at : at + length] = guest.read(at, length)
        elif kind == "zero":
            guest.writer.write_zeroes(at, length, may_unmap=self.dice.random() < 0.7)
            self.content[at : at + length] = bytes(length)
        else:
            guest.flush()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_no_crash_between_its_steps_corrupts_an_image_and_every_clean_end_leaves_exact_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, seed: int
) -> None:
    dice = random.Random(f"{kind}{seed}")
    monkeypatch.setattr("qcow2_python_engine.Disk", _RecordedDisk)
    monkeypatch.setattr(recount, "_STEP", 1)
    monkeypatch.setattr(recount, "_WINDOW", [64, 256, 1 << 20][seed])
    monkeypatch.setattr(recount, "_HELD", dice.choice([1, 4096, 64 << 20]))
    monkeypatch.setattr(background_check, "_BLOCKS", 1)
    monkeypatch.setattr(background_check, "_LAST_STEPS", dice.choice([0, 3, 256]))
    sessions = _Sessions(tmp_path, KINDS[kind], dice)
    for number in range(6):
        sessions.run(dice.choice([3, 10, 40]) if number > 1 else 40, steps=[0, 0, 1, 1, 2, 7])
        if number % 2:
            sessions.keep()
    recorder = sessions.recorder
    for number in range(CUTS):
        point = dice.randrange(len(recorder.log) + 1)
        crashed = recorder.after_crash(point, dice if number % 8 else None)["image"]
        found = SlowImage(crashed, backing=sessions.below or b"").check()
        where = f"before event {point} of {len(recorder.log)}"
        assert not found.corruptions, f"{where}: {found.corruptions[:3]}"
        assert not found.shared, f"{where}: {found.shared[:3]}"
