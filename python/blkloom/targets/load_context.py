"""Resources for targets while a table loads: files, memory, other devices.

Each loaded table has one LoadContext. It closes every resource that it gave out when the table is replaced, the device
closes, or the load fails. Targets do not close these resources.
Used by the loading thread, under the device's control lock.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from blkloom import _engine, open_files
from blkloom._engine import File, Region
from blkloom.device_names import STACKED
from blkloom.errors import Place, ResourceError, TableError
from blkloom.targets.descriptors import Descriptors, OwnDescriptors
from blkloom.targets.holding import SharedFiles
from blkloom.targets.live_segment import LiveSegment
from blkloom.targets.region import make_region
from blkloom.targets.saved_state import SavedState, TableState
from blkloom.targets.table_files import TableFiles
from blkloom.units import Bytes

if TYPE_CHECKING:
    from blkloom._engine import BackendQueue, Extent
    from blkloom.device.device import Device
    from blkloom.targets.backend import Backend
    from blkloom.targets.backend_loop import BackendLoop

_log = logging.getLogger(__name__)


class LoadContext:
    """Opens files, memory and lower devices for one table.

    read_only: no file may be opened for writing, and no extent may be writable. direct_io: the default of `file`.
    place: position of the segment being loaded in the table, for errors. owner: number of that segment; negative: no
    segment is being loaded. alone: it is the only segment of its table. device_folder: paths in this directory name
    devices (`device_name`). deps: paths of files, and lower devices as `blkloom:NAME`, each once. files: the open
    files. below: the lower devices. above: the device that the table is for; a device stacked on it is refused as a
    lower device.
    """

    def __init__(
        self,
        held: SharedFiles,
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
        self.files = TableFiles(held, self._descriptors, self.deps)
        self._state = TableState(self._descriptors)
        self._stacked: dict[str, set[int]] = {}
        self._loops: list[BackendLoop] = []
        self._lower: list[_engine.Device] = []
        self._warnings: set[str] = set()

    def file(
        self,
        path: str,
        *,
        read_only: bool = False,
        direct_io: bool | None = None,
        claimed: bool = True,
        by_blocks: bool = False,
        unlocked: bool = False,
        exclusive: bool = False,
    ) -> File:
        """Opens the regular file or block device at `path`. The same arguments return the same File.

        The File is writable unless `read_only` is set here or for the whole load. direct_io: None for the default of
        the load; if the file system refuses O_DIRECT, the File is buffered, with a warning. The file is claimed against
        other devices and processes unless the load is shared or `claimed` is False. by_blocks: the file's blocks are
        accessed without the file system (`blkloom.filemap`); then all segments of the table that use it must do so.
        unlocked: the claim is made later, in `reacquired`. exclusive: no other segment of the table may use the file.
        Raises BackingError, BusyError, TableError.
        """
        return self.files.open(
            path,
            self.owner,
            self.place,
            writable=not (read_only or self.read_only),
            direct=self.direct_io if direct_io is None else direct_io,
            shared=self._shared or not claimed,
            by_blocks=by_blocks,
            unlocked=unlocked,
            exclusive=exclusive,
        )

    def region(
        self, size: Bytes, *, huge_pages: bool = False, preallocate: bool = False, if_lost: bytes | None = None
    ) -> Region:
        """`size` bytes of zeros in a sealed memfd; after a restart, the memory with its former contents. if_lost: the
        first bytes if these were lost with the processes that had them; None: the load fails then.

        huge_pages: 2 MiB pages from the system's pool (vm.nr_hugepages). They are always allocated at once, because
        the kernel kills a process that touches a page when the pool is empty. Raises ResourceError.
        """
        return make_region(self._descriptors, size, huge_pages=huge_pages, preallocate=preallocate, if_lost=if_lost)

    def saved_state(self, *, if_lost: str = "it begins again as its table says") -> SavedState:
        """The state of the target that is being loaded, which the next process of the device gets. A table with targets
        that use it cannot use `region`. if_lost: what the target does without the state of the former process, for a
        warning. Raises OSError.
        """
        state = SavedState(self._state, self.owner)
        if state.is_lost:
            self.warn(f"the state of this target is lost with the processes that had it; {if_lost}")
        return state

    def changes(self) -> int | None:
        """See `Descriptors.changes`."""
        return self._descriptors.changes()

    def shared(self, name: str, value: object) -> object:
        """An object that all tables of the device share: `value`, or what another table has given."""
        return value if self._above is None else self._above.shared.setdefault(name, value)

    @property
    def engine(self) -> _engine.Engine:
        """The engine of the device that the table is for. Raises ResourceError."""
        if self._above is None:
            raise ResourceError("the table is loaded without a device", cure="load it into a device")
        return self._above.engine

    def lower(self, extent: Extent, length: Bytes) -> _engine.Device:
        """`extent` as a device of its own, closed with the table: for a backend that uses it (`targets.lower`). Raises
        ResourceError.
        """
        device = _engine.Device(self.engine, _engine.Map([(0, length, 0, extent)]))
        self._lower.append(device)
        return device

    def backend(self, backend: Backend) -> BackendQueue:
        """Starts `backend` until the table closes; returns its queue for `Extent.backend`. Raises ResourceError."""
        from blkloom.targets.backend_loop import BackendLoop  # a slow import that few tables need

        try:
            loop = BackendLoop(backend)
        except (OSError, RuntimeError) as error:
            raise ResourceError(
                f"no event loop for a backend can be had: {getattr(error, 'strerror', None) or error}",
                cure=open_files.advice(),
                errno=getattr(error, "errno", None) or errno.EAGAIN,
            ) from error
        self._loops.append(loop)
        return loop.queue

    def device(self, name: str) -> Device:
        """The lower device `name`. Raises TableError if it does not exist, or if the devices would form a cycle."""
        device = self._devices.get(name)
        if device is None:
            known = ", ".join(sorted(self._devices)) or "none"
            raise self.refuse("Device lookup failed: no such blkloom device", value=name, cure=f"there are: {known}")
        if self._above is not None and self._above in (device, *device.all_below()):
            raise self.refuse(
                "Device lookup failed: the device would be stacked on itself", value=name, cure="name a device below it"
            )
        self._stacked.setdefault(name, set()).add(self.owner)
        if device not in self.below:
            self.below.append(device)
            self.deps.append(STACKED + name)
        return device

    @property
    def restored(self) -> bool:
        """Whether a former process of the device had this table loaded: then fall back rather than refuse."""
        return self._descriptors.restored

    @property
    def was_active(self) -> bool:
        """Whether that table was the active one."""
        return self._descriptors.was_active

    @property
    def unlocked(self) -> bool:
        """Whether the table is restored with its files unlocked: others may use these files until `reacquired`."""
        return self._descriptors.unlocked

    @property
    def whole(self) -> bool:
        """If `unlocked`: `LoadedTarget.whole` of the table's target in the former process."""
        return self._descriptors.whole

    @contextmanager
    def reacquired(self, owner: int) -> Iterator[None]:
        """`TableFiles.reacquired` for the target with the number `owner`: in the block, `file` opens for it."""
        self.owner = owner
        with self.files.reacquired(owner):
            yield

    def segment(self) -> LiveSegment:
        """The `LiveSegment` of the segment being loaded."""
        return LiveSegment(self._above, self.owner)

    def refuse(self, what: str, *, value: str = "", cure: str = "") -> TableError:
        """Returns an error about the segment being loaded, for the caller to raise."""
        return TableError(what, place=self.place, value=value, cure=cure)

    def warn(self, what: str) -> None:
        """Logs a warning about the segment being loaded. Each text is logged once, because a target maps the same files
        again at every resume.
        """
        text = f"{self.place}: {what}" if self.place else what
        if text not in self._warnings:
            self._warnings.add(text)
            _log.warning("%s", text)

    def sync_error(self, owner: int) -> int:
        """The errno of a failed sync of a file or lower device of the target `owner`; 0: none failed."""
        below = (device.sync_error for name, device in self._devices.items() if owner in self._stacked.get(name, ()))
        return next(filter(None, (*(file.sync_error for file in self.files.written(owner)), *below)), 0)

    def close(self) -> None:
        """Closes backends and files. A second call does nothing."""
        while self._loops:
            self._loops.pop().close()
        while self._lower:
            self._lower.pop().close()
        self._state.close()
        self.files.close()
