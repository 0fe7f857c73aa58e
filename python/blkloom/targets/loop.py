"""`loop`: a file or block device, or a part of one.

The segment may cover less than the file, but not more. Holes read as zeros, discards punch holes, and a flush syncs the
file. Offsets are in bytes, multiples of 512. There are three I/O modes:

- `file`: through the file system and the page cache. The fallback of the other modes.
- `direct_io`: through the file system, without the page cache. If direct I/O is not possible, the target falls back
  with a warning, or refuses the table with `direct_io=require`.
- `block_map`: without the file system. The positions of the file's blocks are looked up once, and their device is read
  and written directly, as in dm-loop (`blkloom.filemap`). A file that cannot be mapped is refused; with
  `block_map=try` the target falls back. When another process opens the file, the device drains, changes to `file`
  mode and reports an event. Suspend and resume map the file again.

Source: dm-loop (Reeves 2006, Mauelshagen 2018, Patocka 2025) and losetup(8), also for the error texts. As in these,
bytes after the last whole sector of the file are not used, with a warning. `round_up` uses them, as in QEMU
(`partial_sector.py`).
"""

from __future__ import annotations

import errno
import logging
import os
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final, Self

from typing_extensions import override

from blkloom._engine import Extent, File
from blkloom.errors import BackingError
from blkloom.filemap.not_mappable import NotMappable
from blkloom.printing import described
from blkloom.table.arguments import Arguments
from blkloom.table.syntax import Syntax, Words, argument, options, word
from blkloom.targets.limits import BlockLimits
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import Answer, LoadedTarget, Mapped, Retry
from blkloom.targets.partial_sector import PartialSector
from blkloom.targets.spec import TargetSpec
from blkloom.units import SECTOR, Bytes, round_up_to_sector, to_bytes, to_sectors

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from blkloom.filemap.block_map import BlockMap
    from blkloom.targets.live_segment import LiveSegment

_log = logging.getLogger(__name__)
_START: Final = Bytes(0)

_BLOCK_SIZES: Final = tuple(f"block_size={size}" for size in (512, 1024, 2048, 4096))
_OPTIONS: Final = options(
    Words(
        "way",
        ("direct_io", "direct_io=require", "block_map", "block_map=try"),
        "[direct_io[=require] | block_map[=try]]",
    ),
    Words("reading", ("read_only", "read_only=auto"), "[read_only[=auto]]"),
    Words("block_size", _BLOCK_SIZES, "[block_size=<bytes>]"),
    Words("immutable", ("immutable=off",), "[immutable=off]"),
    Words("round_up", ("round_up",), "[round_up]"),
)

_NOT_WRITABLE: Final = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY}


def _read_offset(arguments: Arguments) -> Bytes:
    offset = arguments.integer("file offset")
    if offset % SECTOR:
        down = offset // SECTOR * SECTOR
        raise arguments.error(
            f"Unaligned offset: must be a multiple of {SECTOR} bytes",
            value=str(offset),
            cure=f"write {down} or {down + SECTOR}",
        )
    return Bytes(offset)


class Loop(TargetSpec):
    """A segment that maps to `path` from byte `offset` on. way, reading, block_size, immutable, round_up: options as
    written, or "".
    """

    path: str
    offset: Bytes = _START
    way: str = ""
    reading: str = ""
    block_size: str = ""
    immutable: str = ""
    round_up: str = ""

    name: ClassVar[str] = "loop"
    raw: ClassVar[bool] = True
    arguments: ClassVar[Syntax] = (
        word("path", is_path=True),
        argument("offset", "<offset>", _read_offset, optional=True),
        _OPTIONS,
    )
    summary: ClassVar[str] = "a file or block device (offset in bytes)"

    @classmethod
    @override
    def parse(cls, arguments: Arguments) -> Self:
        found = super().parse(arguments)
        if found.immutable and not found.by_blocks:
            raise arguments.error("option goes with block_map only", value=found.immutable, cure="leave it out")
        if found.round_up and found.by_blocks:
            raise arguments.error(
                "option does not go with block_map", value=found.round_up, cure="leave one of them out"
            )
        return found

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return _LoadedLoop(self, context, length)

    @property
    def by_blocks(self) -> bool:
        """Whether the file's blocks are to be mapped."""
        return self.way.startswith("block_map")

    def check_size(self, context: LoadContext, size: Bytes, length: Bytes) -> None:
        """Whether a file of `size` bytes holds the segment. Raises TableError."""
        if size < (1 if self.round_up else SECTOR):
            raise context.refuse(
                "backing file cannot be less than one block in size" if size else "backing file is empty",
                value=self.path,
                cure=f"make it at least {self.offset + length} bytes long (truncate -s)",
            )
        if self.offset >= size:
            raise context.refuse(
                "Offset is greater than file size", value=str(self.offset), cure=f"{self.path} has {size} bytes"
            )
        used = round_up_to_sector(size) if self.round_up else size
        room = to_bytes(to_sectors(Bytes(used - self.offset)))
        if length > room:
            raise context.refuse(
                "Target maps area after file end",
                value=self.path,
                cure=f"{to_sectors(room)} sectors are there from byte {self.offset} on, not {to_sectors(length)}",
            )
        if length == room and (left := (used - self.offset) % SECTOR):
            context.warn(f"{self.path}: not using {left} bytes in incomplete block at EOF")
        block = self.logical
        if length % block:
            raise context.refuse(
                f"Unaligned length: must be a multiple of the block size of {block} bytes",
                value=str(length),
                cure=f"make it {to_sectors(Bytes(length // block * block))} sectors, or leave block_size out",
            )

    @property
    def logical(self) -> int:
        """The block size asked for, or a sector."""
        return int(self.block_size.partition("=")[2] or SECTOR)

    def unfit(self, file: File, length: Bytes) -> str:
        """Why direct I/O is unsuitable for `file`, which is open with O_DIRECT; "" if it is suitable."""
        block = file.offset_alignment
        if self.offset % block:
            return f"offset {self.offset} is not a multiple of the {block} bytes direct I/O needs"
        if file.size % block and self.offset + length > file.size // block * block:
            return f"the file ends inside a block of the {block} bytes direct I/O needs"
        if self.block_size and self.logical % block:
            return f"clients' block size of {self.logical} bytes is no multiple of the {block} bytes direct I/O needs"
        return ""


class _LoadedLoop(LoadedTarget):
    """The file of a segment, and its present I/O mode."""

    spec: Loop

    def __init__(self, spec: Loop, context: LoadContext, length: Bytes) -> None:
        self._length = length
        self._live: LiveSegment = context.segment()
        self._leases = context.files.leases
        self._mode = "file"
        self._times_mapped = 0
        self._changes = 0
        self._tried = False
        """A block map was just tried without success, so the first resume does not try again."""
        self._later = False
        """The block map is made at the resume, after the replaced table has released the file."""
        self._blocks: BlockMap | None = None
        self._disk: File | None = None
        self._file: File
        self._last: PartialSector | None = None
        """The last, partial sector of the file, with `round_up`."""
        super().__init__(spec, [])
        try:
            self.map = self._map(context)
        except BaseException:
            self.close()
            raise

    @override
    def limits(self) -> BlockLimits:
        """The block size of the option, or the larger one that direct I/O needs."""
        needed = self._blocks.disk if self._blocks else self._file
        logical = max(self.spec.logical, needed.offset_alignment if self._mode != "file" else SECTOR)
        return BlockLimits(logical, max(4096, logical))

    @override
    def status(self) -> str:
        """The mode, extents, requests in flight, and the path."""
        blocks = self._blocks
        queue = self._file.in_flight + (blocks.disk.in_flight if blocks else 0)
        return f"{self._mode} {len(blocks) if blocks else 1} {queue} {self.spec.path}"

    def _map(self, context: LoadContext) -> Mapped:
        """Makes the map in the requested I/O mode, or in a fallback mode."""
        spec = self.spec
        way, _, how = spec.way.partition("=")
        direct = way == "direct_io" or (context.direct_io and way != "block_map")
        self._file = self._open(context, direct=direct)
        if not context.restored:  # requests for a part that was truncated since fail one by one
            spec.check_size(context, Bytes(self._file.size), self._length)
        status = os.fstat(self._file.fileno())
        if pid := context.files.mapped_to_write.get((status.st_dev, status.st_ino)):
            context.warn(f"{spec.path}: is mapped into userspace for writing by process {pid}")
        if direct:
            self._mode = "direct_io"
            reason = spec.unfit(self._file, self._length) if self._file.direct else "its file system has no O_DIRECT"
            if reason and how == "require":
                raise self._refused(f"direct I/O is not possible: {reason}", "leave =require out")
            if reason:
                if self._file.direct:
                    context.warn(f"{spec.path}: {reason}; using buffered I/O")
                    self._file = self._open(context, direct=False)
                self._mode = "file"
        if way == "block_map":
            return self._map_blocks(context, optional=how == "try")
        return self._through_the_file_system()

    def _open(self, context: LoadContext, *, direct: bool) -> File:
        spec = self.spec
        open_file = partial(context.file, spec.path, direct_io=direct, by_blocks=spec.by_blocks)
        try:
            return open_file(read_only=spec.reading == "read_only")
        except BackingError as error:
            if spec.reading != "read_only=auto" or error.errno not in _NOT_WRITABLE:
                raise
            context.warn(f"{spec.path}: cannot be written to ({os.strerror(error.errno)}); it is read-only")
            return open_file(read_only=True)

    def _through_the_file_system(self) -> Mapped:
        file, offset = self._file, self.spec.offset
        data = Extent.data(file, offset, read_only=not file.writable)
        missing = offset + self._length - file.size
        if not (self.spec.round_up and 0 < missing < SECTOR):
            return [(Bytes(0), self._length, data)]
        whole = Bytes(self._length - SECTOR)
        self._last = PartialSector(file, offset + whole)
        return [*([(Bytes(0), whole, data)] if whole else []), (whole, Bytes(SECTOR), self._last.extent())]

    def _refused(self, what: str, cure: str) -> BackingError:
        return BackingError(what, path=self.spec.path, errno=errno.EINVAL, cure=cure)

    # block maps

    def _map_blocks(self, context: LoadContext, *, optional: bool) -> Mapped:
        from blkloom.filemap.block_map import extents_on
        from blkloom.filemap.mappability import disk_of

        try:
            disk = disk_of(self._file.fileno())
            self._disk = context.file(disk.node, read_only=not self._file.writable, direct_io=True, claimed=False)
            if os.fstat(self._disk.fileno()).st_rdev != disk.number or not self._disk.direct:
                raise NotMappable(f"{disk.node} is not the device of its file system, or has no O_DIRECT")
            if context.files.shares(self._file):
                if not context.files.is_only_way(self._file):
                    what = "the device itself has it open in another way (direct_io, or read-only) as well"
                    raise NotMappable(what, "remove the device and create it anew")
                extents_on(self._file, self._disk, self.spec.offset, self._length)
                self._later = not optional
                return self._through_the_file_system()
            return self._enter_blocks()
        except (NotMappable, OSError) as error:
            reason, cure = (error.reason, error.cure) if isinstance(error, NotMappable) else (described(error), "")
            self._tried = True
            if context.restored:
                self._leases.inherit(self._file.fileno(), self.spec.path)
                self._live.event(f"block map of {self.spec.path} was lost: {reason}; going on in file mode")
                return self._through_the_file_system()
            if not optional:
                raise self._no_blocks(reason, cure) from error
            context.warn(f"{self.spec.path}: {reason}; using file I/O instead of a block map")
            return self._through_the_file_system()

    def _no_blocks(self, reason: str, cure: str) -> BackingError:
        cure = "; ".join(filter(None, (cure, "or write block_map=try to fall back to file I/O")))
        return self._refused(f"block map is not possible: {reason}", cure)

    def _enter_blocks(self) -> Mapped:
        """Makes the block map. Raises NotMappable."""
        from blkloom.filemap.block_map import BlockMap

        assert self._disk is not None
        self._times_mapped += 1
        self._blocks = BlockMap.make(
            self._file,
            self._disk,
            self.spec.offset,
            self._length,
            self._leases,
            self._live.stopped,
            partial(self._given_up, self._times_mapped),
            keep_writers_out=self._file.writable and not self.spec.immutable,
        )
        self._changes = self._live.changes
        self._mode = "block_map"
        return self._blocks.mapped()

    def _changed(self) -> bool:
        """Whether the blocks may have been written to without the file system."""
        return self._file.writable and self._live.changes != self._changes

    def _given_up(self, time: int, why: str) -> bool:
        """Returns to file mode because another process opens the file. The device is stopped. time: the number of the
        block map to release. Returns whether its blocks were written to.
        """
        blocks = self._blocks
        if blocks is None or time != self._times_mapped:
            return False  # this map was released before
        if not self._live.remap(self._through_the_file_system()):
            return False  # its table is closed, or not live yet: then `preresume` sees the lost lease
        self._blocks, self._mode = None, "file"
        blocks.settle()
        self._live.note_failed_syncs()
        self._live.event(f"block map of {self.spec.path} given up: {why}; going on in file mode")
        return self._changed()

    @override
    def sync_failed(self) -> None:
        """Fails the syncs of both the file and its disk: a sync that fails on one may have lost writes of the other."""
        for one, other in ((self._file, self._disk), (self._disk, self._file)):
            if one and other and one.sync_error:
                other.fail_syncs(one.sync_error)

    @override
    def preresume(self) -> Mapped | None:
        """Checks the block map, or makes it again. Returns None if nothing has changed."""
        if self._disk is None:
            return None
        later, self._later = self._later, False
        tried, self._tried = self._tried, False
        was_mapped = self._blocks is not None
        try:
            if self._blocks is not None and not self._blocks.held():
                self.close()
            if self._blocks is None:
                return None if tried else self._enter_blocks()
            return self._blocks.mapped() if self._blocks.check() else None
        except (NotMappable, OSError) as error:
            if later:
                self._later = True
                raise self._no_blocks(described(error), error.cure if isinstance(error, NotMappable) else "") from error
            why = f"block map of {self.spec.path} cannot be made: {error}; going on in file mode"
            self.close()
            if was_mapped:
                self._live.event(why)
            else:
                _log.warning("%s", why)
            return self._through_the_file_system()

    @override
    def close(self) -> None:
        """Releases the block map."""
        blocks, self._blocks, self._mode = self._blocks, None, "file"
        if blocks is not None:
            blocks.close(changed=self._changed())

    # Faults: of the last, partial sector, and of writes to a read-only file.

    @override
    def read(self, offset: Bytes, length: Bytes) -> Answer[Buffer | Retry]:
        if self._last is None:
            return super().read(offset, length)
        return self._last.read(offset % SECTOR, length)

    @override
    def write_lazily(
        self, offset: Bytes, length: Bytes, fetch: Callable[[], bytes], *, fua: bool
    ) -> Answer[Retry | None]:
        if self._last is None:
            return super().write_lazily(offset, length, fetch, fua=fua)
        return self._last.write()

    @override
    def discard(self, offset: Bytes, length: Bytes) -> Answer[Retry | None]:
        if self._last is None:
            return super().discard(offset, length)
        self._last.discard(offset % SECTOR, length)
        return None

    @override
    def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool, fast: bool) -> Answer[Retry | None]:
        if self._last is None:
            return super().write_zeroes(offset, length, may_unmap=may_unmap, fast=fast)
        self._last.write_zeroes(offset % SECTOR, length)
        return None
