"""Any stack of the targets does what a slow model of it does: contents, errors, what a flush makes durable.

A stack is a tree of devices with up to three segments each; every file is used once. Targets whose own state depends on
errors below them (mirror, snapshot, dust, torn) are on parts without errors; a disk loses power only under targets
without such a state. If a request covers sectors that fail and others, the others are written again, one run after the
other.
"""

from __future__ import annotations

import errno
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Set
from contextlib import suppress
from pathlib import Path

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import blkloom
from async_target import PATIENCE
from blkloom.errors import LostData
from blkloom.units import Sectors
from stack_model import (
    SECTOR,
    ZEROS,
    Concatenated,
    Disk,
    Dust,
    Faulty,
    Mirror,
    Node,
    Snapshot,
    Striped,
    Torn,
    Unstriped,
    Zero,
    runs,
)

EXAMPLES = int(os.environ.get("BLKLOOM_FUZZ_CASES", "0")) or 70
MOST_SECTORS = 24
"""Of a segment."""
LEAST_SECTORS = 32
"""Of the device on top."""
LATE = 10**6
"""Seconds after which nothing happens in a test."""
ERRNOS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "ETIMEDOUT": errno.ETIMEDOUT}
CHANGES = ("write", "write_zeroes", "discard")


class Stack:
    """Devices, their models, and what may be done with them."""

    def __init__(self, folder: Path, draw: Callable[[st.SearchStrategy[object]], object]) -> None:
        self._folder = folder
        self._draw = draw
        self._files = 0
        self._mirrors = 0
        """Above what is being made. No leg of theirs has snapshots, which ignore discards that other legs execute."""
        self.devices: dict[str, blkloom.Device] = {}
        self._models: dict[str, Concatenated] = {}
        self.handles: list[tuple[str, Concatenated]] = []
        """Devices that requests go to."""
        self.torn: list[tuple[str, int, Torn]] = []
        """(device, first sector of the segment, model) of disks that may lose power."""
        self.caches: list[Torn] = []
        """All of them, lower ones first."""
        self.disks: list[tuple[Path, Disk]] = []

    def _number(self, least: int, most: int) -> int:
        found = self._draw(st.integers(least, most))
        assert isinstance(found, int)
        return found

    def _choice(self, *values: str) -> str:
        found = self._draw(st.sampled_from(values))
        assert isinstance(found, str)
        return found

    def _file(self, sectors: int, *, empty: bool = False) -> tuple[Path, Disk]:
        self._files += 1
        path = self._folder / f"file{self._files}"
        disk = Disk(bytes(sectors * SECTOR) if empty else random.Random(self._files).randbytes(sectors * SECTOR))
        path.write_bytes(b"".join(disk.sectors))
        self.disks.append((path, disk))
        return path, disk

    def _open(self, name: str, table: str, model: Concatenated) -> tuple[str, Concatenated]:
        note(f"{name}:\n{table}")
        engine = next(iter(self.devices.values())).engine if self.devices else None
        self.devices[name] = blkloom.open(table, name=name, devices=self.devices, engine=engine)
        self._models[name] = model
        return name, model

    def device(self, depth: int, least: int, *, sound: bool, simple: bool) -> tuple[str, Concatenated]:
        """A device of at least so many sectors, and its model. sound: nothing below it may fail or drop. simple: all
        targets above it have no state of their own.
        """
        if depth and not self._mirrors and self._number(0, 5) == 0:
            return self._snapshot(depth, least)
        if not depth and self._number(0, 3) == 0:
            name, disk = f"ram{len(self.devices)}", Disk(bytes(least * SECTOR))
            return self._open(name, f"0 {least} ram", Concatenated([(least, disk)]))
        lines: list[str] = []
        segments: list[tuple[int, Node]] = []
        torn: list[tuple[int, Torn]] = []
        at = 0
        while at < least or (len(lines) < 3 and self._number(0, 1)):
            sectors, line, model = self._segment(depth, max(1, least - at), at, sound=sound, simple=simple)
            if isinstance(model, Torn) and simple:
                torn.append((at, model))
            lines.append(f"{at} {sectors} {line}")
            segments.append((sectors, model))
            at += sectors
        name = f"d{len(self.devices)}"
        self.torn += [(name, first, model) for first, model in torn]
        return self._open(name, "\n".join(lines), Concatenated(segments))

    def _snapshot(self, depth: int, least: int) -> tuple[str, Concatenated]:
        """A snapshot whose origin is written to, too."""
        lower, model = self.device(depth - 1, least, sound=True, simple=False)
        sectors, chunk = model.sectors, 1 << self._number(0, 4)
        store, _ = self._file(chunk * (2 * (sectors // chunk) + 40), empty=True)
        self.disks.pop()
        options = self._choice("", " 1 discard_zeroes_cow")
        line = f"snapshot blkloom:{lower} {store} {self._choice('P', 'PO', 'N')} {chunk}{options}"
        copy = Snapshot([model.get(sector) for sector in range(sectors)])
        found = self._open(f"snapshot{len(self.devices)}", f"0 {sectors} {line}", Concatenated([(sectors, copy)]))
        origin = f"0 {sectors} snapshot-origin blkloom:{lower}"
        self.handles.append(self._open(f"origin{len(self.devices)}", origin, Concatenated([(sectors, model)])))
        return found

    def _lower(self, depth: int, sectors: int, *, sound: bool, simple: bool) -> tuple[str, int, Node]:
        """What a segment of so many sectors is on: path, first sector, model."""
        first = self._number(0, 3)
        if not depth:
            path, disk = self._file(first + sectors + self._number(0, 3))
            return str(path), first, disk
        name, model = self.device(depth - 1, first + sectors, sound=sound, simple=simple)
        return f"blkloom:{name}", first, model

    def _segment(self, depth: int, wanted: int, at: int, *, sound: bool, simple: bool) -> tuple[int, str, Node]:
        """Sectors, the words of the target, and the model of a segment that begins at sector `at`."""
        kinds = ["linear", "striped", "unstriped", "delay", "throttle", "log-writes", "flakey, up"]
        kinds += ["torn", "torn", "torn", "mirror"]
        if not depth:
            kinds += ["loop"]
        if not sound:
            kinds += ["zero", "error", "error with options", "error with options", "flakey, down", "dust"]
        kind = self._choice(*kinds)
        sectors = self._number(max(2, min(wanted, MOST_SECTORS)), MOST_SECTORS)
        match kind:
            case "zero":
                return sectors, "zero", Zero()
            case "error":
                # A discard of nothing fails, too.
                return sectors, "error", Faulty(Zero(), 0, errors=dict.fromkeys(("read", *CHANGES), errno.EIO))
            case "striped":
                stripes, chunk = self._number(1, 3), self._number(1, 4)
                rows = -(-sectors // (stripes * chunk))
                lowers = [self._lower(depth, rows * chunk, sound=sound, simple=simple) for _ in range(stripes)]
                words = " ".join(f"{path} {first}" for path, first, _ in lowers)
                node = Striped([(lower, first) for _, first, lower in lowers], chunk)
                return rows * stripes * chunk, f"striped {stripes} {chunk} {words}", node
            case "unstriped":
                stripes, chunk = self._number(1, 3), self._number(1, 4)
                stripe, rows = self._number(0, stripes - 1), -(-sectors // chunk)
                path, first, lower = self._lower(depth, rows * chunk * stripes, sound=sound, simple=simple)
                unstriped = Unstriped(lower, first, stripes=stripes, chunk=chunk, stripe=stripe)
                return rows * chunk, f"unstriped {stripes} {chunk} {stripe} {path} {first}", unstriped
            case "mirror":
                sectors = max(sectors, 2)
                self._mirrors += 1
                legs = [self._lower(depth, sectors, sound=True, simple=False) for _ in range(self._number(2, 3))]
                self._mirrors -= 1
                words = " ".join(f"{path} {first}" for path, first, _ in legs)
                line = f"mirror core 1 {self._choice('2', '2', '4')} {len(legs)} {words}"
                line = line if sectors >= 4 else line.replace("core 1 4", "core 1 2")
                for _, first, lower in legs[1:]:
                    for sector in range(sectors):
                        lower.put(first + sector, legs[0][2].get(legs[0][1] + sector))
                return sectors, line, Mirror([Node(lower, first) for _, first, lower in legs])
            case "log-writes":
                return self._log_writes(depth, sectors, at, sound=sound, simple=simple)
            case _:
                stateless = kind not in ("torn", "dust")
                path, first, lower = self._lower(
                    depth, sectors, sound=sound or not stateless, simple=simple and stateless
                )
                return sectors, *self._on_one(kind, path, first, lower, sectors)

    def _log_writes(self, depth: int, sectors: int, at: int, *, sound: bool, simple: bool) -> tuple[int, str, Node]:
        log, _ = self._file(4096, empty=True)
        self.disks.pop()
        # The segment is at its own place in the lower device.
        if depth:
            name, lower = self.device(depth - 1, at + sectors, sound=sound, simple=simple)
            return sectors, f"log-writes blkloom:{name} {log}", Node(lower, at)
        path, disk = self._file(at + sectors)
        return sectors, f"log-writes {path} {log}", Node(disk, at)

    def _on_one(self, kind: str, path: str, first: int, lower: Node, sectors: int) -> tuple[str, Node]:
        place = f"{path} {first}"
        match kind:
            case "linear":
                return f"linear {place}", Node(lower, first)
            case "loop":
                return f"loop {path} {first * SECTOR}", Node(lower, first)
            case "delay":
                times = [self._choice("0", "1") for _ in range(3)]
                return "delay " + " ".join(f"{place} {time}" for time in times), Node(lower, first)
            case "throttle":
                return f"throttle {place} 2 iops=1000000 bps_wr=100m", Node(lower, first)
            case "flakey, up":
                down, features = self._choice(("0"), str(LATE)), self._choice("", " 1 drop_writes", " 1 error_reads")
                return f"flakey {place} {LATE} {down}{features}", Node(lower, first)
            case "flakey, down":
                return self._flakey(place, first, lower)
            case "error with options":
                return self._error(place, first, lower, sectors)
            case "dust":
                block = 1 << self._number(0, 1)
                bad = {self._number(first, first + sectors - 1) // block for _ in range(self._number(0, 4))}
                return f"dust {place} {block * SECTOR}", Dust(lower, first, block=block, bad=bad)
            case _:
                self.caches.append(Torn(lower, first, sectors))
                return f"torn {place}", self.caches[-1]

    def _flakey(self, place: str, first: int, lower: Node) -> tuple[str, Node]:
        features = self._choice("", "1 error_reads", "1 error_writes", "1 drop_writes", "2 error_reads drop_writes")
        errors = dict.fromkeys(("read",), errno.EIO) if not features or "error_reads" in features else {}
        if not features or "error_writes" in features:
            errors |= dict.fromkeys((*CHANGES, "flush"), errno.EIO)
        node = Faulty(lower, first, errors=errors, drops="drop_writes" in features)
        return f"flakey {place} 0 {LATE} {features}".rstrip(), node

    def _error(self, place: str, first: int, lower: Node, sectors: int) -> tuple[str, Node]:
        names = ("read", *CHANGES, "flush")
        chosen = sorted({self._choice(*names) for _ in range(self._number(1, 3))}, key=names.index)
        start = self._number(0, sectors - 1)
        count = self._number(1, sectors - start)
        name = self._choice(*ERRNOS)
        node = Faulty(lower, first, errors=dict.fromkeys(chosen, ERRNOS[name]), sectors=range(start, start + count))
        return f"error {place} 3 operations={'+'.join(chosen)} range={start}+{count} errno={name}", node

    def begin(self) -> None:
        """Waits until mirrors are in sync, and makes bad blocks bad."""
        for name, device in self.devices.items():
            for number, (first, model) in enumerate(self._segments(name)):
                if isinstance(model, Mirror):
                    wait_for_sync(device, number)
                if isinstance(model, Dust):
                    for text in ("quiet", *(f"addbadblock {block}" for block in sorted(model.bad)), "enable"):
                        device.message(first, text.split())

    def _segments(self, name: str) -> Iterator[tuple[Sectors, Node]]:
        """First sector and model of each segment."""
        at = 0
        for count, node in self._models[name].segments:
            yield Sectors(at), node
            at += count

    def close(self) -> None:
        """Without an error of the last flush: it is what some disks are for."""
        while self.devices:
            with suppress(LostData, OSError):
                self.devices.popitem()[1].close()


def wait_for_sync(device: blkloom.Device, number: int) -> None:
    """Until the mirror in a segment has copied its first leg to the others."""
    end = time.monotonic() + PATIENCE
    while True:
        status = device.status()[number][3]
        done, _, regions = status.split()[-5].partition("/")
        if done == regions:
            return
        assert time.monotonic() < end, status
        time.sleep(0.001)


class Requests:
    """Requests to a device and its model."""

    def __init__(self, device: blkloom.Device, model: Concatenated) -> None:
        self._device = device
        self._model = model

    def _expect(
        self, what: str, errors: set[int], call: Callable[[], object], *, or_errors: Set[int] = frozenset()
    ) -> bool:
        """Whether it succeeds, as the model says. or_errors: it may also fail with these."""
        found = 0
        try:
            call()
        except OSError as error:
            found = error.errno or -1
        allowed = (errors or {0}) | or_errors
        assert found in allowed, f"{what}: errno {found}, expected one of {sorted(allowed)}"
        return not found

    def _errors(self, op: str, first: int, count: int) -> set[int]:
        return {run.error for run in runs(self._model, op, first, count)} - {0}

    def read(self, first: int, count: int) -> None:
        """Compares contents and errors."""
        found: list[bytes] = []
        what = f"read {first}+{count}"
        if self._expect(
            what,
            self._errors("read", first, count),
            lambda: found.append(bytes(self._device.pread(count * SECTOR, first * SECTOR))),
        ):
            for sector in range(count):
                expected = self._model.get(first + sector)
                assert found[0][sector * SECTOR :][:SECTOR] == expected, f"{what}: sector {first + sector}"

    def read_all(self) -> None:
        """Reads each run of sectors."""
        for run in list(runs(self._model, "read", 0, self._model.sectors)):
            self.read(run.first, run.length)

    def change(self, op: str, first: int, count: int, data: bytes, *, fua: bool) -> None:
        """A write, write-zeroes or discard."""
        at, length = first * SECTOR, count * SECTOR
        errors = self._errors(op, first, count)
        calls: dict[str, Callable[[], object]] = {
            "write": lambda: self._device.pwrite(data, at, fua=fua),
            "write_zeroes": lambda: self._device.write_zeroes(at, length),
            "discard": lambda: self._device.discard(at, length),
        }
        # With a target that has a flush of its own, a durable write flushes the whole device.
        flushing = self._model.flush_errors() if fua else set()
        if not self._expect(f"{op} {first}+{count}", errors, calls[op], or_errors=flushing):
            # What it has done is not known.
            for run in [run for run in runs(self._model, op, first, count) if not run.error]:
                skip = (run.first - first) * SECTOR
                self.change(
                    op, run.first, run.length, data[skip : skip + run.length * SECTOR], fua=fua and not flushing
                )
            return
        for sector in range(count):
            if op == "discard":
                self._adopt_discard(first + sector)
            else:
                written = data[sector * SECTOR :][:SECTOR] if op == "write" else ZEROS
                self._model.put(first + sector, written, durable=fua)

    def _adopt_discard(self, sector: int) -> None:
        """A discard leaves what was there, or zeros. What cannot be read is written again."""
        if not self._model.discards(sector):
            return
        if self._model.error("read", sector):
            self.change("write", sector, 1, ZEROS, fua=False)
            return
        found = bytes(self._device.pread(SECTOR, sector * SECTOR))
        assert found in (ZEROS, self._model.get(sector)), f"sector {sector} after a discard"
        self._model.put(sector, found)

    def can_discard(self, first: int, count: int) -> bool:
        """Whether the test can find out what a discard has done."""
        unknown = [
            sector
            for sector in range(first, first + count)
            if self._model.error("read", sector) and self._model.error("write", sector)
        ]
        return all(self._model.error("discard", sector) for sector in unknown)

    def flush(self) -> None:
        """A flush of the whole device."""
        if self._expect("flush", self._model.flush_errors(), self._device.flush):
            self._model.flush()


def lose_power(device: blkloom.Device, first: int, model: Torn, seed: int) -> None:
    """The cut has been: takes the state that the disk shows."""
    device.message(Sectors(first), ["restore", str(seed)])
    model.is_cut = False
    for sector in range(len(model.states)):
        found = bytes(device.pread(SECTOR, (first + sector) * SECTOR))
        assert model.restore(sector, found), f"sector {first + sector} has a state that a flush had made impossible"


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["read"] * 4
            + ["write"] * 6
            + [
                "fua",
                "write_zeroes",
                "write_zeroes",
                "discard",
                "discard",
                "flush",
                "flush",
                "suspend",
                "cut",
                "restore",
            ]
        ),
        st.integers(0, 1 << 16),
        st.integers(1, 2 * MOST_SECTORS),
        st.integers(0, 1 << 16),
    ),
    min_size=40,
    max_size=80,
)


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(st.data(), STEPS)
def test_a_stack_does_what_the_model_does(data: st.DataObject, steps: list[tuple[str, int, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stack = Stack(Path(folder), data.draw)
        try:
            depth = data.draw(st.sampled_from((1, 2, 2, 3)))
            stack.handles.append(stack.device(depth, LEAST_SECTORS, sound=False, simple=True))
            stack.begin()
            run_steps(stack, steps)
        finally:
            stack.close()
        for path, disk in stack.disks:
            assert path.read_bytes() == b"".join(disk.sectors), f"{path.name} after the end"


def run_steps(stack: Stack, steps: list[tuple[str, int, int, int]]) -> None:
    """Executes random requests, and compares all contents at the end."""
    for number, (kind, place, count, seed) in enumerate(steps):
        name, model = stack.handles[place % len(stack.handles)]
        note(f"{number}: {kind} {name} {place} {count} {seed}")
        requests = Requests(stack.devices[name], model)
        first = place % model.sectors
        count = min(count, model.sectors - first)
        match kind:
            case "read":
                requests.read(first, count)
            case "discard" if not requests.can_discard(first, count):
                requests.read(first, count)
            case "write" | "fua" | "write_zeroes" | "discard":
                payload = random.Random(seed).randbytes(count * SECTOR)
                requests.change("write" if kind == "fua" else kind, first, count, payload, fua=kind == "fua")
            case "flush":
                requests.flush()
            case "suspend":
                suspended = list(stack.devices.values())[seed % len(stack.devices)]
                with suppress(OSError):  # its flush may fail
                    suspended.suspend()
                    suspended.resume()
            case _:
                cut_or_restore(stack, kind, seed)
    for device, first, torn in stack.torn:
        if torn.is_cut:
            lose_power(stack.devices[device], first, torn, 0)
    for name, model in stack.handles:
        Requests(stack.devices[name], model).read_all()
    for disk in reversed(stack.caches):
        disk.flush()  # as the end of its device does, whatever is above it


def cut_or_restore(stack: Stack, kind: str, seed: int) -> None:
    if not stack.torn:
        return
    name, first, torn = stack.torn[seed % len(stack.torn)]
    if kind == "cut" and not torn.is_cut:
        stack.devices[name].message(Sectors(first), ["cut"])
        torn.is_cut = True
    elif kind == "restore" and torn.is_cut:
        lose_power(stack.devices[name], first, torn, seed)
