"""`qcow2`: a QCOW2 image, with its backing chain.

Any segment: it is the image's disk from its first byte on, as far as the segment reaches. The format is understood in
`blkloom.qcow2`; here are the arguments, and the life of an image: opened when the table loads, read anew at every
resume, let go of at every suspend, so that qemu-img may work on it meanwhile. Source: dm-qcow2 (Tkhai 2020), QEMU
docs/interop/qcow2.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final, Literal, Self

from typing_extensions import override

from blkloom._engine import Extent
from blkloom.errors import BackingError, FaultError, LaterError
from blkloom.gate import Gate
from blkloom.qcow2.errors import CorruptImage, DamagedCluster
from blkloom.qcow2.table_options import read_options
from blkloom.target.base import RETRY, Mapped, Retry, Target
from blkloom.target.limits import BlockLimits
from blkloom.units import SECTOR, Bytes, to_sectors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Buffer

    from blkloom.qcow2.attachment import Attachment
    from blkloom.qcow2.block_status import BlockStatus
    from blkloom.qcow2.chain import Chain
    from blkloom.qcow2.writer import Writer
    from blkloom.table.arguments import Arguments
    from blkloom.target.live_segment import LiveSegment
    from blkloom.target.opening import Opening

CACHE: Final = Bytes(256 << 20)
"""Bytes of decompressed clusters that are kept, unless the table says otherwise."""

_LARGEST_OPTIMAL: Final = 1 << 21
_FULL: Final = {errno.ENOSPC, errno.EDQUOT}


@dataclass
class Qcow2(Target):
    """path: of the image. direct_io: guest data goes past the page cache. snapshot: the id or name of an internal one
    to show instead. allow_backing: directories (or files) that names in images may lead to, besides the image's own.
    lock: claim the files. cache: bytes of decompressed clusters kept. preallocate: bytes around a first write that are
    given clusters with it, None for what is best. on_enospc: whether a write that finds no space fails or waits for
    some. fault_injection: messages may make it fail.
    """

    path: str
    read_only: bool = False
    direct_io: bool = False
    snapshot: str = ""
    allow_backing: tuple[str, ...] = ()
    lock: bool = True
    cache: Bytes = CACHE
    discard_as: Literal["unmap", "ignore"] = "unmap"
    preallocate: Bytes | None = None
    compact_zeroes: bool = False
    on_enospc: Literal["fail", "park"] = "fail"
    fault_injection: bool = False

    name: ClassVar[str] = "qcow2"
    syntax: ClassVar[str] = (
        "<path> [<#opts> [read_only] [direct_io] [snapshot=<id|name>] [allow_backing=<dir>]... [lock=off] "
        "[cache=<size>] [discard=unmap|ignore] [preallocate=<size>] [compact_zeroes] [on_enospc=fail|park] "
        "[fault_injection]]"
    )
    summary: ClassVar[str] = "a QCOW2 image with its backing files"
    modules: ClassVar[tuple[str, ...]] = tuple(
        f"blkloom.qcow2.{name}" for name in ("attachment", "attendant", "block_status", "chain", "writer")
    )

    @classmethod
    @override
    def parse(cls, arguments: Arguments) -> Self:
        path = arguments.word("path")
        return cls(path, **read_options(arguments))

    @override
    def format(self) -> list[str]:
        options = [
            *(["read_only"] if self.read_only else []),
            *(["direct_io"] if self.direct_io else []),
            *([f"snapshot={self.snapshot}"] if self.snapshot else []),
            *(f"allow_backing={path}" for path in self.allow_backing),
            *([] if self.lock else ["lock=off"]),
            *([f"cache={self.cache}"] if self.cache != CACHE else []),
            *([f"discard={self.discard_as}"] if self.discard_as != "unmap" else []),
            *([f"preallocate={self.preallocate}"] if self.preallocate is not None else []),
            *(["compact_zeroes"] if self.compact_zeroes else []),
            *(["on_enospc=park"] if self.on_enospc == "park" else []),
            *(["fault_injection"] if self.fault_injection else []),
        ]
        return [self.path, *([str(len(options)), *options] if options else [])]

    # Life

    @override
    def map(self, opening: Opening, start: Bytes, length: Bytes) -> Mapped:
        from blkloom.qcow2.attendant import Attendant

        self._opening: Opening = opening
        self._live: LiveSegment = opening.segment()
        self._writable: bool = not (self.read_only or self.snapshot or opening.read_only)
        self._direct: bool = self.direct_io or opening.direct_io
        self._attachment: Attachment | None = None
        self._writer: Writer | None = None
        self._block_status: BlockStatus | None = None
        self._attendant = Attendant(retry=self._live.retry, fault_injection=self.fault_injection)
        self._length: Bytes = length
        self._owner = opening.owner
        if opening.lent:  # whatever the image is just now, what counts is what it is when the device is resumed
            opening.file(self.path, read_only=not self._writable, direct_io=self._direct, claimed=self.lock, lent=True)
            self.whole = opening.whole
            return [(Bytes(0), length, Extent.fault())]
        chain = self._open()
        if length > (room := chain.size // SECTOR * SECTOR):
            raise opening.refuse(
                "Target maps area after image end",
                value=self.path,
                cure=f"{to_sectors(Bytes(room))} sectors are there, not {to_sectors(length)}",
            )
        self.whole = opening.alone and length == room
        return self._attach(chain)

    @override
    def sync_failed(self) -> None:
        if not (number := self._sync_error):
            return
        # A table in one file may lead to data in another, and either may be lost.
        for file in self._opening.written(self._owner):
            file.fail_syncs(number)
        if self._writer:
            self._writer.fail(self._failed(number))

    @property
    def _sync_error(self) -> int:
        """The errno of a sync of a file of the image that failed since they were opened; 0: none."""
        return next((file.sync_error for file in self._opening.written(self._owner) if file.sync_error), 0)

    def _failed(self, number: int) -> FaultError:
        what = "a sync of the image failed, and what it holds now is not certain"
        return FaultError(number, f"{self.path}: {what}; load the table again and resume to open it anew")

    @override
    def postsuspend(self) -> None:
        if self._writer:
            self._write_back(self._writer.close)
        self._detach()
        self._opening.lend(self._owner)

    @override
    def preresume(self) -> Mapped | None:
        if self._writer:  # what it has could not be written back, so that nothing was let go of
            return None
        with self._opening.anew(self._owner):
            try:
                return self._go_on()
            except BaseException:
                self._detach()
                raise

    def _go_on(self) -> Mapped:
        """With the image as it is now."""
        self._detach()
        chain = self._open()
        room = Bytes(chain.size // SECTOR * SECTOR)
        if room < (SECTOR if self.whole else self._length):
            raise BackingError(
                f"the image has {to_sectors(room)} sectors now, and the table wants {to_sectors(self._length)}",
                path=self.path,
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
        if not hasattr(self, "_attachment"):
            return
        try:
            if self._writer:
                self._write_back(self._writer.close)
        finally:
            self._detach()

    def _open(self) -> Chain:
        from blkloom.qcow2.chain import open_chain

        file = self._opening.file(
            self.path,
            read_only=not self._writable,
            direct_io=self._direct,
            claimed=self.lock,
            exclusive=self._writable,
        )
        where = os.path.realpath(f"/proc/self/fd/{file.fileno()}")
        return open_chain(
            self.path,
            self._opening,
            Gate.of_image(where, self.allow_backing),
            writable=self._writable,
            direct=self._direct,
            snapshot=self.snapshot,
            claimed=self.lock,
            home=lambda: self._opening.absolute(self.path, file),
            storage=self._attendant.storage,
        )

    def _attach(self, chain: Chain) -> Mapped:
        from blkloom.qcow2.attachment import Attachment
        from blkloom.qcow2.block_status import BlockStatus

        self._attendant.attend(chain)
        self._attachment = Attachment(chain, self._length, cache=self.cache, synchronize=self._live.synchronize)
        self._attachment.ask(self._attendant.asks)
        self._block_status = BlockStatus(chain, snapshot=bool(self.snapshot))
        return [(Bytes(0), self._length, Extent.table(self._attachment.table))]

    def _begin_writing(self, chain: Chain) -> None:
        """Only what is about to go live may change the file: before, another table may be at it."""
        from blkloom.qcow2.errors import CorruptImage
        from blkloom.qcow2.writer import Options, Writer

        attachment, top = self._attached, chain.top
        direct = chain.files[0].direct
        options = Options(discard=self.discard_as == "unmap", compact_zeroes=self.compact_zeroes, direct=direct)
        if self.preallocate is not None:
            options = replace(options, preallocate=self.preallocate)

        def broke() -> None:
            top.writable = False
            attachment.forget()
            if self._writer and isinstance(self._writer.broken, CorruptImage):
                self._attendant.troubles.event("event_CORRUPT")
                self._live.event("the image is corrupt and only read from now on")

        self._writer = Writer(
            top.image,
            read=chain.read,
            install=attachment.install,
            synchronize=self._live.synchronize,
            below=chain if len(chain.layers) > 1 else None,
            relocation=attachment,
            options=options,
            reserve=self._attendant.meeting_allocations(self.path),
            secure=top.image.storage.reserve if self.on_enospc == "park" else None,
            broke=broke,
            wants_work=self._live.has_work,
            checked=self._checked,
        )
        top.writable, top.guarded = True, self._writer.guarded
        assert self._block_status is not None, "it is attached"
        self._block_status.follow(self._writer.bitmaps)

    def _detach(self) -> None:
        self._writer = self._block_status = None
        attachment, self._attachment = self._attachment, None
        if attachment:
            attachment.forget()
            attachment.close()
            self._attendant.attend(None)
            attachment.chain.top.guarded = None  # the writer's; no circle shall keep all their memory

    # Questions

    @override
    def limits(self) -> BlockLimits:
        if self._attachment is None:
            return BlockLimits()
        return BlockLimits(optimal=min(max(self._attachment.chain.top.image.geometry.unit, 4096), _LARGEST_OPTIMAL))

    @override
    def status(self) -> str:
        """`<clusters in use>/<clusters of the disk> <words>`; in use is what the image file takes in storage."""
        if self._attachment is None:
            return "-"
        image, unpacked = self._attachment.chain.top.image, self._attachment.unpacked
        file = os.fstat(self._attachment.chain.files[0].fileno())
        bits = image.geometry.cluster_bits
        words = [
            f"{-(-file.st_blocks * 512 >> bits)}/{-(-image.size >> bits)}",
            f"cluster_size={1 << bits}",
            f"cache={unpacked.used}/{unpacked.slots}",
            f"faults={self._attachment.faults}",
            f"chain={len(self._attachment.chain.layers)}",
            f"parked={self._live.held}",
            f"wants_check={int(image.wants_check)}",
            f"checking={int(self._writer is not None and self._writer.checking)}",
        ]
        return " ".join(words)

    @override
    def contexts(self) -> Sequence[str]:
        return self._block_status.contexts if self._block_status else ()

    @override
    def message(self, words: list[str]) -> str | None:
        answer = self._attendant.answer(words)
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
        if self._writer is None or self.fault_injection:  # which is for each write by itself
            return ()
        try:
            self._attached.prepare_together(writes)
            ready = self._writer.prepare_writes(writes)
        except CorruptImage:  # this image is marked now; what is wrong with another one, a write meets again
            return ()
        self._attached.faults += len(ready)
        return ready

    @override
    def full(self, offset: Bytes, length: Bytes, number: int) -> Retry:
        error = FaultError(number, f"no space for {length} bytes at {offset} of the disk in {self.path}")
        self._attendant.troubles.note("data_write", error)
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
    def expect(self, reads: Sequence[tuple[Bytes, Bytes]]) -> None:
        if not self._attached.asks_everything:  # then they fail
            self._attached.expect(reads)

    @override
    def extents(self, offset: Bytes, length: Bytes) -> Iterator[tuple[Bytes, int]]:
        return ((Bytes(run), flags) for run, flags in self._attached.extents(offset, length))

    @override
    def block_status(self, context: str, offset: Bytes, length: Bytes) -> Iterator[tuple[Bytes, int]]:
        assert self._block_status is not None, "nothing faults while it is suspended"
        return ((Bytes(run), flags) for run, flags in self._block_status.runs(context, offset, length))

    def _meet_injection(self, kind: Literal["data_read", "data_write"], offset: int, length: int) -> None:
        """A client's request came here. Raises OSError, LaterError if it is to fail."""
        if not self.fault_injection:
            return
        try:
            self._attendant.meet_request(kind, self.path, offset, length)
        except OSError as error:
            if kind == "data_write":
                self._meet(error)
            raise
        finally:
            self._follow_injection()

    def _follow_injection(self) -> None:
        """Has the engine ask for requests for as long as they are to fail, and no longer."""
        if self._attachment:
            self._attachment.ask(self._attendant.asks)

    @contextmanager
    def _meeting_corruption(self) -> Iterator[None]:
        """While a request is served: metadata found wrong is reported, once for each request that meets it, and marked
        where the image is written to. Raises FaultError in its place, for the log has it then. Damaged data is counted.
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
            self._attendant.troubles.note("data_read", error)
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
            self._live.event(f"{self.path}: checked; {changed} refcounts put right")

    def _meet(self, error: OSError) -> None:
        """A change failed. Raises LaterError where it is to wait for space."""
        if error.errno not in _FULL:
            return
        self._attendant.troubles.note("no_space", error)
        if self.on_enospc == "park":
            raise LaterError(error.errno, str(error), begins=self._begin_to_wait) from error
        if self._writer and self._writer.checking:  # there may be space inside the file
            raise LaterError(error.errno, str(error), begins=lambda: None) from error

    def _begin_to_wait(self) -> None:
        self._attendant.troubles.event("event_ENOSPC")
        self._live.event(f"{self.path}: no space; writes wait")

    @contextmanager
    def _freeing(self) -> Iterator[Writer]:
        """While space may come to be free; what waits for some is asked for again."""
        writer = self._changing
        try:
            yield writer
            if self._live.held and writer.allocator.waiting:
                self.flush()  # it is free when nothing on disk refers to it
                self._live.retry()
        except OSError as error:
            self._meet(error)
            raise

    def _write_back(self, write: Callable[[], None]) -> None:
        self._attendant.troubles.write_back_failed = True
        write()
        self._attendant.troubles.write_back_failed = False

    @property
    def _changing(self) -> Writer:
        if self._writer is None and (number := self._sync_error):
            raise self._failed(number)
        if self._writer is None:
            raise FaultError(errno.EROFS, f"{self.path} is attached to be read only")
        return self._writer

    @property
    def _attached(self) -> Attachment:
        assert self._attachment is not None, "nothing faults while it is suspended"
        return self._attachment
