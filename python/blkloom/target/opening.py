"""What a target may ask for while a table loads: files, memory, other devices.

One Opening a loaded table. Everything got through it is closed by it, when the table is replaced,
the device closes, or the load fails half-way; targets close nothing of this themselves.
Used by the thread that loads, under the device's control lock.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Final, TypeAlias

from blkloom._engine import File, Region
from blkloom.errors import BackingError, Place, ResourceError, TableError
from blkloom.filemap.lease import Leases
from blkloom.filemap.mappings import mapped_to_write
from blkloom.target.descriptors import Descriptors, OwnDescriptors, descriptor_path
from blkloom.target.holding import HeldFiles, Identity
from blkloom.target.live_segment import LiveSegment
from blkloom.units import Bytes, format_size

if TYPE_CHECKING:
    from blkloom.device.device import Device

_log = logging.getLogger(__name__)

STACKED: Final = "blkloom:"
"""Paths in tables that begin like this name a device of blkloom's."""

_PAGE: Final = 4096
_HUGE_PAGE: Final = 2 << 20


_Way: TypeAlias = tuple[str, bool, bool, bool]
"""How a file is asked for: path, writable, direct, shared."""


class Opening:
    """Opens for one table.

    read_only: nothing may be opened for writing; extents that writes could change must not be
    given out. direct_io: what `file` does unless told. place: where the segment being mapped
    stands, for errors; owner: its number, negative while none is; alone: it is the only one of its table.
    device_folder: paths in it name devices (`device_name`). deps: what was asked for so far: paths, and devices as
    `blkloom:NAME`, each once. below: those devices. above: the device the table is for; none that
    stands on it is given out.
    """

    def __init__(
        self,
        held: HeldFiles,
        *,
        read_only: bool = False,
        direct_io: bool = False,
        shared: bool = False,
        devices: Mapping[str, Device] | None = None,
        device_folder: str = "",
        descriptors: Descriptors | None = None,
        above: Device | None = None,
    ) -> None:
        self.read_only = read_only
        self.direct_io = direct_io
        self.place: Place | None = None
        self.owner = -1
        self.alone = False
        self.device_folder = device_folder
        self.deps: list[str] = []
        self.below: list[Device] = []
        self._shared = shared
        self._devices = dict(devices or {})
        self._above = above
        self._descriptors: Descriptors = descriptors or OwnDescriptors()
        self._held = held
        self._used: list[Identity] = []
        self._files: dict[_Way, tuple[Identity, File]] = {}
        self._askers: dict[_Way, set[int]] = {}
        self._places: dict[_Way, str] = {}
        self._let_go: set[_Way] = set()
        self._unreachable: dict[_Way, BackingError] = {}
        self._by_blocks: dict[Identity, bool] = {}
        self._segments: dict[Identity, dict[int, bool]] = {}
        self._stacked: dict[str, set[int]] = {}

    def file(
        self,
        path: str,
        *,
        read_only: bool = False,
        direct_io: bool | None = None,
        claimed: bool = True,
        by_blocks: bool = False,
        lent: bool = False,
        exclusive: bool = False,
    ) -> File:
        """The regular file or block device at `path`; the same File for the same question.

        It is writable unless `read_only` here or of the whole opening. direct_io: None for the
        opening's; where the file system refuses, the File is buffered and a warning says why.
        It is claimed against other devices and processes unless the opening is shared, or `claimed` is
        False. by_blocks: past its file system (`blkloom.filemap`), as then every segment of the table must
        use it. lent: as if it had been lent. exclusive: no other segment of the table may use it at all. Raises
        BackingError, BusyError, TableError.
        """
        shared = self._shared or not claimed
        key = (path, not (read_only or self.read_only), self.direct_io if direct_io is None else direct_io, shared)
        if key in self._unreachable:
            raise self._unreachable[key]
        if key not in self._files:
            _, writable, direct, _ = key
            identity, file = self._held.take(
                path, writable=writable, direct=direct, shared=shared, descriptors=self._descriptors, lent=lent
            )
            self._used.append(identity)
            self._files[key] = identity, file
            # The path may be relative to somebody else's directory.
            self._places[key] = path if os.path.isabs(path) else os.path.realpath(f"/proc/self/fd/{file.fileno()}")
            if path not in self.deps:
                self.deps.append(path)
        identity, file = self._files[key]
        self._askers.setdefault(key, set()).add(self.owner)
        if lent:
            self._let_go.add(key)
        elif key in self._let_go:
            self._held.claim_again(identity, self._descriptors)
            self._let_go.discard(key)
        if self._by_blocks.setdefault(identity, by_blocks) != by_blocks:
            raise self.refuse(
                "a file whose blocks are mapped cannot be used in another way too",
                value=path,
                cure="say block_map in all segments of the table that use the file, or in none",
            )
        if self.owner >= 0:
            users = self._segments.setdefault(identity, {})
            users[self.owner] = exclusive or users.get(self.owner, False)
            if len(users) > 1 and any(users.values()):
                raise self.refuse(
                    "an image that is written to cannot be used by two segments",
                    value=path,
                    cure="give it one segment, and others parts of that device (linear)",
                )
        return file

    def absolute(self, path: str, file: File) -> str:
        """The absolute name of `file`, which was opened as `path`; a relative path begins at the directory that it was
        opened from, links to that directory resolved. Raises BackingError.
        """
        if os.path.isabs(path):
            return path
        folder, name = os.path.split(path)
        try:
            # A trailing slash tells it from the files of a load; what a former process had is found again.
            fd = self._descriptors.open(os.path.join(folder or ".", ""), writable=False, direct=False)
        except BackingError as error:
            if error.errno != errno.ESTALE:
                raise
            # A former process of an older version did not keep it: as it had it, beside what the path leads to.
            return os.path.realpath(descriptor_path(file.fileno()))
        except OSError as error:
            raise BackingError(
                f"could not open its directory: {error.strerror}",
                path=path,
                errno=error.errno or errno.EIO,
                cure="allow reading it",
            ) from error
        try:
            return os.path.join(os.path.realpath(descriptor_path(fd)), name)
        finally:
            os.close(fd)

    def region(self, size: Bytes, *, huge_pages: bool = False, preallocate: bool = False) -> Region:
        """`size` bytes of zeros in a sealed memfd; after a restart, what they were before it.

        huge_pages: 2 MiB pages out of the system's pool (vm.nr_hugepages); they are always
        allocated at once, because a pool that runs dry later would kill the process that touches
        the memory. Raises ResourceError.
        """
        page = _HUGE_PAGE if huge_pages else _PAGE
        rounded = -(-size // page) * page
        make = partial(_make_memory, rounded, huge_pages=huge_pages, preallocate=preallocate)
        try:
            fd = self._descriptors.memory(make)
            try:
                return Region(fd, rounded, page_size=page)
            finally:
                os.close(fd)
        except ResourceError:
            raise
        except (OSError, MemoryError, OverflowError) as error:
            pages = f"reserve {rounded // page} huge pages (sysctl vm.nr_hugepages) or leave huge_pages out"
            raise ResourceError(
                f"{format_size(size)} of memory cannot be had: {getattr(error, 'strerror', None) or error}",
                cure=pages if huge_pages else "make the device smaller",
                errno=getattr(error, "errno", None) or errno.ENOMEM,
            ) from error

    def device(self, name: str) -> Device:
        """The device to stack on. Raises TableError that lists those there are, or for a cycle."""
        device = self._devices.get(name)
        if device is None:
            known = ", ".join(sorted(self._devices)) or "none"
            raise self.refuse("Device lookup failed: no such blkloom device", value=name, cure=f"there are: {known}")
        if self._above is not None and self._above in (device, *device.all_below()):
            raise self.refuse("Device lookup failed: the device would stand on itself", value=name)
        self._stacked.setdefault(name, set()).add(self.owner)
        if device not in self.below:
            self.below.append(device)
            self.deps.append(STACKED + name)
        return device

    @property
    def restored(self) -> bool:
        """A former process of the device had this table loaded: where there is another way, do not refuse."""
        return self._descriptors.restored

    def shares(self, file: File) -> bool:
        """Whether another table of the device has the same file open."""
        return self._held.users_of(file) > sum(self._held.is_same(used, file) for used in self._used)

    def is_only_way(self, file: File) -> bool:
        """Whether the device has it open once, not direct and buffered, or writable and not."""
        return self._held.ways_to(file) == 1

    @cached_property
    def mapped_to_write(self) -> Mapping[Identity, int]:
        """Which files which process has mapped into its memory to write to them, as the table is loaded."""
        return mapped_to_write()

    @property
    def leases(self) -> Leases:
        """By which files of the device are kept from everybody else."""
        return self._held.leases

    @property
    def lent(self) -> bool:
        """A former process of the device had lent what its targets lend: others may be at those files until `anew`."""
        return self._descriptors.lent

    @property
    def whole(self) -> bool:
        """Where `lent`: what the table's target said of itself in the former process."""
        return self._descriptors.whole

    def lend(self, owner: int) -> None:
        """Gives up the claims on what the target with this number opened, until `anew`, so that other programs may
        work on it.
        """
        for key in self._asked_by(owner):
            self._let_go.add(key)
            self._held.lend(self._files[key][0])

    @contextmanager
    def anew(self, owner: int) -> Iterator[None]:
        """Around that target's asking for all its files again. What had been lent is claimed again when it is asked
        for, and opened again if its path leads to another file now; what is not asked for any more is given up.
        Raises BackingError, and BusyError while another program has one of the files; all is lent then.
        """
        self.owner = owner
        former = self._asked_by(owner)
        for key in former:
            self._segments.get(self._files[key][0], {}).pop(owner, None)
        try:
            for key in former:
                try:
                    if key in self._let_go and self._is_replaced(key):
                        self._give_up(key)
                        continue
                except BackingError as error:  # nobody need mind, unless it is asked for
                    self._unreachable[key] = error
                self._askers[key].discard(owner)
            yield
        except BaseException:
            for key in former:
                if key in self._files:
                    self._askers[key].add(owner)
            self.lend(owner)
            raise
        finally:
            self._unreachable.clear()
        for key in former:
            if key in self._files and not self._askers[key]:
                self._give_up(key)

    def _asked_by(self, owner: int) -> list[_Way]:
        return [key for key, askers in self._askers.items() if owner in askers]

    def _is_replaced(self, key: _Way) -> bool:
        path, writable, direct, _ = key
        identity, _ = self._files[key]
        return self._held.is_replaced(
            identity, path, self._places[key], writable=writable, direct=direct, descriptors=self._descriptors
        )

    def _give_up(self, key: _Way) -> None:
        identity, _ = self._files.pop(key)
        del self._askers[key], self._places[key]
        self._let_go.discard(key)
        if all(key[0] != other[0] for other in self._files):
            self.deps.remove(key[0])
        self._used.remove(identity)
        if identity not in self._used:
            self._by_blocks.pop(identity, None)
        self._held.release(identity)

    def segment(self) -> LiveSegment:
        """The segment being mapped, as it will be once loaded."""
        return LiveSegment(self._above, self.owner)

    def refuse(self, what: str, *, value: str = "", cure: str = "") -> TableError:
        """An error about the segment being mapped, to raise."""
        return TableError(what, place=self.place, value=value, cure=cure)

    def warn(self, what: str) -> None:
        """Says something about the segment being mapped in the log."""
        _log.warning("%s: %s", self.place, what) if self.place else _log.warning("%s", what)

    def written(self, owner: int | None = None) -> list[File]:
        """Files that may have been written to: of the target with that number, or of all."""
        keys = list(self._files) if owner is None else self._asked_by(owner)
        return list(dict.fromkeys(self._files[key][1] for key in keys if key[1]))

    def keep_failures(self) -> None:
        """Has the syncs that failed remembered with the descriptors."""
        for (path, writable, direct, _), (_, file) in list(self._files.items()):
            if file.sync_error:
                self._descriptors.sync_failed(path, writable=writable, direct=direct, number=file.sync_error)

    def sync_error(self, owner: int) -> int:
        """The errno of a sync that failed of what the target with this number stands on; 0 where none has."""
        below = (device.sync_error for name, device in self._devices.items() if owner in self._stacked.get(name, ()))
        return next(filter(None, (*(file.sync_error for file in self.written(owner)), *below)), 0)

    def close(self) -> None:
        """Gives everything up. Does no harm twice."""
        self._files.clear()
        self._askers.clear()
        while self._used:
            self._held.release(self._used.pop())


def _make_memory(size: int, *, huge_pages: bool, preallocate: bool) -> int:
    """A sealed memfd of `size` bytes. Raises ResourceError, OSError, OverflowError."""
    if preallocate and not huge_pages and size > (available := _available_memory()):
        # Asked for it, the kernel would take memory from everybody and then kill processes.
        raise ResourceError(
            f"{format_size(Bytes(size))} of memory cannot be had: {format_size(Bytes(available))} are available",
            cure="make the device smaller, or leave preallocate out",
        )
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if huge_pages:
        flags |= os.MFD_HUGETLB | os.MFD_HUGE_2MB
    fd = os.memfd_create("blkloom-ram", flags)
    try:
        os.ftruncate(fd, size)
        if preallocate or huge_pages:
            os.posix_fallocate(fd, 0, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _available_memory() -> int:
    """Bytes that can be taken without swapping: MemAvailable of proc_meminfo(5)."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            name, amount, *_ = line.split()
            if name == "MemAvailable:":
                return int(amount) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
