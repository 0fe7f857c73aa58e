"""A backing chain: opened from the names that images give, and flattened as it is looked up.

`open_chain` opens what the images name, through the gate and for reading only; `Chain` answers for the whole stack:
where a unit is, over all layers at once, and what its bytes are. Layers may have different cluster sizes; a unit of
the chain is the smallest unit of any of them. Depth costs a lookup once for each page of the table, reads nothing.
Nothing recurses, whatever the depth. One thread (the mapper's). May fail: CorruptImage, UnsupportedImage,
BackingError, OSError.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from blkloom.errors import BackingError
from blkloom.qcow2 import places
from blkloom.qcow2.errors import CorruptImage, UnsupportedImage
from blkloom.qcow2.header import MAGIC, ExtensionKind, Header, read_header
from blkloom.qcow2.image import Image
from blkloom.qcow2.layers import ImageLayer, Job, Layer, RawLayer
from blkloom.qcow2.snapshots import find_snapshot, read_snapshots
from blkloom.qcow2.storage import FileStorage, Role
from blkloom.qcow2.types import HostOffset, Words

if TYPE_CHECKING:
    from blkloom._engine import File
    from blkloom.gate import Gate

_MOST_LAYERS: Final = places.MOST_FILES - 1
"""The engine's table has one file a layer, and one for what is made in memory."""
_PAGE: Final = 4096
"""Of the cache, and of most disks a block."""
_AT_ONCE: Final = 1 << 20
"""Units looked up at once; the top image's may be many of the chain's."""


class Files(Protocol):
    """Who opens files: `target.opening.Opening`."""

    def file(
        self,
        path: str,
        *,
        read_only: bool,
        direct_io: bool,
        claimed: bool = True,
        exclusive: bool = False,
    ) -> File:
        """As `Opening.file`."""

    def warn(self, what: str) -> None:
        """As `Opening.warn`."""


StorageOf = Callable[["File", str, Role], FileStorage]
"""Makes the storage of an open file, whose path that is, for one role of it."""


def plain(file: File, path: str, role: Role) -> FileStorage:
    """The same for every role."""
    return FileStorage(file.fileno(), path, file)


class Chain:
    """layers: from the top down. files: the engine's file of each. unit_bits: of the chain."""

    def __init__(self, layers: list[Layer], files: list[File]) -> None:
        self.layers: Final = layers
        self.files: Final = files
        top = layers[0]
        assert isinstance(top, ImageLayer), "a raw file needs no chain"
        self.top: Final = top
        self.unit_bits: Final = min(layer.unit_bits for layer in layers)
        self.largest_cluster: Final = 1 << max(self.unit_bits, *(layer.cluster_bits for layer in layers))

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.top.size

    def images(self) -> list[Image]:
        """From the top down; a raw file at the bottom is none."""
        return [layer.image for layer in self.layers if isinstance(layer, ImageLayer)]

    def places(self, first: int, count: int) -> Words:
        """Where units are: an entry each, none of which shows through."""
        found = self.top.places(first, count, self.unit_bits)
        return self._below(found, first, self.layers[1:])

    def contradiction(self, place: int, unit: int) -> CorruptImage:
        """What is wrong where unit `unit` is CORRUPT by its entry `place`. Raises OSError."""
        layer = self.layers[place >> int(places.FILE_SHIFT) & int(places.FILE_MASK)]
        assert isinstance(layer, ImageLayer), "a raw file has no metadata"
        return layer.image.contradiction(unit << self.unit_bits >> layer.unit_bits)

    def report(self, error: CorruptImage) -> None:
        """A request met what is wrong with one of the images: that image says so."""
        for image in self.images():
            if image.path == error.path:
                image.report(error)

    def zeros(self, first: int, count: int) -> NDArray[np.bool_]:
        """Of `count` units of the *top image* from `first` on, those that would certainly read as zeros if the top
        held nothing there.
        """
        shift = self.top.unit_bits - self.unit_bits
        zeros = np.empty(count, np.bool_)
        step = max(_AT_ONCE >> shift, 1)
        for low in range(0, count, step):
            part = zeros[low : low + step]
            found = self._below(np.zeros(part.size << shift, np.uint64), first + low << shift, self.layers[1:])
            np.all((found == places.ZERO).reshape(part.size, 1 << shift), axis=1, out=part)
        return zeros

    def unallocated(self, first: int, count: int) -> int:
        """How many of `count` units from `first` on certainly are in no layer and read as zeros, told from the L1
        tables; 0 where that takes a closer look.
        """
        for layer in self.layers:
            if layer.number:
                whole, rest = divmod(layer.size, 1 << self.unit_bits)
                if first >= whole + bool(rest):
                    return count  # past its end it hides what is below
                if rest:
                    count = min(count, whole - first)  # the unit that it ends in is made in memory
            count = min(count, layer.unallocated(first, count, self.unit_bits)) if count else 0
        return count

    def _below(self, found: Words, first: int, layers: list[Layer]) -> Words:
        """Fills what shows through from `layers`, and from nothing at last."""
        for layer in layers:
            through = np.flatnonzero(found == places.SHOWS_THROUGH)
            if not through.size:
                return found
            low, high = int(through[0]), int(through[-1]) + 1
            part = found[low:high]
            np.copyto(part, layer.places(first + low, high - low, self.unit_bits), where=part == places.SHOWS_THROUGH)
        found[found == places.SHOWS_THROUGH] = places.ZERO
        return found

    def read(self, offset: int, length: int, *, start: int = 0) -> bytes:
        """What the disk holds as seen from layer `start` down; zeros past its end. Raises CorruptImage, OSError."""
        out = bytearray(length)
        pieces = [(offset, offset + length)]
        for layer in self.layers[start:]:
            if not pieces:
                break
            pieces = layer.fill(out, offset, pieces)
        return bytes(out)

    def read_below(self, offset: int, length: int) -> bytes:
        """What shows through where the top image holds nothing."""
        return self.read(offset, length, start=1)

    def making(self, number: int, cluster: int) -> Job:
        """What makes a cluster of layer `number` that is IN_MEMORY; the job may run on any thread. Raises CorruptImage,
        OSError.
        """
        layer = self.layers[number]
        bits = self.making_bits(number)
        if bits == layer.cluster_bits and (job := layer.compressed(cluster)):
            whole = layer.size - (cluster << bits)
            if number == 0 or whole >= 1 << bits:
                return job
        data = self.read(cluster << bits, 1 << bits, start=number)
        return lambda: data

    def making_bits(self, number: int) -> int:
        """What is made at once of a layer has `1 << n` bytes."""
        return max(self.layers[number].cluster_bits, self.unit_bits)


def open_chain(
    path: str,
    files: Files,
    gate: Gate,
    *,
    writable: bool = False,
    direct: bool = False,
    snapshot: str = "",
    claimed: bool = True,
    home: Callable[[], str] | None = None,
    storage: StorageOf = plain,
) -> Chain:
    """The image at `path` and all it stands on. writable: the top image is to be written to. direct: guest data goes
    past the page cache. home: gives its absolute name, where `path` may be relative to another process's directory; it
    is asked where the image names other files. storage: what files are read and written through. Raises CorruptImage,
    UnsupportedImage, BackingError, UsageError (no such snapshot).
    """
    return _Opener(files, gate, direct, claimed, storage).chain(path, writable=writable, snapshot=snapshot, home=home)


@dataclass(slots=True)
class _Opener:
    files: Files
    gate: Gate
    direct: bool
    claimed: bool
    storage: StorageOf
    seen: dict[tuple[int, int], str] = field(default_factory=dict)

    def chain(self, path: str, *, writable: bool, snapshot: str, home: Callable[[], str] | None) -> Chain:
        layers: list[Layer] = []
        data: list[File] = []
        form, named_by = "qcow2", path
        while True:
            if len(layers) == _MOST_LAYERS:
                raise BackingError(f"a chain of more than {_MOST_LAYERS} images", path=path, errno=errno.ELOOP)
            top = not layers
            what = "image" if top else "backing file"
            role: Role = "data" if form == "raw" else "metadata"
            storage = self._storage(path, writable=writable and top, what=what, role=role)
            if form == "raw":
                layers.append(RawLayer(len(layers), storage))
                data.append(self._data(path, writable=False))
                break
            header = read_header(storage)
            if top and home and (header.backing_name is not None or header.has_data_file):
                named_by = home()
            layer, file = self._image(
                len(layers), path, named_by, storage, header, writable and top, snapshot if top else ""
            )
            layers.append(layer)
            data.append(file)
            if header.backing_name is None:
                break
            reached = self.gate.reach(header.backing_name, named_by=named_by, what="backing file")
            form = self._form(header, reached.path, named_by)
            path, named_by = reached.path, reached.named
        return Chain(layers, data)

    def _image(
        self,
        number: int,
        path: str,
        named_by: str,
        storage: FileStorage,
        header: Header,
        writable: bool,
        snapshot: str,
    ) -> tuple[Layer, File]:
        data_path = path
        if header.has_data_file:
            name = header.extension(ExtensionKind.DATA_FILE_NAME)
            if not name:
                raise CorruptImage("it needs an external data file and names none", path=path)
            data_path = self.gate.reach(name, named_by=named_by, what="data file").path
            data_storage = self._storage(data_path, writable=writable, what="data file", role="data")
            self.files.warn(f"{path}: its data is in the external file {data_path}")
        else:
            data_storage = self.storage(self._open(path, writable=writable), path, "data")
        chosen = find_snapshot(read_snapshots(storage, header), snapshot, path=path) if snapshot else None
        image = Image.open(storage, writable=writable, data_storage=data_storage, header=header, snapshot=chosen)
        return ImageLayer(number, image), self._data(data_path, writable=writable, unit=image.geometry.unit)

    def _form(self, header: Header, path: str, named_by: str) -> str:
        """Raw or qcow2."""
        said = header.extension(ExtensionKind.BACKING_FORMAT)
        if said is not None:
            form = said.decode("utf-8", "backslashreplace")
            if form in ("raw", "qcow2"):
                return form
            # These are the names of QEMU's drivers for what a raw file lies in.
            if form in ("file", "host_device"):
                file = self._open(path, writable=False)
                if stat.S_ISBLK(os.fstat(file.fileno()).st_mode) == (form == "host_device"):
                    return "raw"
            raise UnsupportedImage(
                f"its backing file {path} has the format {form!r}",
                path=named_by,
                cure="qcow2 and raw are known; convert it with qemu-img",
            )
        storage = self.storage(self._open(path, writable=False), path, "data")
        form = "qcow2" if storage.read(HostOffset(0), 4) == MAGIC else "raw"
        self.files.warn(
            f"{named_by} does not say which format its backing file {path} has; it looks like {form} "
            f"(qemu-img rebase -u -F {form} says so)"
        )
        return form

    def _storage(self, path: str, *, writable: bool, what: str, role: Role = "metadata") -> FileStorage:
        """For metadata, buffered. Each file stands in a chain once."""
        file = self._open(path, writable=writable)
        status = os.fstat(file.fileno())
        identity = (-1, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)
        if identity in self.seen:
            raise CorruptImage(
                f"the {what} is in a chain that leads back to itself: it is there as {self.seen[identity]} already",
                path=path,
                cure="see qemu-img info --backing-chain",
                errno=errno.ELOOP,
            )
        self.seen[identity] = path
        return self.storage(file, path, role)

    def _open(self, path: str, *, writable: bool) -> File:
        return self.files.file(path, read_only=not writable, direct_io=False, claimed=self.claimed, exclusive=writable)

    def _data(self, path: str, *, writable: bool, unit: int = 0) -> File:
        """For guest data, in an image in pieces of `unit` bytes. Direct I/O writes blocks, or it reads and writes them:
        were there others in a block, what we write to these meanwhile through the cache would be undone.
        """
        opened = partial(self.files.file, path, read_only=not writable, claimed=self.claimed, exclusive=writable)
        file = opened(direct_io=self.direct)
        if not (writable and file.direct and unit < (block := max(_PAGE, file.offset_alignment))):
            return file
        self.files.warn(f"{path}: no direct I/O, for its clusters of {unit} bytes are less than blocks of {block}")
        return opened(direct_io=False)
