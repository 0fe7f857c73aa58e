"""What a target is: the whole contract, on one screen.

A target says where the bytes of a segment are. `parse` reads its arguments, `map` is asked once
when a table loads and answers with extents; from then on the engine moves bytes without Python.
Only what the extents cannot answer comes back, as a *fault*, to one of the handlers below.

Obligations.
- Of the target: it is a value (`parse(format(x)) == x`; a dataclass gives that for nothing).
  State of a loaded target is made in `map`, not before: a table may be loaded more than once, and
  each load gets a copy of its own.
- Of blkloom: what a target defines never runs twice at the same time (`map` aside, before which nothing
  of it runs), so it needs no locks. Handlers run on the device's mapper thread. Offsets are bytes from
  the start of the *segment*; a fault never reaches past it.
- A handler answers by returning (the request is done), by returning `RETRY` (the map has changed,
  look again), or by raising: `FaultError` and any other `OSError` give the request their errno,
  `LaterError` has it wait, everything else is EIO and a traceback in the log. The rest of the device goes
  on working.
- A handler must not do I/O on its own device: that would wait for itself.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, Final, Self, TypeAlias

from blkloom.errors import FaultError, UsageError
from blkloom.target.limits import BlockLimits
from blkloom.units import Bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from typing_extensions import Buffer

    from blkloom._engine import Extent
    from blkloom.table.arguments import Arguments
    from blkloom.target.leg import Leg
    from blkloom.target.opening import Opening


Mapped: TypeAlias = "list[tuple[Bytes, Bytes, Extent]]"
"""Runs: (start, length, extent), without gaps from 0 on."""


class Retry(Enum):
    """The type of `RETRY`."""

    RETRY = "retry"


RETRY: Final = Retry.RETRY
"""A handler's answer "the map has changed (a cluster was installed): look the request up again"."""

DATA: Final = 0
"""`extents` flags (those of NBD's base:allocation): allocated data."""
HOLE: Final = 1
"""`extents` flag: nothing is allocated here."""
ZERO: Final = 2
"""`extents` flag: reads as zeros."""

_ZEROES_AT_ONCE: Final = 1 << 20


class Target(ABC):
    """Subclass, name it, write `parse`, `format` and `map`; handlers as far as extents fault."""

    name: ClassVar[str]
    """The word in the table."""
    syntax: ClassVar[str] = ""
    """The arguments as documentation writes them: `<dev path> <offset>`."""
    summary: ClassVar[str] = ""
    """One line for `blkloom targets`."""
    singleton: ClassVar[bool] = False
    """It must be the only line of its table."""
    modules: ClassVar[tuple[str, ...]] = ()
    """What `map` imports when it first runs and takes long: blkloom's own targets have it imported once for all worker
    processes. Importing it must start no thread.
    """

    whole: bool = False
    """It is the only target of its table and reaches to the end of what it stands for, and will when that has changed
    its size while the device was suspended. Asked after `map`; kept for the next process.
    """

    @classmethod
    @abstractmethod
    def parse(cls, arguments: Arguments) -> Self:
        """The target that a table line describes. Raises TableError, most easily by `Arguments`."""

    def format(self) -> list[str]:
        """The arguments as words, not escaped: `parse` of them gives an equal target."""
        return []

    @abstractmethod
    def map(self, opening: Opening, start: Bytes, length: Bytes) -> Mapped:
        """Where the bytes are: (start, length, extent) runs that cover `length` bytes from 0 on,
        without gaps; starts count from the segment's.

        opening: the way to files, memory and other devices, and whether all must be read-only.
        start: where in the device the segment begins. Raises TableError (`opening.refuse`) or
        BackingError; then the table is not loaded and nothing changes.
        """

    def limits(self) -> BlockLimits:
        """The sizes in which it wants to be read and written; asked while loaded."""
        return BlockLimits()

    def postsuspend(self) -> None:
        """The device has been drained and flushed, and stays suspended: write back what is kept in memory, and
        let others at the files if that is what suspending is for. An OSError puts the device back to work.
        """
        return

    def preresume(self) -> Mapped | None:
        """The device is about to go live, for the first time too. Raising refuses: it stays suspended. None: what
        `map` said holds; otherwise what holds from now on. The only target of a table may return another
        length in total: table and device follow it.
        """
        return None

    def legs(self) -> Sequence[Leg]:
        """What it stands on, as far as its arguments say: devices in it must be loaded before it."""
        return ()

    def status(self) -> str:
        """How it does, for `status`: what the kernel's target of that name says. Asked while loaded."""
        return ""

    def message(self, words: list[str]) -> str | None:
        """Does what `message` asks; an answer, or None. Raises UsageError for what it does not know."""
        raise UsageError(
            f"Invalid argument: target {self.name} understands no message {' '.join(words)!r}",
            cure="it takes none",
        )

    @property
    def flushes(self) -> bool:
        """Whether `flush` wants to be called; asked after `map`.

        Files in extents are synced by the engine; this is for targets that keep something back.
        """
        return type(self).flush is not Target.flush

    def read(self, offset: Bytes, length: Bytes) -> Buffer | Retry:
        """A read the extents did not answer: exactly `length` bytes."""
        raise FaultError(errno.EIO, f"target {self.name} maps no data here and has no read handler")

    def expect(self, reads: Sequence[tuple[Bytes, Bytes]]) -> None:
        """These reads (offset, length) come next, each by itself: a target may do for all of them at once what takes
        long for each. What it raises is logged; the reads come all the same.
        """
        return

    def prepare_writes(self, writes: Sequence[tuple[Bytes, Bytes]]) -> Sequence[int]:
        """These writes (offset, length) came together: a target may do for all at once what takes long for each.
        Returns the numbers of those to which RETRY is the answer now. The others come each by itself, as all do if this
        raises (which is logged): what is wrong with one of them fails no other.
        """
        return ()

    def write(self, offset: Bytes, data: bytes, *, fua: bool) -> Retry | None:
        """A write the extents did not answer. fua: the engine calls `flush` behind it; a target
        without one must make the data durable itself.
        """
        raise FaultError(errno.EROFS, f"target {self.name} is read-only here")

    def write_lazily(self, offset: Bytes, length: Bytes, fetch: Callable[[], bytes], *, fua: bool) -> Retry | None:
        """`write`, of bytes that are copied only if they are fetched: for those who mostly answer RETRY."""
        return self.write(offset, fetch(), fua=fua)

    def full(self, offset: Bytes, length: Bytes, number: int) -> Retry:
        """A write was sent where a cluster table says, and found no space there. number: the errno (ENOSPC, EDQUOT).
        RETRY: there is some now.
        """
        raise FaultError(number, "no space is left where the map leads")

    def flush(self) -> None:
        """Make durable what completed writes left in memory. Concurrent flushes share one call."""
        return

    def sync_failed(self) -> None:
        """A file of the device could not be synced (`File.sync_error`), and every flush fails from now on. For targets
        whose files belong together, or that should not go on writing. Must not fail, nor drain the device.
        """
        return

    def discard(self, offset: Bytes, length: Bytes) -> Retry | None:
        """The range's contents are not needed any more. A hint: targets that write may ignore it."""
        if type(self).write is Target.write:
            raise FaultError(errno.EROFS, f"target {self.name} is read-only here")
        return None

    def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool, fast: bool) -> Retry | None:
        """Make the range read as zeros. fast: raise FaultError(EOPNOTSUPP) rather than take as long
        as a write. Unless overridden it writes zeros through `write`; that does not do for a
        target whose `write` answers RETRY with a cluster table.
        """
        if fast and type(self).write is not Target.write:
            raise FaultError(errno.EOPNOTSUPP, f"target {self.name} has no fast way to write zeros")
        for at in range(offset, offset + length, _ZEROES_AT_ONCE):
            zeroes = bytes(min(_ZEROES_AT_ONCE, offset + length - at))
            if self.write(Bytes(at), zeroes, fua=False) is RETRY:
                raise FaultError(errno.EOPNOTSUPP, f"target {self.name} must define write_zeroes itself")
        return None

    def extents(self, offset: Bytes, length: Bytes) -> Iterable[tuple[Bytes, int]]:
        """What the range holds: (length, flags) runs from `offset` on, one at least; flags of DATA, HOLE | ZERO. As
        many are taken as are wanted, and they may end early.
        """
        return [(length, DATA)]

    def contexts(self) -> Sequence[str]:
        """Metadata contexts it can tell of, besides `base:allocation`: names as NBD writes them, `namespace:leaf`.
        Asked after `map` and after each `preresume`. A device offers those that all of its segments have.
        """
        return ()

    def block_status(self, context: str, offset: Bytes, length: Bytes) -> Iterable[tuple[Bytes, int]]:
        """What `context` says of the range: (length, flags) runs from `offset` on, one at least; as many are taken
        as are wanted, and they may end early. Names come that `contexts` does not have any more, and any others.
        """
        raise FaultError(errno.EINVAL, f"target {self.name} has no metadata context {context!r}")

    def work(self) -> bool:
        """Does a few milliseconds of what no request waits for; whether there is more. Called between faults after
        `LiveSegment.has_work`. What it raises is logged, and ends it.
        """
        return False

    def close(self) -> None:
        """The table is gone. Files and memory from `opening` are closed by it."""
        return
