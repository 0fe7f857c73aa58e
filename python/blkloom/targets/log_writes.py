"""`log-writes`: a file or device whose writes are also recorded in a log, in the order in which they became durable.

Source: Linux Documentation/admin-guide/device-mapper/log-writes.rst; dm-log-writes.c for the log and the form of the
status. The log can be read by the `replay-log` of xfstests. Writes are recorded when they have completed:
at the next flush all that had completed when it was submitted, and a durable (FUA) write at once. Write-zeroes are
recorded as writes.

The log is that of `write_log.py`. It is continued after an upgrade and by the next process. Writes that had completed
but were not flushed are not in it if the process is killed.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ClassVar, Final

from typing_extensions import override

from blkloom._engine import DelayFilter, Extent
from blkloom.errors import UsageError
from blkloom.table.syntax import Syntax
from blkloom.targets.device_ref import DeviceRef, whole_device
from blkloom.targets.live_segment import LiveSegment
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.lower import LowerBackend
from blkloom.targets.saved_state import SavedState
from blkloom.targets.spec import TargetSpec
from blkloom.units import SECTOR, Bytes, Sectors, to_bytes, to_sectors
from blkloom.write_log import DISCARD, FLUSH, FUA, LONGEST_MARK, MARK, LogEntry, end_of_log, entry_bytes, superblock

_LAST_MARK: Final = b"dm-log-writes-end"


class LogWrites(TargetSpec):
    """A segment that maps to `device`, from the position of the segment on; its writes are recorded in `log`."""

    device: DeviceRef
    log: DeviceRef

    name: ClassVar[str] = "log-writes"
    arguments: ClassVar[Syntax] = (whole_device("device", "dev path"), whole_device("log", "log dev path"))
    summary: ClassVar[str] = "a file or device whose writes are recorded in a log"

    @override
    def device_refs(self) -> Sequence[DeviceRef]:
        return (self.device, self.log)

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return _LoadedLogWrites(self, context, start, length)


class _LoadedLogWrites(LoadedTarget):
    spec: LogWrites

    def __init__(self, spec: LogWrites, context: LoadContext, start: Bytes, length: Bytes) -> None:
        lower = DeviceRef(spec.device.path, to_sectors(start)).extent(context, length)
        size = spec.log.size(context)
        if size < 2 * SECTOR:
            cure = f"at least {2 * SECTOR} bytes, and as much as will be written"
            raise context.refuse("log too small", value=spec.log.path, cure=cure)
        self.writer = LogWriter(
            context.lower(spec.log.extent(context, size), size),
            size,
            context.saved_state(if_lost="its log is continued as far as it is there"),
            context.segment(),
        )
        self._backend = _Recording(context.lower(lower, length), self.writer, start)
        extent = lower
        self._read_only = context.read_only
        if not self._read_only:
            self.writer.begin()
            queue = context.backend(self._backend)
            extent = Extent.filtered(DelayFilter(0, 0), lower, Extent.backend(queue, 0))  # reads need no look
        super().__init__(spec, [(Bytes(0), length, extent)])

    @override
    def message(self, words: list[str]) -> None:
        if len(words) < 2 or words[0].lower() != "mark":
            raise UsageError(f"Invalid argument: unrecognized message '{' '.join(words)}'", cure="mark <text>")
        mark = " ".join(words[1:]).encode(errors="surrogateescape")
        if len(mark) > LONGEST_MARK:
            raise UsageError(f"a mark of {len(mark)} bytes is too long", cure=f"at most {LONGEST_MARK} bytes")
        if self._read_only:
            raise UsageError("a read-only device records nothing", cure="load the table for writing")
        self._backend.mark(mark)

    @override
    def status(self) -> str:
        writer = self.writer
        return f"{writer.entries} {writer.next - 1}{'' if writer.enabled else ' logging_disabled'}"


class LogWriter:
    """Appends entries to a log. enabled: False after it was full or has failed. entries: their number. next: first free
    sector.
    """

    def __init__(self, lower: LowerBackend.Lower, size: Bytes, saved: SavedState, segment: LiveSegment) -> None:
        self._lower = lower
        self._view = LowerBackend(lower)
        self._size = to_sectors(size)
        self._saved = saved
        self._segment = segment
        self._token = os.urandom(8).hex()
        self.entries = 0
        self.next = 1
        self.enabled = True

    def begin(self) -> None:
        """Begins a new log, or goes on with that of a former process. Raises OSError, UsageError."""
        former = self._saved.read()
        if self._saved.is_lost:
            self.entries, self.next = end_of_log(self._lower.pread)
        elif former is None:
            self._lower.pwrite(superblock(0), 0, fua=True)
        else:
            _, self.entries, self.next, self.enabled = former
        self._save()

    def _save(self) -> None:
        self._saved.save((self._token, self.entries, self.next, self.enabled))

    @property
    def is_handed_over(self) -> bool:
        """Whether another process has begun to write the log."""
        former = self._saved.read()
        return former is None or former[0] != self._token

    async def append(self, entries: Sequence[LogEntry]) -> None:
        """Makes the entries durable. One task at a time. A log that is full or fails ends the recording, as in the
        kernel, and not the writing. Raises OSError if the state cannot be saved.
        """
        if not self.enabled:
            return
        log = self._view.lower
        try:
            for entry in entries:
                if self.enabled:
                    await self._append(entry)
            await log.flush()
            await log.pwrite(superblock(self.entries), 0, fua=True)
        except OSError as error:
            why = os.strerror(error.errno or errno.EIO)
            self._end(f"the log of writes cannot be written after {self.entries} entries: {why}")
        self._save()

    def _end(self, why: str) -> None:
        self.enabled = False
        self._segment.event(f"{why}: no more is recorded")

    async def _append(self, entry: LogEntry) -> None:
        length = 1 + len(entry.data) // SECTOR
        if self.next + length > self._size:
            self._end(f"the log of writes is full after {self.entries} entries")
            return
        await self._view.lower.pwrite(entry_bytes(entry), to_bytes(Sectors(self.next)))
        self.next += length
        self.entries += 1

    async def close(self) -> None:
        """Closes the log, not the lower device."""
        await self._view.close()


class _Recording(LowerBackend):
    """Writes to the lower device, and records what has completed."""

    def __init__(self, lower: LowerBackend.Lower, writer: LogWriter, start: Bytes) -> None:
        super().__init__(lower)
        self._writer = writer
        self._start = start
        self._alone = asyncio.Lock()
        """Held by the task that appends to the log."""
        self._completed: list[LogEntry] = []
        """Since the last flush."""

    @override
    async def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:
        await super().write(offset, data, fua=fua)
        entry = self._entry(offset, Bytes(len(data)), FUA if fua else 0, data)
        if fua:
            await self._append([entry])
        else:
            self._completed.append(entry)

    @override
    async def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool) -> None:
        await super().write_zeroes(offset, length, may_unmap=may_unmap)
        self._completed.append(self._entry(offset, length, 0, bytes(length)))

    @override
    async def discard(self, offset: Bytes, length: Bytes) -> None:
        await super().discard(offset, length)
        self._completed.append(self._entry(offset, length, DISCARD))

    @override
    async def flush(self) -> None:
        await self._flush(super().flush)

    @override
    async def flush_for_suspend(self) -> None:
        await self._flush(super().flush_for_suspend)

    async def _flush(self, flush_lower: Callable[[], Coroutine[Any, Any, None]]) -> None:
        completed, self._completed = self._completed, []
        try:
            await flush_lower()
        except OSError:  # the next flush covers them
            self._completed[:0] = completed
            raise
        await self._append([*completed, LogEntry(0, 0, FLUSH)])

    def _entry(self, offset: Bytes, length: Bytes, flags: int, data: bytes = b"") -> LogEntry:
        return LogEntry(to_sectors(Bytes(self._start + offset)), to_sectors(length), flags, data)

    def mark(self, text: bytes) -> None:
        """Records a mark. On any thread but that of the backend. Raises OSError."""
        self.run(self._append([LogEntry(0, 0, MARK, mark=text)]))

    async def _append(self, entries: Sequence[LogEntry]) -> None:
        async with self._alone:
            await self._writer.append(entries)

    @override
    async def close(self) -> None:
        try:
            if not self._writer.is_handed_over:
                await self._append([*self._completed, LogEntry(0, 0, MARK, mark=_LAST_MARK)])
        finally:
            await self._writer.close()
            await super().close()
