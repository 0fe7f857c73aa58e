"""A copy of a whole device to another: opened, moved by the engine, flushed, verified, and continued after an end.

The engine's threads move the bytes (`DeviceCopy`). The thread of the caller waits for them, and for signals: an
exception of a signal handler, like any other, ends the copy after the requests in flight. Meanwhile it flushes the
target from time to time and notes in the journal what is durable. May fail: CopyFailed, ContentsDiffer, LostData,
JournalError, and what opening a device raises.
"""

from __future__ import annotations

import errno
import logging
import os
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from blkloom import _engine
from blkloom.copying.ends import End, NewTarget, Part, file_end, inode_at
from blkloom.copying.failing import ContentsDiffer, CopyFailed, lost
from blkloom.copying.journal import SUFFIX, Journal, check_replaceable, forget, remove, sync_folder
from blkloom.copying.lower import below, number_at
from blkloom.device.device import Device
from blkloom.errors import BlkloomError, Place, UsageError
from blkloom.table import Segment, Table
from blkloom.targets.device_ref import DeviceRef
from blkloom.targets.holding import SharedFiles
from blkloom.targets.throttle import Throttle
from blkloom.units import SECTOR, Bytes, Sectors, format_size, to_sectors

if TYPE_CHECKING:
    from types import TracebackType

_log = logging.getLogger(__name__)

REQUESTS: Final = 16
REQUEST_SIZE: Final = 256 << 10
CHECKPOINT: Final = 256 << 20
SPARSE: Final = 4096
_REFRESH: Final = 0.2
"""Seconds between two calls of `progress`."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a copy. rate: most bytes of the source a second; 0: no limit. sparse: blocks of this size that are
    zeros become holes; 0: none are looked for. allocated: zeros take space in the target. state: path of the journal;
    "": beside a target that is a file. checkpoint: bytes between two entries in the journal.
    """

    requests: int = REQUESTS
    request_size: int = REQUEST_SIZE
    rate: int = 0
    sparse: int = SPARSE
    allocated: bool = False
    direct_io: bool = False
    shared: bool = False
    flush: bool = True
    verify: bool = False
    resume: bool = False
    state: str = ""
    checkpoint: int = CHECKPOINT


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What was copied, in bytes. data: read and written. zeroes: not read, because the source says that they are zeros.
    start: what an earlier run has copied.
    """

    size: int
    data: int
    zeroes: int
    start: int
    verified: bool


Progress = Callable[[str, int], None]
"""Called with "copying" or "verifying", and how many bytes of the size are done."""


class Copying:
    """One run, with an engine of its own. A context manager that closes the engine; close the devices before."""

    def __init__(self, source: End, settings: Settings, progress: Progress, *, ticking: bool) -> None:
        """ticking: `progress` is called several times a second; otherwise at every checkpoint."""
        self._source = source
        self._settings = settings
        self._progress = progress
        self._refresh = _REFRESH if ticking else None
        self._engine = _engine.Engine()
        self._files = SharedFiles()
        self._lost = False
        """A flush has failed. A server may report that once only: no later flush makes it good."""
        self.journal_path = ""
        """Where the journal is; "": there is none."""
        self.position = 0
        """Bytes that the journal says to be durable."""

    def __enter__(self) -> Copying:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._engine.close()

    def to(self, target: End | NewTarget) -> Result:
        """Copies. target: an existing one, which is overwritten, or one to make."""
        settings, size = self._settings, self._source.size
        self.journal_path = self._place_of_journal(target)
        if self.journal_path:
            check_replaceable(self.journal_path, (self._source.path, target.path))
        with self._opened(self._source, writable=False) as source:
            self._check_apart(target)
            target, start, fresh = self._prepared(target)
            if target.size < size:
                raise UsageError(
                    f"{target.name} has {format_size(target.size)} ({target.size} bytes), "
                    f"{self._source.name} {format_size(size)} ({size} bytes)",
                    cure="the target must not be smaller",
                )
            with self._opened(target, writable=True) as opened, self._throttled(source) as limited:
                if not fresh and not start:
                    self._begin(target, fresh=False)  # not before it is claimed, and known to be large enough
                counts = self._copy((source, limited), opened, target, start, fresh=fresh)
                self._give_size(target, size if fresh else target.size)
                if settings.flush:
                    self._flush(opened, target)
                if fresh and settings.flush:
                    sync_folder(os.path.realpath(target.path))
                if self.journal_path:
                    self._save(target, size, fresh=fresh)
        if settings.verify:
            try:
                self._verify(target)
            except ContentsDiffer:
                if self.journal_path:  # to continue would copy nothing
                    remove(self.journal_path)
                    self.journal_path = ""
                raise
        if self.journal_path:
            remove(self.journal_path)
        return Result(size=size, data=counts[0], zeroes=counts[1], start=start, verified=settings.verify)

    # The target

    def _place_of_journal(self, target: End | NewTarget) -> str:
        if self._settings.state or not self._settings.flush:
            return self._settings.state
        is_file = isinstance(target, NewTarget) or target.file
        return target.path + SUFFIX if is_file else ""

    def _check_apart(self, target: End | NewTarget) -> None:
        """Checks that neither end is, or is on, the other: what is read would be overwritten. Raises UsageError."""
        source = self._source
        number = number_at(target.path) if target.path else None
        parts: set[Part] = set() if number is None else {number}
        if isinstance(target, End):
            parts |= target.itself
        if parts & source.itself:
            what = f"{target.name} and {source.name} are the same"
        elif parts & (source.below | self._files.identities):
            what = f"{source.name} is on {target.name}, which would be overwritten while it is read"
        elif number is not None and source.number in below(number, mapped=False):
            what = f"{target.name} is on {source.name}, which would be overwritten while it is read"
        else:
            return
        raise UsageError(what, cure="copy to another file or device")

    def _prepared(self, target: End | NewTarget) -> tuple[End, int, bool]:
        """(target, where to begin, whether this copy has made it). Makes it, and the journal, unless they are there."""
        known = self._known(target) if self._settings.resume else None
        if known is not None and (not known.fresh or known.copied):
            found = target
            if isinstance(found, NewTarget):
                form = str(known.target.get("format", "auto"))
                found = file_end(found.path, name=found.name, format=form, contents=False)
            known.check_continues(self._journal(found, 0, fresh=known.fresh), self.journal_path)
            self.position = known.copied
            if found.file and found.format == "raw" and 0 < found.size - known.target_size < SECTOR:
                found = msgspec.structs.replace(found, size=known.target_size)  # see `_give_size`
            return found, known.copied, known.fresh
        if isinstance(target, End):
            return target, 0, False
        if known is not None:
            if _has_contents(target.path):
                known.check_made(inode_at(target.path), self.journal_path)
            target = msgspec.structs.replace(target, overwrite=True)
        return target.make(lambda made: self._begin(made, fresh=True)), 0, True

    def _known(self, target: End | NewTarget) -> Journal | None:
        """The journal of an earlier run. None: there was none, and nothing of the target is there."""
        if not self.journal_path:
            raise UsageError("nothing says where this copy was interrupted", cure="name the file: --state PATH")
        known = Journal.read(self.journal_path)
        if known is None and (isinstance(target, End) or _has_contents(target.path)):
            what = f"no copy to {target.name} was interrupted: there is no {self.journal_path}"
            raise UsageError(what, cure="leave out --resume, or say where the state of the copy is: --state PATH")
        return known

    def _begin(self, target: End, *, fresh: bool) -> None:
        """Notes that nothing is copied, before the first change of the target. What an earlier copy has noted is wrong
        from then on.
        """
        if target.file and self.journal_path != target.path + SUFFIX:
            forget(target.path + SUFFIX)
        self._save(target, 0, fresh=fresh)

    def _give_size(self, target: End, size: int) -> None:
        """Removes the bytes by which a write to a partial last sector has extended a raw file."""
        if target.file and target.format == "raw" and os.stat(target.path).st_size != size:
            os.truncate(target.path, size)

    # Devices

    @contextmanager
    def _opened(self, end: End, *, writable: bool, direct_io: bool = False) -> Iterator[Device]:
        settings = self._settings
        device = Device(
            end.table,
            engine=self._engine,
            name=end.name,
            read_only=not writable,
            direct_io=direct_io or settings.direct_io,
            shared=settings.shared,
            held=self._files if end is self._source and not direct_io else None,
        )
        # The flush writes the metadata of an image.
        flush = writable and (settings.flush or end.format != "raw")
        try:
            yield device
        except BaseException:
            try:
                device.close(flush=flush)
            except OSError as error:
                _log.error("%s: %s", end.name, error)
            raise
        device.close(flush=flush)

    @contextmanager
    def _throttled(self, source: Device) -> Iterator[Device]:
        """The source with the limit of its rate."""
        if not self._settings.rate or not source.size:
            yield source
            return
        target = Throttle(DeviceRef("blkloom:source", Sectors(0)), bps_rd=self._settings.rate)
        segment = Segment(Sectors(0), to_sectors(Bytes(source.size)), target, Place("--rate"))
        devices = {"source": source}
        with Device(
            Table((segment,)), engine=self._engine, name=source.name, read_only=True, devices=devices
        ) as limited:
            yield limited

    # Moving

    def _copy(
        self, sources: tuple[Device, Device], opened: Device, target: End, start: int, *, fresh: bool
    ) -> tuple[int, int]:
        """Copies from `start` on. sources: without and with the limit of the rate, which may be the same."""
        unlimited, source = sources
        settings, size = self._settings, self._source.size
        zeroes: Literal["skip", "unmap", "allocate"] = "skip" if fresh and not start else "unmap"
        copy = _engine.DeviceCopy(
            source,
            opened,
            start=start,
            end=size,
            request_size=settings.request_size,
            requests=settings.requests,
            zeroes="allocate" if settings.allocated else zeroes,
            detect_zeroes=0 if settings.allocated else settings.sparse,
        )
        try:
            self._wait(copy, "copying", start, lambda: self._checkpoint(copy, opened, target, fresh=fresh))
        except BaseException:
            copy.stop()
            # First: what is in flight may never end, if a server does not answer.
            self._note_end(copy, opened, target, fresh=fresh)
            self._stop(copy, source, unlimited)
            raise
        try:
            self._check_complete(copy, target)
        except CopyFailed:
            self._note_end(copy, opened, target, fresh=fresh)
            raise
        return copy.counts

    def _stop(self, copy: _engine.DeviceCopy, source: Device, unlimited: Device) -> None:
        """Ends a copy after what is in flight."""
        copy.stop()
        if source is not unlimited:
            try:
                source.close(flush=False)  # ends what waits for the rate
            except OSError as error:
                _log.error("%s: %s", self._source.name, error)
        copy.close()

    def _check_complete(self, copy: _engine.DeviceCopy, target: End) -> None:
        """Raises CopyFailed, ContentsDiffer."""
        if (failure := copy.failure) is not None:
            side, operation, offset, length, number = failure
            if not number:
                raise ContentsDiffer(self._source.name, target.name, offset)
            name = self._source.name if side == "source" else target.name
            raise CopyFailed(name, side, operation, offset, length, number)
        if (position := copy.position) < self._source.size:  # a thread has panicked
            raise CopyFailed(target.name, "target", "copy", position, self._source.size - position, errno.EIO)

    def _wait(self, copy: _engine.DeviceCopy, what: str, start: int, checkpoint: Callable[[], None]) -> None:
        """Waits for the end of a copy."""
        step = self._settings.checkpoint
        due = start + step
        self._progress(what, start)
        while not copy.ended:
            copy.watch(due)
            select.select([copy], [], [], self._refresh)
            position = copy.position
            self._progress(what, position)
            if position >= due and not copy.ended:
                checkpoint()
                due = position + step
        self._progress(what, copy.position)

    def _checkpoint(self, copy: _engine.DeviceCopy, opened: Device, target: End, *, fresh: bool) -> None:
        if self.journal_path:
            position = copy.position  # before the flush, which covers what was written before it
            self._flush(opened, target)
            self._save(target, position, fresh=fresh)

    def _note_end(self, copy: _engine.DeviceCopy, opened: Device, target: End, *, fresh: bool) -> None:
        """A checkpoint at an early end. If it fails, the last one counts."""
        if self._lost:
            return
        try:
            self._checkpoint(copy, opened, target, fresh=fresh)
        except (BlkloomError, OSError) as error:
            _log.error("%s", error)

    def _flush(self, opened: Device, target: End) -> None:
        try:
            opened.flush()
        except OSError as error:
            self._lost = True
            raise lost(target.name, error) from error

    def _verify(self, target: End) -> None:
        """Reads both from the disk, where that is possible, and compares."""
        size = self._source.size
        if target.file and target.format == "raw":  # `_give_size` may have changed its table
            target = file_end(target.path, name=target.name, format="raw", contents=False)
        with (
            self._opened(self._source, writable=False, direct_io=True) as source,
            self._opened(target, writable=False, direct_io=True) as opened,
            self._throttled(source) as limited,
        ):
            copy = _engine.DeviceCopy(
                limited,
                opened,
                start=0,
                end=size,
                request_size=self._settings.request_size,
                requests=self._settings.requests,
                compare=True,
            )
            try:
                self._wait(copy, "verifying", 0, lambda: None)
            finally:
                self._stop(copy, limited, source)
            self._check_complete(copy, target)

    # The journal

    def _journal(self, target: End, copied: int, *, fresh: bool) -> Journal:
        source = self._source
        return Journal(
            size=source.size,
            source=source.identity,
            target=target.identity,
            target_size=target.size,
            copied=copied,
            fresh=fresh,
        )

    def _save(self, target: End, copied: int, *, fresh: bool) -> None:
        if self.journal_path:
            self._journal(target, copied, fresh=fresh).write(self.journal_path)
            self.position = copied


def _has_contents(path: str) -> bool:
    try:
        return os.stat(path).st_size > 0
    except FileNotFoundError:
        return False
