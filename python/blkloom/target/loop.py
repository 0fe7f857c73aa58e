"""`loop`: a file or block device, or a piece of one; several segments may use several files.

The table may cover less than the file, never more. Holes read as zeros; discards punch holes;
flushes sync the file. Offsets are bytes, multiples of 512. There are three ways to the bytes:

- `file`: through the file system and its page cache; the way all others fall back to.
- `direct_io`: through the file system, past its cache. Where that is impossible it falls back with a
  warning, or with `direct_io=require` is refused.
- `block_map`: past the file system too: the file's blocks are looked up once and their device is read
  and written directly, as dm-loop does (`blkloom.filemap`). A file that is no ground for that is refused,
  or with `block_map=try` falls back. When anybody else asks for the file, the device drains, goes on in
  `file` mode, and says so; suspend and resume map it anew.

Source: dm-loop (Reeves 2006, Mauelshagen 2018, Patocka 2025) and losetup(8); the error texts are
theirs. Like them it warns of what it cannot use of the file: the end that makes no whole sector. With `round_up` it
uses that, too, as QEMU does (`partial_sector.py`).
"""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final, Self

from typing_extensions import override

from blkloom._engine import Extent, File
from blkloom.errors import BackingError
from blkloom.filemap.unsound import Unsound
from blkloom.table.arguments import Arguments
from blkloom.target.base import Mapped, Retry, Target
from blkloom.target.limits import BlockLimits
from blkloom.target.opening import Opening
from blkloom.target.partial_sector import PartialSector
from blkloom.units import SECTOR, Bytes, round_up_to_sector, to_bytes, to_sectors

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from blkloom.filemap.block_map import BlockMap
    from blkloom.target.live_segment import LiveSegment

_log = logging.getLogger(__name__)
_START: Final = Bytes(0)

_WAYS: Final = ("direct_io", "direct_io=require", "block_map", "block_map=try")
_READING: Final = ("read_only", "read_only=auto")
_BLOCK_SIZES: Final = tuple(f"block_size={size}" for size in (512, 1024, 2048, 4096))
_MUTABLE: Final = "immutable=off"
_ROUND_UP: Final = "round_up"
_OPTIONS: Final = (_WAYS, _READING, _BLOCK_SIZES, (_MUTABLE,), (_ROUND_UP,))
"""Of each group at most one; printed in this order."""

_NOT_WRITABLE: Final = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY}


@dataclass(frozen=True)
class Loop(Target):
    """The segment is `path` from byte `offset` on. way, reading, block_size, immutable, round_up: options as
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
    syntax: ClassVar[str] = (
        "<path> [<offset> [<#opts> [direct_io[=require] | block_map[=try]] [read_only[=auto]]"
        " [block_size=<bytes>] [immutable=off] [round_up]]]"
    )
    summary: ClassVar[str] = "a file or block device (offset in bytes)"

    @classmethod
    @override
    def parse(cls, arguments: Arguments) -> Self:
        path = arguments.word("path")
        offset = arguments.integer("file offset") if arguments.remaining else 0
        if offset % SECTOR:
            down = offset // SECTOR * SECTOR
            raise arguments.error(
                f"Unaligned offset: must be a multiple of {SECTOR} bytes",
                value=str(offset),
                cure=f"write {down} or {down + SECTOR}",
            )
        way, reading, block_size, immutable, round_up = _parse_options(arguments)
        if immutable and not way.startswith("block_map"):
            raise arguments.error("option goes with block_map only", value=immutable, cure="leave it out")
        if round_up and way.startswith("block_map"):
            raise arguments.error("option does not go with block_map", value=round_up, cure="leave one of them out")
        return cls(path, Bytes(offset), way, reading, block_size, immutable, round_up)

    @override
    def format(self) -> list[str]:
        every = (self.way, self.reading, self.block_size, self.immutable, self.round_up)
        options = [word for word in every if word]
        words = [str(self.offset)] if self.offset or options else []
        return [self.path, *words, *([str(len(options)), *options] if options else [])]

    @override
    def map(self, opening: Opening, start: Bytes, length: Bytes) -> Mapped:
        loaded = _Loaded(self, opening, length)
        object.__setattr__(self, "loaded", loaded)  # this copy's own, and no part of its value
        return loaded.map(opening)

    @override
    def limits(self) -> BlockLimits:
        return self._loaded.limits

    @override
    def status(self) -> str:
        return self._loaded.status()

    @override
    def preresume(self) -> Mapped | None:
        return self._loaded.preresume()

    # Faults: of the sector that the file ends in, and of writes to what is read-only.

    @override
    def read(self, offset: Bytes, length: Bytes) -> Buffer | Retry:
        if self._loaded.last is None:
            return super().read(offset, length)
        return self._loaded.last.read(offset % SECTOR, length)

    @override
    def write_lazily(self, offset: Bytes, length: Bytes, fetch: Callable[[], bytes], *, fua: bool) -> Retry | None:
        if self._loaded.last is None:
            return super().write_lazily(offset, length, fetch, fua=fua)
        return self._loaded.last.write()

    @override
    def discard(self, offset: Bytes, length: Bytes) -> Retry | None:
        if self._loaded.last is None:
            return super().discard(offset, length)
        self._loaded.last.discard(offset % SECTOR, length)
        return None

    @override
    def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool, fast: bool) -> Retry | None:
        if self._loaded.last is None:
            return super().write_zeroes(offset, length, may_unmap=may_unmap, fast=fast)
        self._loaded.last.write_zeroes(offset % SECTOR, length)
        return None

    @override
    def sync_failed(self) -> None:
        self._loaded.sync_failed()

    @override
    def close(self) -> None:
        if "loaded" in self.__dict__:
            self.__dict__.pop("loaded").close()  # the files go with it at once: the two know each other

    @property
    def _loaded(self) -> _Loaded:
        found: _Loaded = self.__dict__["loaded"]
        return found

    def check_size(self, opening: Opening, size: Bytes, length: Bytes) -> None:
        """Whether a file of `size` bytes holds the segment. Raises TableError."""
        if size < (1 if self.round_up else SECTOR):
            raise opening.refuse(
                "backing file cannot be less than one block in size" if size else "backing file is empty",
                value=self.path,
                cure=f"make it at least {self.offset + length} bytes long (truncate -s)",
            )
        if self.offset >= size:
            raise opening.refuse(
                "Offset is greater than file size", value=str(self.offset), cure=f"{self.path} has {size} bytes"
            )
        used = round_up_to_sector(size) if self.round_up else size
        room = to_bytes(to_sectors(Bytes(used - self.offset)))
        if length > room:
            raise opening.refuse(
                "Target maps area after file end",
                value=self.path,
                cure=f"{to_sectors(room)} sectors are there from byte {self.offset} on, not {to_sectors(length)}",
            )
        if length == room and (left := (used - self.offset) % SECTOR):
            opening.warn(f"{self.path}: not using {left} bytes in incomplete block at EOF")
        block = self.logical
        for what, value in (("offset", self.offset), ("length", length)):
            if value % block:
                raise opening.refuse(
                    f"Unaligned {what}: must be a multiple of the block size of {block} bytes",
                    value=str(value),
                    cure=f"write {value // block * block} bytes, or leave block_size out",
                )

    @property
    def logical(self) -> int:
        """The block size asked for, or a sector."""
        return int(self.block_size.partition("=")[2] or SECTOR)

    def unfit(self, file: File, length: Bytes) -> str:
        """Why direct I/O would do more harm than good on a direct `file`; "" where it fits."""
        block = file.offset_alignment
        if self.offset % block:
            return f"offset {self.offset} is not a multiple of the {block} bytes direct I/O needs"
        if file.size % block and self.offset + length > file.size // block * block:
            return f"the file ends inside a block of the {block} bytes direct I/O needs"
        if self.block_size and self.logical % block:
            return f"clients' block size of {self.logical} bytes is no multiple of the {block} bytes direct I/O needs"
        return ""


class _Loaded:
    """A segment's file, and the way it is reached now."""

    def __init__(self, target: Loop, opening: Opening, length: Bytes) -> None:
        self._target = target
        self._length = length
        self._live: LiveSegment = opening.segment()
        self._leases = opening.leases
        self._mode = "file"
        self._times_mapped = 0
        self._changes = 0
        self._tried = False
        """In vain, just now: the first resume need not try again."""
        self._later = False
        """Only when the table this one replaces has let go of the file can its blocks be held."""
        self._blocks: BlockMap | None = None
        self._disk: File | None = None
        self._file: File
        self.last: PartialSector | None = None
        """The sector that the file ends in, where it is rounded up."""

    @property
    def limits(self) -> BlockLimits:
        """Blocks of the size asked for, or as direct I/O needs them."""
        needed = self._blocks.disk if self._blocks else self._file
        logical = max(self._target.logical, needed.offset_alignment if self._mode != "file" else SECTOR)
        return BlockLimits(logical, max(4096, logical))

    def status(self) -> str:
        """The mode, extents, requests in flight, and the path."""
        blocks = self._blocks
        queue = self._file.in_flight + (blocks.disk.in_flight if blocks else 0)
        return f"{self._mode} {len(blocks) if blocks else 1} {queue} {self._target.path}"

    def map(self, opening: Opening) -> Mapped:
        """By the way asked for, or what there is instead."""
        target = self._target
        way, _, how = target.way.partition("=")
        direct = way == "direct_io" or (opening.direct_io and way != "block_map")
        self._file = self._open(opening, direct=direct)
        if not opening.restored:  # of what was cut off since, each request fails by itself
            target.check_size(opening, Bytes(self._file.size), self._length)
        status = os.fstat(self._file.fileno())
        if pid := opening.mapped_to_write.get((status.st_dev, status.st_ino)):
            opening.warn(f"{target.path}: is mapped into userspace for writing by process {pid}")
        if direct:
            self._mode = "direct_io"
            reason = target.unfit(self._file, self._length) if self._file.direct else "its file system has no O_DIRECT"
            if reason and how == "require":
                raise self._refused(f"direct I/O is not possible: {reason}", "leave =require out")
            if reason:
                if self._file.direct:
                    opening.warn(f"{target.path}: {reason}; using buffered I/O")
                    self._file = self._open(opening, direct=False)
                self._mode = "file"
        if way == "block_map":
            return self._map_blocks(opening, optional=how == "try")
        return self._through_the_file_system()

    def _open(self, opening: Opening, *, direct: bool) -> File:
        target = self._target
        open_file = partial(opening.file, target.path, direct_io=direct, by_blocks=target.way.startswith("block_map"))
        try:
            return open_file(read_only=target.reading == "read_only")
        except BackingError as error:
            if target.reading != "read_only=auto" or error.errno not in _NOT_WRITABLE:
                raise
            opening.warn(f"{target.path}: cannot be written to ({os.strerror(error.errno)}); it is read-only")
            return open_file(read_only=True)

    def _through_the_file_system(self) -> Mapped:
        file, offset = self._file, self._target.offset
        data = Extent.data(file, offset, read_only=not file.writable)
        missing = offset + self._length - file.size
        if not (self._target.round_up and 0 < missing < SECTOR):
            return [(Bytes(0), self._length, data)]
        whole = Bytes(self._length - SECTOR)
        self.last = PartialSector(file, offset + whole)
        return [*([(Bytes(0), whole, data)] if whole else []), (whole, Bytes(SECTOR), self.last.extent())]

    def _refused(self, what: str, cure: str) -> BackingError:
        return BackingError(what, path=self._target.path, errno=errno.EINVAL, cure=cure)

    # block maps

    def _map_blocks(self, opening: Opening, *, optional: bool) -> Mapped:
        from blkloom.filemap.block_map import extents_on
        from blkloom.filemap.ground import ground_of

        try:
            ground = ground_of(self._file.fileno())
            self._disk = opening.file(ground.node, read_only=not self._file.writable, direct_io=True, claimed=False)
            if os.fstat(self._disk.fileno()).st_rdev != ground.number or not self._disk.direct:
                raise Unsound(f"{ground.node} is not the device of its file system, or has no O_DIRECT")
            if opening.shares(self._file):
                if not opening.is_only_way(self._file):
                    what = "the device itself has it open in another way (direct_io, or read-only) as well"
                    raise Unsound(what, "remove the device and create it anew")
                extents_on(self._file, self._disk, self._target.offset, self._length)
                self._later = not optional
                return self._through_the_file_system()
            return self._enter_blocks()
        except (Unsound, OSError) as error:
            reason, cure = (error.reason, error.cure) if isinstance(error, Unsound) else (str(error), "")
            self._tried = True
            if opening.restored:
                self._leases.inherit(self._file.fileno(), self._target.path)
                self._live.event(f"block map of {self._target.path} was lost: {reason}; going on in file mode")
                return self._through_the_file_system()
            if not optional:
                raise self._no_blocks(reason, cure) from error
            opening.warn(f"{self._target.path}: {reason}; using file I/O instead of a block map")
            return self._through_the_file_system()

    def _no_blocks(self, reason: str, cure: str) -> BackingError:
        cure = "; ".join(filter(None, (cure, "or write block_map=try to fall back to file I/O")))
        return self._refused(f"block map is not possible: {reason}", cure)

    def _enter_blocks(self) -> Mapped:
        """Raises Unsound."""
        from blkloom.filemap.block_map import BlockMap

        assert self._disk is not None
        self._times_mapped += 1
        self._blocks = BlockMap.make(
            self._file,
            self._disk,
            self._target.offset,
            self._length,
            self._leases,
            self._live.stopped,
            partial(self._given_up, self._times_mapped),
            keep_writers_out=self._file.writable and not self._target.immutable,
        )
        self._changes = self._live.changes
        self._mode = "block_map"
        return self._blocks.mapped()

    def _changed(self) -> bool:
        """Whether something may have been written past the file system."""
        return self._file.writable and self._live.changes != self._changes

    def _given_up(self, time: int, why: str) -> bool:
        """Somebody else is about to get the file, and the device is stopped. time: of which of its maps it is told.
        Whether something was written.
        """
        blocks = self._blocks
        if blocks is None or time != self._times_mapped:
            return False  # it was told before
        if not self._live.remap(self._through_the_file_system()):
            return False  # its table has gone, or is not there yet: `preresume` finds the lease given up
        self._blocks, self._mode = None, "file"
        blocks.settle()
        self._live.note_failed_syncs()
        self._live.event(f"block map of {self._target.path} given up: {why}; going on in file mode")
        return self._changed()

    def sync_failed(self) -> None:
        """What was written to the file's blocks by one way is lost by the other, too."""
        for one, other in ((self._file, self._disk), (self._disk, self._file)):
            if one and other and one.sync_error:
                other.fail_syncs(one.sync_error)

    def preresume(self) -> Mapped | None:
        """Looks whether the map still holds, or can be had again. None: nothing has changed."""
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
        except (Unsound, OSError) as error:
            if later:
                self._later = True
                raise self._no_blocks(str(error), error.cure if isinstance(error, Unsound) else "") from error
            why = f"block map of {self._target.path} cannot be had: {error}; going on in file mode"
            self.close()
            if was_mapped:
                self._live.event(why)
            else:
                _log.warning("%s", why)
            return self._through_the_file_system()

    def close(self) -> None:
        """Lets go of the file's blocks."""
        blocks, self._blocks, self._mode = self._blocks, None, "file"
        if blocks is not None:
            blocks.close(changed=self._changed())


def _parse_options(arguments: Arguments) -> list[str]:
    """One word a group of `_OPTIONS`, or ""."""
    chosen = [""] * len(_OPTIONS)
    for option in arguments.options():
        found = [at for at, group in enumerate(_OPTIONS) if option in group]
        if not found:
            known = ", ".join(word for group in _OPTIONS for word in group)
            raise arguments.error("unknown option", value=option, cure=f"options are: {known}")
        if chosen[found[0]] == option:
            raise arguments.error("option given twice", value=option, cure="give it once")
        if chosen[found[0]]:
            raise arguments.error(
                "options exclude each other", value=f"{chosen[found[0]]} and {option}", cure="give one of them"
            )
        chosen[found[0]] = option
    return chosen
