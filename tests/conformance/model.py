"""Slow model of a device: it computes the results of requests from the text of a table, one run of sectors at a time.

It shares no code with blkloom: it splits tables at spaces and keeps bytes in bytearrays. If a target may choose the
result of a request (a discard that may do nothing, a write that failed in the middle), the model returns all allowed
results, and the test passes the observed one back to the model.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SECTOR = 512


@dataclass
class Backing:
    """Bytes that runs refer to: a file's, or a target's own.

    keeps_discarded: a discard may leave the old bytes where they are.
    """

    content: bytearray
    keeps_discarded: bool = False


@dataclass
class Run:
    """Bytes `start` to `end` of the device: `backing` from `offset` on, zeros, or an error."""

    start: int
    end: int
    kind: str  # "data", "zero", "error"
    writable: bool = True
    backing: Backing | None = None
    offset: int = 0


@dataclass(frozen=True)
class Part:
    """What a request meets of a run, in bytes from the request's start."""

    run: Run
    start: int
    end: int
    at: int
    """Where in the backing."""


class Model:
    """A device as its table promises it.

    files: the contents of every file a table may name, by path. own: contents of targets that are
    neither of files nor built in, by target name. below: the models of devices it may stand on.
    """

    def __init__(
        self,
        table: str,
        files: Mapping[str, bytearray],
        *,
        own: Mapping[str, bytes] | None = None,
        below: Mapping[str, Model] | None = None,
        read_only: bool = False,
    ) -> None:
        self.read_only = read_only
        # A block device discards whole blocks, and the edges of a range not at all.
        self._files = {path: Backing(content, Path(path).is_block_device()) for path, content in files.items()}
        self._own = own or {}
        self._below = below or {}
        self.runs: list[Run] = []
        self.logs: list[str] = []
        """Files that targets write to beside the device."""
        for line in table.strip().splitlines():
            self._add(line.split())
        self.size = self.runs[-1].end
        self.boundaries = sorted({run.start for run in self.runs} | {self.size})

    def _add(self, words: list[str]) -> None:
        start, length, name, *arguments = words
        first, last = int(start) * SECTOR, (int(start) + int(length)) * SECTOR
        if name == "loop":
            backing = self._files[arguments[0]]
            offset = int(arguments[1]) if len(arguments) > 1 else 0
            writable = not self.read_only and "read_only" not in arguments
            # The device below the file system hears of discards then, and may keep what is there.
            backing.keeps_discarded |= any(word.startswith("block_map") for word in arguments)
            self.runs.append(Run(first, last, "data", writable, backing, offset))
        elif name in ("linear", "delay", "dust", "flakey", "full", "pause", "throttle", "torn"):
            self.runs += self._leg(arguments[0], int(arguments[1]) * SECTOR, first, last)
        elif name == "log-writes":
            self.runs += self._leg(arguments[0], first, first, last)
            self.logs.append(arguments[1])
        elif name == "snapshot-origin":
            self.runs += self._leg(arguments[0], first, first, last)
        elif name == "snapshot":
            # What it contains at first is a copy; a discard may do nothing.
            leg = list(self._leg(arguments[0], first, first, last))
            below = b"".join(
                bytes(run.backing.content[run.offset :][: run.end - run.start])
                if run.backing
                else bytes(run.end - run.start)
                for run in leg
            )
            copy = Backing(bytearray(below), keeps_discarded=True)
            self.runs.append(Run(first, last, "data", not self.read_only, copy))
            self.logs.append(arguments[1])
        elif name == "mirror":  # the first leg is copied to the others
            path, offset, *others = arguments[3 + int(arguments[1]) :]
            self.runs += self._leg(path, int(offset) * SECTOR, first, last)
            self.logs += others[::2]
        elif name == "unstriped":
            stripes, chunk, stripe = int(arguments[0]), int(arguments[1]) * SECTOR, int(arguments[2])
            offset = int(arguments[4]) * SECTOR + stripe * chunk
            for number, at in enumerate(range(first, last, chunk)):
                self.runs += self._leg(arguments[3], offset + number * stripes * chunk, at, at + chunk)
        elif name == "striped":
            count, chunk = int(arguments[0]), int(arguments[1]) * SECTOR
            legs = [(arguments[2 + 2 * i], int(arguments[3 + 2 * i]) * SECTOR) for i in range(count)]
            for number, at in enumerate(range(first, last, chunk)):
                path, offset = legs[number % count]
                self.runs += self._leg(path, offset + number // count * chunk, at, at + chunk)
        elif name in ("zero", "error"):
            self.runs.append(Run(first, last, name, not self.read_only))
        elif name == "ram":
            memory = Backing(bytearray(last - first))
            self.runs.append(Run(first, last, "data", not self.read_only, memory))
        else:
            content = bytearray(self._own[name][: last - first].ljust(last - first, b"\0"))
            self.runs.append(Run(first, last, "data", not self.read_only, Backing(content, keeps_discarded=True)))

    def _leg(self, path: str, offset: int, first: int, last: int) -> Iterator[Run]:
        if not path.startswith("blkloom:"):
            yield Run(first, last, "data", not self.read_only, self._files[path], offset)
            return
        for part in self._below[path.removeprefix("blkloom:")].parts(offset, last - first):
            run = part.run
            yield Run(first + part.start, first + part.end, run.kind, run.writable, run.backing, part.at)

    # What a request may do

    def parts(self, offset: int, length: int) -> Iterator[Part]:
        """The pieces of a range, in order."""
        for run in self.runs:
            first, last = max(run.start, offset), min(run.end, offset + length)
            if first < last:
                yield Part(run, first - offset, last - offset, run.offset + first - run.start)

    def splits(self, offset: int, length: int) -> list[int]:
        """Boundaries strictly inside a range, in bytes from its start."""
        return [boundary - offset for boundary in self.boundaries if offset < boundary < offset + length]

    def errors_of_read(self, offset: int, length: int) -> set[int]:
        """The errnos a read may fail with; none: it must succeed."""
        if offset + length > self.size:
            return {errno.EINVAL}
        return {errno.EIO for part in self.parts(offset, length) if part.run.kind == "error"}

    def errors_of_change(self, offset: int, length: int, past_end: int) -> set[int]:
        """The same for a write, a discard or zeroes; past_end: what it fails with beyond the end."""
        if offset + length > self.size:
            return {past_end}
        found = set()
        for part in self.parts(offset, length):
            if part.run.kind == "error":
                found.add(errno.EIO)
            elif not part.run.writable:
                found.add(errno.EROFS)
        return found

    def read(self, offset: int, length: int) -> bytes:
        """What must be read where `errors_of_read` names none."""
        pieces = []
        for part in self.parts(offset, length):
            count = part.end - part.start
            backing = part.run.backing
            pieces.append(bytes(backing.content[part.at : part.at + count]) if backing else bytes(count))
        return b"".join(pieces)

    def write(self, offset: int, data: bytes) -> None:
        """A write that succeeded."""
        for part in self.parts(offset, len(data)):
            if part.run.backing:
                part.run.backing.content[part.at : part.at + part.end - part.start] = data[part.start : part.end]

    def allowed(self, offset: int, seen: bytes, new: bytes) -> bool:
        """Whether `seen` may be read after a change to `new` that may have happened only in part."""
        old = self.read(offset, len(seen))
        return all(byte in pair for byte, *pair in zip(seen, old, new, strict=True))

    def keeps_discarded(self, offset: int, length: int) -> bool:
        """Whether a discard may leave old bytes in the range."""
        return any(part.run.backing and part.run.backing.keeps_discarded for part in self.parts(offset, length))
