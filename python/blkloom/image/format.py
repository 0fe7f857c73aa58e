"""The interface of an image format.

A format opens images as layers of a chain (`layer.py`) and, if it is writable, provides a writer of the top layer. All
other code is the same for every format: the path policy for names in images, locks, direct I/O, the engine's cluster
table, clusters made in memory, block status, messages, suspend. A writable format sets `writable` and defines
`begin_writing`; a read-only one needs only `open` and `disk_size`. `registry.py` finds formats by name. One thread (the
mapper's).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from blkloom.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from blkloom._engine import File
    from blkloom.image.errors import CorruptImage
    from blkloom.image.layer import Layer
    from blkloom.image.open_chain import ImageSource
    from blkloom.image.redo_log import RedoLog
    from blkloom.image.storage import Storage
    from blkloom.image.types import GuestOffset, HostOffset, Words


class Backing(NamedTuple):
    """The backing file, as an image names it. name: as in the image. format: its format, None if the image does not say
    it.
    """

    name: bytes
    format: bytes | None


class Opened(NamedTuple):
    """An open image. file: read and written by the engine according to the layer's entries. backing: the backing file,
    None for none.
    """

    layer: Layer
    file: File
    backing: Backing | None = None


class Format(ABC):
    """One format. Options of a table for this format are attributes of the Format that opens the top image."""

    @property
    def writable(self) -> bool:
        """Whether `begin_writing` is defined for the top image."""
        return False

    @abstractmethod
    def open(self, source: ImageSource) -> Opened:
        """Opens the image in a file. Raises CorruptImage, UnsupportedImage, BackingError, UsageError."""

    @abstractmethod
    def disk_size(self, storage: Storage) -> int:
        """Bytes of the disk in the image. Raises CorruptImage, UnsupportedImage, OSError."""

    def new_image(self, size: int) -> bytes:
        """The file of a new image with an empty disk of `size` bytes, a multiple of 512. The file may have zeros after
        these bytes. Raises UsageError.
        """
        raise UsageError("images of this format cannot be made", cure="make it with qemu-img create")

    def begin_writing(self, top: Layer, context: WriteContext) -> ImageWriter:
        """Makes the writer of `top`, a layer that this format opened for writing; from now on its entries may allow the
        engine to write. Before this call, another program may use the image, and nothing of it is changed. Raises
        CorruptImage, OSError.
        """
        raise TypeError(f"{type(self).__qualname__} declares itself writable and does not define begin_writing")

    def end_writing(self, top: Layer) -> None:
        """Called after the writer of `top` was closed or dropped."""
        return


class Below(Protocol):
    """Contents that the top image would have without clusters of its own: its backing chain."""

    def zeros(self, first: int, count: int) -> NDArray[np.bool_]:
        """Which of `count` units of the top image from unit `first` on certainly read as zeros."""

    def read_below(self, offset: GuestOffset, length: int) -> bytes:
        """Bytes of the backing chain; zeros past its end."""


class Relocation(Protocol):
    """Fast copy of a cluster of the top image, for clusters that the engine may read and not write."""

    def only_read(self, cluster: int) -> bool:
        """Whether the engine may read and not write a guest cluster, at least its first unit."""

    def relocate(self, cluster: int, host: int, patch: bytes, patch_at: int) -> bool:
        """Copies the cluster, with the patch over it from byte `patch_at` on, to `host` of the data storage. Returns
        False, without any change, if a part of it is of another kind. Raises OSError.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteContext:
    """Services for a writer, and its callbacks.

    read: current contents of the disk, zeros past its end. install: stores consecutive entries in the engine's
    table, (first unit of the top image, an entry for each). synchronize: waits until no request is in flight that
    looked up the table before. below: None for no backing chain. relocation: fast copies of clusters. direct: the
    engine writes with direct I/O. take_space: storage is allocated at once for allocated clusters, so that writes
    to them find space. allocating: called before (offset, length) of the file is allocated; it may raise OSError.
    broke: `broken` was set; the engine must pass all requests to Python. redo: log of changes for the next process.
    wants_work: `work` has something to do from now on. checked: all refcounts are right now; the argument is the
    number of wrong ones.
    """

    read: Callable[[int, int], bytes]
    install: Callable[[int, Words], None]
    synchronize: Callable[[], None]
    below: Below | None = None
    relocation: Relocation | None = None
    direct: bool = False
    take_space: bool = False
    allocating: Callable[[HostOffset, int], None] | None = None
    broke: Callable[[], None] = lambda: None
    redo: RedoLog | None = None
    wants_work: Callable[[], None] = lambda: None
    checked: Callable[[int], None] = lambda _changed: None


class ImageWriter(Protocol):
    """Writer of the top image. The engine writes guest data by itself where the table allows it; the writer changes the
    table and does what must happen before. Offsets and lengths are bytes of the disk. An exception fails the request.
    """

    @property
    def broken(self) -> OSError | None:
        """The reason why nothing is written any more: the image is corrupt, or a sync of it failed."""

    @property
    def checking(self) -> bool:
        """Whether a check is running, after which there may be more space inside the file."""

    @property
    def frees_at_flush(self) -> bool:
        """Whether the next flush makes space usable."""

    def prepare_write(self, offset: int, length: int, payload: Callable[[], bytes] | None = None) -> bool:
        """Makes the range writable in place; then the engine can look up again. payload: fetches the bytes of the
        write, which may be written together with copied data. Returns whether the whole write is done.
        """

    def prepare_writes(self, writes: Sequence[tuple[int, int]]) -> Sequence[int]:
        """`prepare_write` for several (offset, length) at once and without their bytes. Returns the numbers of those
        that the engine can look up again; the others need `prepare_write`.
        """

    def write(self, offset: int, data: bytes) -> None:
        """Writes to a range that `prepare_write` has made writable, instead of the engine."""

    def discard(self, offset: int, length: int) -> None:
        """Discards a range: its contents are not needed any more."""

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool, fast: bool = False) -> None:
        """Makes the range read as zeros. Raises FaultError (EOPNOTSUPP) if `fast` is not possible."""

    def flush(self) -> None:
        """Makes all earlier writes durable. Raises FaultError (EIO) if some of them are lost."""

    def work(self) -> bool:
        """Does background work for a few milliseconds; returns whether there is more. Raises CorruptImage."""

    def mark_corrupt(self, error: CorruptImage) -> None:
        """Marks the image corrupt, and logs it; afterwards the image is read-only."""

    def fail(self, error: OSError) -> None:
        """Handles a failed sync of one of the files: afterwards the image is read-only."""

    def close(self) -> None:
        """Writes everything. Afterwards the image is exact, and other programs may change it. No request is in
        flight.
        """
