"""Base of the targets of all image formats: a disk image with its backing chain.

The segment maps to the virtual disk of the image from its first byte on. `blkloom.image` reads the formats. This module
has the arguments and the load: the image is opened when the table loads, detached and unlocked at every suspend, so
that other programs can change it, and opened again at every resume.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from typing_extensions import override

from blkloom._engine import Extent
from blkloom.errors import BackingError, FaultError, RetryLater
from blkloom.image.errors import CorruptImage, DamagedCluster
from blkloom.image.path_policy import PathPolicy
from blkloom.image.redo_log import RedoLog
from blkloom.image.registry import format_named
from blkloom.table.syntax import Syntax, flag, options, size, switch, text, word
from blkloom.targets.limits import BlockLimits
from blkloom.targets.loaded import RETRY, LoadedTarget, Mapped, Retry
from blkloom.targets.spec import TargetSpec
from blkloom.units import SECTOR, Bytes, to_sectors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Buffer

    from blkloom.image.attachment import Attachment
    from blkloom.image.block_status import BlockStatus
    from blkloom.image.chain import Chain
    from blkloom.image.format import Format, ImageWriter
    from blkloom.targets.live_segment import LiveSegment
    from blkloom.targets.load_context import LoadContext

CACHE: Final = Bytes(256 << 20)
"""Default size in bytes of the decompressed cache."""

_LARGEST_OPTIMAL: Final = 1 << 21
_FULL: Final = {errno.ENOSPC, errno.EDQUOT}


def _folder(path: str) -> str:
    if not os.path.isabs(path):
        raise ValueError("the path must begin with /")
    return path


PATH: Final = word("path", is_path=True)
READ_ONLY: Final = flag("read_only")
DIRECT_IO: Final = flag("direct_io")
ALLOW_BACKING: Final = text("allow_backing", "<dir>", check=_folder, many=True)
LOCK: Final = switch("lock")
CACHE_SIZE: Final = size("cache")
FAULT_INJECTION: Final = flag("fault_injection")
READING: Final = options(READ_ONLY, DIRECT_IO, ALLOW_BACKING, LOCK, CACHE_SIZE, FAULT_INJECTION)
"""Options of every format."""


class ImageSpec(TargetSpec):
    """Base class of the specs of image targets. path: of the image. direct_io: guest data bypasses the page cache.
    allow_backing: directories (or files) that names in images may lead to, besides the image's own. lock: claim the
    files. cache: bytes of the decompressed cache. fault_injection: allow messages that inject errors.
    """

    path: str
    read_only: bool = False
    direct_io: bool = False
    allow_backing: tuple[str, ...] = ()
    lock: bool = True
    cache: Bytes = CACHE
    fault_injection: bool = False

    arguments: ClassVar[Syntax] = (PATH, READING)
    modules: ClassVar[tuple[str, ...]] = tuple(
        f"blkloom.image.{name}" for name in ("attachment", "block_status", "diagnostics", "open_chain")
    )

    def image_format(self) -> Format:
        """The format of the image, with the options of the table."""
        return format_named(self.name)

    @property
    def waits_for_space(self) -> bool:
        """Whether a write that fails for lack of space waits for space."""
        return False

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return LoadedImage(self, context, length)


class LoadedImage(LoadedTarget):
    """A loaded image. Between suspend and resume it is detached, and its files are unlocked."""

    spec: ImageSpec
    flushes = True
    prefetches = True
    prepares_writes = True

    def __init__(self, spec: ImageSpec, context: LoadContext, length: Bytes) -> None:
        from blkloom.image.diagnostics import Diagnostics

        self._context = context
        self._live: LiveSegment = context.segment()
        self._format = spec.image_format()
        self._writable = self._format.writable and not (spec.read_only or context.read_only)
        self._direct = spec.direct_io or context.direct_io
        self._diagnostics = Diagnostics(spec.name, retry=self._live.retry, fault_injection=spec.fault_injection)
        self._length = length
        self._owner = context.owner
        self._attachment: Attachment | None = None
        self._writer: ImageWriter | None = None
        self._block_status: BlockStatus | None = None
        memory = context.changes() if self._writable else None
        self._redo = None if memory is None else RedoLog(memory)
        if self._redo is not None and self._redo.is_new and context.was_active:
            context.warn(
                f"{spec.path}: writes that no flush covered may be lost with the processes that had their metadata; "
                "unmount the file systems on the device and check them"
            )
        super().__init__(spec, [(Bytes(0), length, Extent.fault())])
        try:
            self._load(context, length)
        except BaseException:
            self._close_log()
            raise

    def _load(self, context: LoadContext, length: Bytes) -> None:
        spec = self.spec
        if context.unlocked:  # other programs may use the image now: the resume opens it
            context.file(
                spec.path, read_only=not self._writable, direct_io=self._direct, claimed=spec.lock, unlocked=True
            )
            self.whole = context.whole
            return
        chain = self._open()
        if length > (room := chain.size // SECTOR * SECTOR):
            raise context.refuse(
                "Target maps area after image end",
                value=spec.path,
                cure=f"{to_sectors(Bytes(room))} sectors are there, not {to_sectors(length)}",
            )
        self.whole = context.alone and length == room
        try:
            self.map = self._attach(chain)
        except BaseException:
            self._detach()
            raise

    @override
    def sync_failed(self) -> None:
        if not (number := self._sync_error):
            return
        # Metadata in one file may refer to data in another, and either may be lost.
        for file in self._context.files.written(self._owner):
            file.fail_syncs(number)
        if self._writer:
            self._writer.fail(self._failed(number))

    @property
    def _sync_error(self) -> int:
        """The errno of a sync of a file of the image that failed since they were opened; 0: none."""
        return next((file.sync_error for file in self._context.files.written(self._owner) if file.sync_error), 0)

    def _failed(self, number: int) -> FaultError:
        what = "a sync of the image failed, and what it holds now is not certain"
        return FaultError(number, f"{self.spec.path}: {what}; load the table again and resume to open it anew")

    @override
    def postsuspend(self) -> None:
        if self._writer:
            self._write_back(self._writer.close)
        self._detach()
        self._context.files.lend(self._owner)

    @override
    def preresume(self) -> Mapped | None:
        if self._writer:  # its metadata could not be written back, so the image is still attached
            return None
        with self._context.reacquired(self._owner):
            try:
                return self._go_on()
            except BaseException:
                self._detach()
                raise

    def _go_on(self) -> Mapped:
        """Opens and maps the present image."""
        self._detach()
        chain = self._open()
        room = Bytes(chain.size // SECTOR * SECTOR)
        if room < (SECTOR if self.whole else self._length):
            raise BackingError(
                f"the image has {to_sectors(room)} sectors now, and the table wants {to_sectors(self._length)}",
                path=self.spec.path,
                errno=errno.EINVAL,
                cure="load a shorter table, or make the image larger (qemu-img resize)",
            )
        if self.whole:
            self._length = room
        mapped = self._attach(chain)
        if self._sync_error:
            self.sync_failed()
        elif self._writable:
            self._begin_writing(chain)
        return mapped

    @override
    def close(self) -> None:
        try:
            if self._writer:
                self._write_back(self._writer.close)
        finally:
            self._detach()
            self._close_log()

    def _close_log(self) -> None:
        log, self._redo = self._redo, None
        if log:
            log.close()

    def _open(self) -> Chain:
        from blkloom.image.open_chain import open_chain

        file = self._context.file(
            self.spec.path,
            read_only=not self._writable,
            direct_io=self._direct,
            claimed=self.spec.lock,
            exclusive=self._writable,
        )
        where = os.path.realpath(f"/proc/self/fd/{file.fileno()}")
        return open_chain(
            self.spec.path,
            self._context,
            PathPolicy.of_image(where, self.spec.allow_backing),
            format=self._format,
            writable=self._writable,
            direct=self._direct,
            claimed=self.spec.lock,
            home=lambda: self._context.files.absolute(self.spec.path, file),
            storage=self._diagnostics.storage,
            redo=None if self._sync_error else self._redo,
        )

    def _attach(self, chain: Chain) -> Mapped:
        from blkloom.image.attachment import Attachment
        from blkloom.image.block_status import BlockStatus

        self._diagnostics.attend(chain)
        self._attachment = Attachment(chain, self._length, cache=self.spec.cache, synchronize=self._live.synchronize)
        self._attachment.ask(self._diagnostics.asks)
        self._block_status = BlockStatus(chain)
        return [(Bytes(0), self._length, Extent.table(self._attachment.table))]

    def _begin_writing(self, chain: Chain) -> None:
        """Creates the writer. Only at a resume: before it, another table may still write to the file."""
        from blkloom.image.format import WriteContext

        attachment = self._attached

        def broke() -> None:
            attachment.forget()
            if self._writer and isinstance(self._writer.broken, CorruptImage):
                self._diagnostics.errors.event("event_CORRUPT")
                self._live.event("the image is corrupt and only read from now on")

        context = WriteContext(
            read=chain.read,
            install=attachment.install,
            synchronize=self._live.synchronize,
            below=chain if len(chain.layers) > 1 else None,
            relocation=attachment,
            direct=chain.files[0].direct,
            take_space=self.spec.waits_for_space,
            allocating=self._diagnostics.meeting_allocations(self.spec.path),
            broke=broke,
            redo=self._redo,
            wants_work=self._live.has_work,
            checked=self._checked,
        )
        self._writer = self._format.begin_writing(chain.top, context)

    def _detach(self) -> None:
        self._writer = self._block_status = None
        attachment, self._attachment = self._attachment, None
        if attachment:
            attachment.forget()
            attachment.close()
            self._diagnostics.attend(None)
            self._format.end_writing(attachment.chain.top)

    # Questions

    @override
    def limits(self) -> BlockLimits:
        if self._attachment is None:
            return BlockLimits()
        top = self._attachment.chain.top
        optimal = min(max(1 << top.unit_bits, 4096), _LARGEST_OPTIMAL)
        return BlockLimits(optimal=optimal, discard=max(1 << top.cluster_bits, 4096))

    @override
    def status(self) -> str:
        """`<clusters in use>/<clusters of the disk> <words>`; in use is what the image file takes in storage."""
        if self._attachment is None:
            return "-"
        top, cache = self._attachment.chain.top, self._attachment.cache
        file = os.fstat(self._attachment.chain.files[0].fileno())
        bits = top.cluster_bits
        words = [
            f"{-(-file.st_blocks * 512 >> bits)}/{-(-top.size >> bits)}",
            f"cluster_size={1 << bits}",
            f"cache={cache.used}/{cache.slots}",
            f"faults={self._attachment.faults}",
            f"chain={len(self._attachment.chain.layers)}",
            f"parked={self._live.held}",
            f"wants_check={int(top.wants_check)}",
            f"checking={int(self._writer is not None and self._writer.checking)}",
        ]
        return " ".join(words)

    @override
    def contexts(self) -> Sequence[str]:
        return self._block_status.contexts if self._block_status else ()

    @override
    def message(self, words: list[str]) -> str | None:
        answer = self._diagnostics.answer(words)
        self._follow_injection()
        return answer

    # Faults

    @override
    def read(self, offset: Bytes, length: Bytes) -> Buffer | Retry:
        self._meet_injection("data_read", offset, length)
        with self._meeting_corruption():
            data = self._attached.read(offset, length)
        return RETRY if data is None else data

    @override
    def write_lazily(self, offset: Bytes, length: Bytes, fetch: Callable[[], bytes], *, fua: bool) -> Retry | None:
        self._meet_injection("data_write", offset, length)
        if self._attached.leads_to_data(offset, length):
            return RETRY
        with self._meeting_corruption():
            self._attached.prepare(offset, length)
            try:
                if self._changing.prepare_write(offset, length, fetch):
                    return None
                if not self._attached.asks_everything:
                    return RETRY
                self._changing.write(offset, fetch())
            except OSError as error:
                self._meet(error)
                raise
        return None

    @override
    def prepare_writes(self, writes: Sequence[tuple[Bytes, Bytes]]) -> Sequence[int]:
        if self._writer is None or self.spec.fault_injection:  # which is for each write by itself
            return ()
        try:
            self._attached.prepare_together(writes)
            ready = self._writer.prepare_writes(writes)
        except CorruptImage:  # this image is marked now; what is wrong with another one, a write meets again
            return ()
        self._attached.faults += len(ready)
        return ready

    @override
    def on_no_space(self, offset: Bytes, length: Bytes, number: int) -> Retry:
        error = FaultError(number, f"no space for {length} bytes at {offset} of the disk in {self.spec.path}")
        self._diagnostics.errors.note("data_write", error)
        self._meet(error)
        raise error

    @override
    def flush(self) -> None:
        # A failed sync was told by the engine, which syncs the files first; but not to the last flush of a suspend.
        if self._writer and not self._sync_error:
            with self._meeting_corruption():
                self._write_back(self._writer.flush)

    @override
    def discard(self, offset: Bytes, length: Bytes) -> None:
        with self._meeting_corruption(), self._freeing() as writer:
            writer.discard(offset, length)

    @override
    def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool, fast: bool) -> None:
        with self._meeting_corruption(), self._freeing() as writer:
            writer.write_zeroes(offset, length, may_unmap=may_unmap, fast=fast)

    @override
    def prefetch(self, reads: Sequence[tuple[Bytes, Bytes]]) -> None:
        if not self._attached.asks_everything:  # then they fail
            self._attached.prefetch(reads)

    @override
    def extents(self, offset: Bytes, length: Bytes) -> Iterator[tuple[Bytes, int]]:
        return ((Bytes(run), flags) for run, flags in self._attached.extents(offset, length))

    @override
    def block_status(self, context: str, offset: Bytes, length: Bytes) -> Iterator[tuple[Bytes, int]]:
        assert self._block_status is not None, "nothing faults while it is suspended"
        return ((Bytes(run), flags) for run, flags in self._block_status.runs(context, offset, length))

    def _meet_injection(self, kind: Literal["data_read", "data_write"], offset: int, length: int) -> None:
        """Applies the fault injection to a client's request. Raises OSError or RetryLater if the request is to fail."""
        if not self.spec.fault_injection:
            return
        try:
            self._diagnostics.meet_request(kind, self.spec.path, offset, length)
        except OSError as error:
            if kind == "data_write":
                self._meet(error)
            raise
        finally:
            self._follow_injection()

    def _follow_injection(self) -> None:
        """Makes every request fault while errors are injected."""
        if self._attachment:
            self._attachment.ask(self._diagnostics.asks)

    @contextmanager
    def _meeting_corruption(self) -> Iterator[None]:
        """Handles corrupt metadata found by a request: reports it once for each request, and marks the image corrupt if
        it is writable. Raises FaultError instead, because the error is in the log then. Counts damaged data.
        """
        try:
            yield
        except CorruptImage as error:
            chain, writer = self._attached.chain, self._writer
            if writer and error.path == chain.top.path:
                writer.mark_corrupt(error)
            if not (writer and writer.broken is error):  # which marking has reported
                chain.report(error)
            raise FaultError(error.errno or errno.EIO, str(error)) from error
        except DamagedCluster as error:
            self._diagnostics.errors.note("data_read", error)
            raise

    @override
    def work(self) -> bool:
        if self._writer is None:
            return False
        try:
            if self._writer.work():
                return True
        except CorruptImage:
            pass  # it is marked and reported
        self._live.retry()  # what waited for space inside the file
        return False

    def _checked(self, changed: int) -> None:
        if changed:
            self._live.event(f"{self.spec.path}: checked; {changed} refcounts put right")

    def _meet(self, error: OSError) -> None:
        """Handles the error of a change. Raises RetryLater if the request is to wait for space."""
        if error.errno not in _FULL:
            return
        self._diagnostics.errors.note("no_space", error)
        if self.spec.waits_for_space:
            raise RetryLater(error.errno, str(error), begins=self._begin_to_wait) from error
        if self._writer and self._writer.checking:  # there may be space inside the file
            raise RetryLater(error.errno, str(error), begins=lambda: None) from error

    def _begin_to_wait(self) -> None:
        self._diagnostics.errors.event("event_ENOSPC")
        self._live.event(f"{self.spec.path}: no space; writes wait")

    @contextmanager
    def _freeing(self) -> Iterator[ImageWriter]:
        """Wraps an operation that may free space; then retries the requests that wait for space."""
        writer = self._changing
        try:
            yield writer
            if self._live.held and writer.frees_at_flush:
                self.flush()  # it is free when nothing on disk refers to it
                self._live.retry()
        except OSError as error:
            self._meet(error)
            raise

    def _write_back(self, write: Callable[[], None]) -> None:
        self._diagnostics.errors.write_back_failed = True
        write()
        self._diagnostics.errors.write_back_failed = False

    @property
    def _changing(self) -> ImageWriter:
        if self._writer is None and (number := self._sync_error):
            raise self._failed(number)
        if self._writer is None:
            raise FaultError(errno.EROFS, f"{self.spec.path} is attached to be read only")
        return self._writer

    @property
    def _attached(self) -> Attachment:
        assert self._attachment is not None, "nothing faults while it is suspended"
        return self._attachment


def reading_spec(format: str) -> type[ImageSpec]:
    """The target spec of a read-only format, which has no options of its own."""

    class Reading(ImageSpec):
        name = format
        summary = f"a {format} image with its backing files, for reading"

    return Reading
