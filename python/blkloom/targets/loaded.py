"""Loaded targets: the map of a segment, and the handlers for requests that the map does not answer.

`map` is a list of extents, which the engine serves without Python. A request that the extents cannot answer becomes a
*fault*: the engine calls one of the handlers below.

What blkloom guarantees:
- Two methods of a loaded target never run at the same time, so a target needs no locks.
- No handler runs before the table is loaded. Handlers run on the device's mapper thread.
- Offsets are bytes from the start of the *segment*. A fault never extends past the segment.

What a target must do:
- Declare the handlers `flush`, `write`, `prefetch` and `prepare_writes` if it defines them (`flushes`, `writes`,
  `prefetches`, `prepares_writes`).
- Make handlers that wait coroutines: `read`, `write`, `write_lazily`, `on_no_space`, `flush`, `discard`,
  `write_zeroes`, `extents`, `block_status` and `message` may be `async def`. The coroutines of a device run in one
  asyncio loop on its mapper thread, at most `most_in_flight` of a class at once. Between two awaits of a coroutine no
  other handler runs.
- Answer each fault. A handler returns (the request is done), returns `RETRY` (the map has changed; the engine looks
  the request up again), or raises: `FaultError` and any other `OSError` give the request their errno, `RetryLater`
  makes the request wait, and any other exception gives EIO and a traceback in the log. Other requests are not affected.
- Do no I/O on its own device in a handler: the I/O would wait for the handler.

Order. A write that was submitted after another write was answered comes after it. Requests in flight together have no
order. A flush covers every write that was answered before the flush was submitted, and the target's changes for those
writes. If two requests go to the same cluster of a cluster table, and a handler of one of them is a coroutine, the
second handler begins after the first has ended. So data that a handler fills in never overwrites a newer write.

Cancellation. A coroutine that changes nothing (`read`, `extents`, `block_status`) is cancelled when its device, or a
device above it, is suspended, and when its client is handed to another process; the request is handled again
afterwards. A coroutine that exceeds the device's `fault_timeout` is cancelled, and so are those that still run at the
end of a close. A cancelled coroutine has five seconds to end, or `fault_timeout` if that is less; after that it is
never resumed.
"""

from __future__ import annotations

import errno
from collections.abc import Coroutine
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias, TypeVar

from blkloom.errors import FaultError, UsageError
from blkloom.targets.limits import BlockLimits
from blkloom.units import Bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from typing_extensions import Buffer

    from blkloom._engine import Extent
    from blkloom.targets.spec import TargetSpec

Mapped: TypeAlias = "list[tuple[Bytes, Bytes, Extent]]"
"""The map of a segment: (start, length, extent) runs from 0 on, without gaps."""


class Retry(Enum):
    """The type of `RETRY`."""

    RETRY = "retry"


RETRY: Final = Retry.RETRY
"""Result of a handler that changed the map, such as by installing a cluster: the engine looks the request up again."""

_T = TypeVar("_T")
Answer: TypeAlias = _T | Coroutine[Any, Any, _T]
"""Result type of a handler: the answer, or a coroutine that returns it (`async def`)."""

DATA: Final = 0
"""`extents` flags (those of NBD's base:allocation): allocated data."""
HOLE: Final = 1
"""`extents` flag: nothing is allocated here."""
ZERO: Final = 2
"""`extents` flag: reads as zeros."""

_ZEROES_AT_ONCE: Final = 1 << 20

_DECLARED: Final = {
    "flush": "flushes",
    "write": "writes",
    "prefetch": "prefetches",
    "prepare_writes": "prepares_writes",
}
"""Handlers, and the attributes that declare them."""


class LoadedTarget:
    """Base class of loaded targets. Used as it is for a target whose map answers every request.

    A subclass opens its resources in the constructor, and defines handlers for its faults.
    """

    flushes: bool = False
    """It has a `flush`, because it buffers writes. The engine syncs the files of extents. Read together with `map`."""
    fua_flushes: bool = True
    """Its `flush` is needed after a durable write (FUA), too. Read together with `map`."""
    writes: bool = False
    """It has a `write`. By default, write-zeroes calls it and discards are ignored. Without it both fail: EROFS."""
    prefetches: bool = False
    """It has a `prefetch`."""
    prepares_writes: bool = False
    """It has a `prepare_writes`."""
    whole: bool = False
    """It is the only target of its table and covers the whole file or image. At a resume it takes the new size if that
    has changed during the suspend. Read after the load; passed on to the next process of the device.
    """

    most_in_flight: ClassVar[int] = 128
    """Maximum number of running coroutine handlers of this class in one device. Other requests wait in order of
    arrival. A flush does not count.
    """
    most_bytes_in_flight: ClassVar[int] = 32 << 20
    """Maximum total bytes of the reads and writes of these handlers. A single request may exceed it."""

    def __init__(self, spec: TargetSpec, map: Mapped) -> None:
        """map: (start, length, extent) runs that cover the segment from 0 on, without gaps; starts count from the start
        of the segment.
        """
        self.spec = spec
        self.map = map

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for handler, declaration in _DECLARED.items():
            if handler in cls.__dict__ and not getattr(cls, declaration):
                raise TypeError(f"{cls.__qualname__} has a handler '{handler}'; say so: {declaration} = True")

    @property
    def name(self) -> str:
        """The name of the target in tables."""
        return self.spec.name

    def limits(self) -> BlockLimits:
        """Its I/O limits (block sizes). Called only while loaded."""
        return BlockLimits()

    def postsuspend(self) -> None:
        """Called after the device was drained and flushed, while it is suspended: write back data in memory, and unlock
        the files if other programs may use them meanwhile. An OSError undoes the suspend.
        """
        return

    def preresume(self) -> Mapped | None:
        """Called before every resume, including the first. If it raises, the device stays suspended. Returns None to
        keep the map, or a new map. The only target of a table may return a map of another total length: table and
        device take over that length.
        """
        return None

    def status(self) -> str:
        """The status text, in the form of the kernel's target of that name. Called only while loaded."""
        return ""

    def message(self, words: list[str]) -> Answer[str | None]:
        """Executes a message; returns an answer or None. Raises UsageError for an unknown message."""
        raise UsageError(
            f"Invalid argument: target {self.name} understands no message '{' '.join(words)}'",
            cure="it takes none",
        )

    def read(self, offset: Bytes, length: Bytes) -> Answer[Buffer | Retry]:
        """Handles a read that the extents did not answer. Returns exactly `length` bytes, or `RETRY`."""
        raise FaultError(errno.EIO, f"target {self.name} maps no data here and has no read handler")

    def prefetch(self, reads: Sequence[tuple[Bytes, Bytes]]) -> None:
        """Announces reads (offset, length) whose `read` is called next, one by one, so that a target can do slow work
        for all of them at once. An exception is logged; the reads follow anyway.
        """
        return

    def prepare_writes(self, writes: Sequence[tuple[Bytes, Bytes]]) -> Sequence[int]:
        """Prepares several writes (offset, length) at once, to share slow work. Returns the indexes of the writes to
        look up again, as after `RETRY`. `write` is called for each of the others. If this raises, the exception is
        logged and `write` is called for all of them, so an error of one write fails no other.
        """
        return ()

    def write(self, offset: Bytes, data: bytes, *, fua: bool) -> Answer[Retry | None]:
        """Handles a write that the extents did not answer. fua: the engine calls `flush` after it; a target without
        `flush` must make the data durable itself.
        """
        raise FaultError(errno.EROFS, f"target {self.name} is read-only here")

    def write_lazily(
        self, offset: Bytes, length: Bytes, fetch: Callable[[], bytes], *, fua: bool
    ) -> Answer[Retry | None]:
        """`write` whose data is copied only if `fetch` is called: for targets that mostly return `RETRY`."""
        return self.write(offset, fetch(), fua=fua)

    def on_no_space(self, offset: Bytes, length: Bytes, number: int) -> Answer[Retry]:
        """Handles a write that failed for lack of space at the position in a cluster table. number: the errno (ENOSPC,
        EDQUOT). Returns `RETRY` if there is space now.
        """
        raise FaultError(number, "no space is left where the map leads")

    def flush(self) -> Answer[None]:
        """Makes completed writes durable that are still in memory. Concurrent flushes share one call."""
        return None

    def sync_failed(self) -> None:
        """Called after a sync of a file of the device failed (`File.sync_error`); every later flush fails. For targets
        with several dependent files, or that must stop writing. Must not fail, and must not drain the device.
        """
        return

    def discard(self, offset: Bytes, length: Bytes) -> Answer[Retry | None]:
        """Discards the range: its contents are not needed any more. A hint that writable targets may ignore."""
        if not self.writes:
            raise FaultError(errno.EROFS, f"target {self.name} is read-only here")
        return None

    def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool, fast: bool) -> Answer[Retry | None]:
        """Makes the range read as zeros. fast: raise FaultError(EOPNOTSUPP) if it would take as long as a write. The
        default calls `write` with zeros. A target whose `write` returns `RETRY` must override it.
        """
        if fast and self.writes:
            raise FaultError(errno.EOPNOTSUPP, f"target {self.name} has no fast way to write zeros")
        steps = range(offset, offset + length, _ZEROES_AT_ONCE)
        pieces = ((Bytes(at), bytes(min(_ZEROES_AT_ONCE, offset + length - at))) for at in steps)
        for at, zeroes in pieces:
            answer = self.write(at, zeroes, fua=False)
            if isinstance(answer, Coroutine):
                return self._write_on(answer, pieces)
            self._check_written(answer)
        return None

    async def _write_on(self, first: Coroutine[Any, Any, Retry | None], pieces: Iterator[tuple[Bytes, bytes]]) -> None:
        """The rest of `write_zeroes` if `write` is a coroutine."""
        self._check_written(await first)
        for at, zeroes in pieces:
            answer = self.write(at, zeroes, fua=False)
            self._check_written(await answer if isinstance(answer, Coroutine) else answer)

    def _check_written(self, answer: Retry | None) -> None:
        if answer is RETRY:
            raise FaultError(errno.EOPNOTSUPP, f"target {self.name} must define write_zeroes itself")

    def extents(self, offset: Bytes, length: Bytes) -> Answer[Iterable[tuple[Bytes, int]]]:
        """Describes the range by (length, flags) runs from `offset` on, at least one; flags are DATA or HOLE | ZERO.
        The caller may stop before the last run, and the runs may end before the range does.
        """
        return [(length, DATA)]

    def contexts(self) -> Sequence[str]:
        """Names of the metadata contexts besides `base:allocation`, in the form of NBD: `namespace:leaf`. Called after
        the load and after each `preresume`. A device offers the contexts that all of its segments have.
        """
        return ()

    def block_status(self, context: str, offset: Bytes, length: Bytes) -> Answer[Iterable[tuple[Bytes, int]]]:
        """Flags of the metadata context for the range: (length, flags) runs from `offset` on, at least one, as in
        `extents`. `context` may be any name, also one that `contexts` does not return any more.
        """
        raise FaultError(errno.EINVAL, f"target {self.name} has no metadata context '{context}'")

    def work(self) -> bool:
        """Does background work for a few milliseconds; returns whether there is more. Called between faults after
        `LiveSegment.has_work`. An exception is logged, and ends the work.
        """
        return False

    def close(self) -> None:
        """Called when the table is closed. The `LoadContext` closes the files and memory that it gave out."""
        return
