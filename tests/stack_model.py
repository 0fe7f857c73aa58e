"""Slow model of stacked devices: one object for each target, which knows the contents of each sector.

It shares no code with blkloom. A node answers for one sector at a time: the errno of an operation on it, its contents,
and a write. Where the result is not determined (a discard, a power cut), the test passes what it has observed.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from typing_extensions import override

SECTOR = 512
ZEROS = bytes(SECTOR)


class Node:
    """A device or a part of one. Base class: passes all to one lower node, from `offset` on."""

    def __init__(self, lower: Node, offset: int = 0) -> None:
        self.lower = lower
        self.offset = offset

    def place(self, sector: int) -> tuple[Node, int]:
        """Where a sector is."""
        return self.lower, sector + self.offset

    def below(self) -> Sequence[Node]:
        """The lower nodes."""
        return [self.lower]

    def error(self, op: str, sector: int) -> int:
        """The errno of `read`, `write`, `write_zeroes` or `discard`; 0: it succeeds."""
        node, at = self.place(sector)
        return node.error(op, at)

    def flush_errors(self) -> set[int]:
        """The errnos of which a flush has one; none: it succeeds."""
        return {found for node in self.below() for found in node.flush_errors()}

    def get(self, sector: int) -> bytes:
        """The contents."""
        node, at = self.place(sector)
        return node.get(at)

    def put(self, sector: int, data: bytes, *, durable: bool = False) -> None:
        """A write that has succeeded."""
        node, at = self.place(sector)
        node.put(at, data, durable=durable)

    def discards(self, sector: int) -> bool:
        """Whether a discard of the sector has an effect here, or may have: then the test says which."""
        node, at = self.place(sector)
        return node.discards(at)

    def flush(self) -> None:
        """A flush that has succeeded."""
        for node in self.below():
            node.flush()


class Disk(Node):
    """A file or memory."""

    def __init__(self, contents: bytes) -> None:
        self.sectors = [contents[at : at + SECTOR] for at in range(0, len(contents), SECTOR)]

    @override
    def below(self) -> Sequence[Node]:
        return []

    @override
    def error(self, op: str, sector: int) -> int:
        return 0

    @override
    def get(self, sector: int) -> bytes:
        return self.sectors[sector]

    @override
    def put(self, sector: int, data: bytes, *, durable: bool = False) -> None:
        self.sectors[sector] = data

    @override
    def discards(self, sector: int) -> bool:
        return True


class Zero(Node):
    """`zero`, and `error` without a device: reads zeros, drops writes."""

    def __init__(self) -> None:
        """It has no lower node."""

    @override
    def below(self) -> Sequence[Node]:
        return []

    @override
    def error(self, op: str, sector: int) -> int:
        return 0

    @override
    def get(self, sector: int) -> bytes:
        return ZEROS

    @override
    def put(self, sector: int, data: bytes, *, durable: bool = False) -> None:
        return

    @override
    def discards(self, sector: int) -> bool:
        return False


class Striped(Node):
    """Chunks dealt out to the lower nodes in turn."""

    def __init__(self, lowers: Sequence[tuple[Node, int]], chunk: int) -> None:
        """lowers: (node, first sector)."""
        self._lowers = lowers
        self._chunk = chunk

    @override
    def place(self, sector: int) -> tuple[Node, int]:
        row, chunk = divmod(sector // self._chunk, len(self._lowers))
        node, first = self._lowers[chunk]
        return node, first + row * self._chunk + sector % self._chunk

    @override
    def below(self) -> Sequence[Node]:
        return [node for node, _ in self._lowers]


class Unstriped(Node):
    """One stripe of a striped node."""

    def __init__(self, lower: Node, offset: int, *, stripes: int, chunk: int, stripe: int) -> None:
        super().__init__(lower, offset)
        self._stripes, self._chunk, self._stripe = stripes, chunk, stripe

    @override
    def place(self, sector: int) -> tuple[Node, int]:
        chunk = sector // self._chunk * self._stripes + self._stripe
        return self.lower, self.offset + chunk * self._chunk + sector % self._chunk


class Faulty(Node):
    """Operations on some sectors fail, or writes have no effect."""

    def __init__(
        self, lower: Node, offset: int, *, errors: dict[str, int], sectors: range | None = None, drops: bool = False
    ) -> None:
        """errors: errnos by operation (also `flush`). sectors: only these; None: all."""
        super().__init__(lower, offset)
        self._errors = errors
        self._sectors = sectors
        self._drops = drops

    @override
    def error(self, op: str, sector: int) -> int:
        if self._sectors is None or sector in self._sectors:
            if found := self._errors.get(op):
                return found
            if self._drops and op != "read":
                return 0
        return super().error(op, sector)

    @override
    def flush_errors(self) -> set[int]:
        own = {self._errors["flush"]} if "flush" in self._errors else set()
        return own | super().flush_errors()

    @override
    def put(self, sector: int, data: bytes, *, durable: bool = False) -> None:
        if not self._drops:
            super().put(sector, data, durable=durable)

    @override
    def discards(self, sector: int) -> bool:
        return not self._drops and super().discards(sector)

    @override
    def flush(self) -> None:
        if not self._drops:
            super().flush()


class Dust(Node):
    """Blocks whose reads fail until they are written."""

    def __init__(self, lower: Node, offset: int, *, block: int, bad: set[int]) -> None:
        """block: sectors. bad: numbers of blocks, from the start of the lower node on."""
        super().__init__(lower, offset)
        self._block = block
        self.bad = bad

    @override
    def error(self, op: str, sector: int) -> int:
        if op == "read" and (sector + self.offset) // self._block in self.bad:
            return errno.EIO
        return super().error(op, sector)

    def touch(self, sector: int) -> None:
        """A write or discard has reached the sector."""
        self.bad.discard((sector + self.offset) // self._block)

    @override
    def put(self, sector: int, data: bytes, *, durable: bool = False) -> None:
        self.touch(sector)
        super().put(sector, data, durable=durable)

    @override
    def discards(self, sector: int) -> bool:
        self.touch(sector)
        return super().discards(sector)


class Mirror(Node):
    """The same on all lower nodes."""

    def __init__(self, lowers: Sequence[Node]) -> None:
        super().__init__(lowers[0])
        self._lowers = lowers

    @override
    def below(self) -> Sequence[Node]:
        return self._lowers

    @override
    def put(self, sector: int, data: bytes, *, durable: bool = False) -> None:
        for lower in self._lowers:
            lower.put(sector, data, durable=durable)

    @override
    def discards(self, sector: int) -> bool:
        found = [lower.discards(sector) for lower in self._lowers]  # each of them
        return any(found)


class Snapshot(Node):
    """What another node contained, with changes of its own."""

    def __init__(self, sectors: Sequence[bytes]) -> None:
        self._sectors = list(sectors)

    @override
    def below(self) -> Sequence[Node]:
        return []

    @override
    def error(self, op: str, sector: int) -> int:
        return 0

    @override
    def get(self, sector: int) -> bytes:
        return self._sectors[sector]

    @override
    def put(self, sector: int, data: bytes, *, durable: bool = False) -> None:
        self._sectors[sector] = data

    @override
    def discards(self, sector: int) -> bool:
        return True


class Torn(Node):
    """A disk that loses power: the states that each sector may have after that."""

    def __init__(self, lower: Node, offset: int, sectors: int) -> None:
        super().__init__(lower, offset)
        self.states = [[lower.get(offset + sector)] for sector in range(sectors)]
        self.is_cut = False

    @override
    def error(self, op: str, sector: int) -> int:
        return errno.EIO if self.is_cut else super().error(op, sector)

    @override
    def flush_errors(self) -> set[int]:
        return {errno.EIO} if self.is_cut else super().flush_errors()

    @override
    def get(self, sector: int) -> bytes:
        return self.states[sector][-1]

    @override
    def put(self, sector: int, data: bytes, *, durable: bool = False) -> None:
        self.states[sector].append(data)
        if durable:
            self._write_back(sector, data)

    def _write_back(self, sector: int, data: bytes) -> None:
        super().put(sector, data)
        self.states[sector] = [super().get(sector)]  # which may have dropped it

    @override
    def flush(self) -> None:
        for sector, states in enumerate(self.states):
            if len(states) > 1:
                self._write_back(sector, states[-1])
        super().flush()

    def restore(self, sector: int, found: bytes) -> bool:
        """Takes a state after the cut; returns whether it is allowed."""
        if found not in self.states[sector]:
            return False
        self._write_back(sector, found)
        return True


class Concatenated(Node):
    """The segments of a table, one after the other."""

    def __init__(self, segments: Sequence[tuple[int, Node]]) -> None:
        """segments: (sectors, node)."""
        self.segments = segments
        self.sectors = sum(count for count, _ in segments)

    @override
    def place(self, sector: int) -> tuple[Node, int]:
        for count, node in self.segments:
            if sector < count:
                return node, sector
            sector -= count
        raise IndexError(sector)

    @override
    def below(self) -> Sequence[Node]:
        return [node for _, node in self.segments]


class Run(NamedTuple):
    """Sectors on which an operation has the same result. error: an errno, or 0."""

    first: int
    length: int
    error: int


def runs(node: Node, op: str, first: int, count: int) -> Iterator[Run]:
    """The runs of a range, in order."""
    start, error = first, node.error(op, first)
    for sector in range(first + 1, first + count):
        if (found := node.error(op, sector)) != error:
            yield Run(start, sector - start, error)
            start, error = sector, found
    yield Run(start, first + count - start, error)
