"""Opens a backing chain from the names in images.

Files that an image names are opened through the path policy, for reading only, and once in a chain. The caller gives
the format of the top image. The format of another image comes from the image above, or from its first bytes. Nothing
recurses, for any depth. One thread (the mapper's). May fail: CorruptImage, UnsupportedImage, BackingError, OSError.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Final, Protocol

from blkloom import entries
from blkloom.errors import BackingError
from blkloom.image.chain import Chain
from blkloom.image.errors import CorruptImage, UnsupportedImage
from blkloom.image.registry import FORMATS, format_named, format_of_start
from blkloom.image.storage import FileStorage, Role
from blkloom.image.types import HostOffset

if TYPE_CHECKING:
    from blkloom._engine import File
    from blkloom.image.format import Backing, Format
    from blkloom.image.layer import Layer
    from blkloom.image.path_policy import PathPolicy
    from blkloom.image.redo_log import RedoLog

_MOST_LAYERS: Final = entries.FILES - 1
"""The engine's table has one file for each layer, and one for clusters made in memory."""
_PAGE: Final = 4096
"""Bytes of a page of the page cache, and of a block of most disks."""
_PROBED: Final = 64
"""Bytes at the start of a file from which its format is detected."""


class Files(Protocol):
    """Opens files: `blkloom.LoadContext`."""

    def file(
        self,
        path: str,
        *,
        read_only: bool,
        direct_io: bool,
        claimed: bool = True,
        exclusive: bool = False,
    ) -> File:
        """As `LoadContext.file`."""

    def warn(self, what: str) -> None:
        """As `LoadContext.warn`."""


StorageOf = Callable[["File", str, Role], FileStorage]
"""Makes the storage of an open file with that path, for one role."""


def plain(file: File, path: str, role: Role) -> FileStorage:
    """Plain storage, the same for every role."""
    return FileStorage(file.fileno(), path, file)


@dataclass(kw_only=True)
class _Files:
    """Opens the files of one chain. seen: their paths, by identity of the file."""

    files: Files
    policy: PathPolicy
    direct: bool
    claimed: bool
    storage_of: StorageOf
    seen: dict[tuple[int, int], str] = field(default_factory=dict)

    def enter(self, path: str, *, writable: bool, what: str) -> None:
        """Opens a file that must not be in the chain yet. Raises CorruptImage (ELOOP)."""
        status = os.fstat(self.buffered(path, writable=writable).fileno())
        identity = (-1, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)
        if identity in self.seen:
            raise CorruptImage(
                f"the backing chain is a cycle: the {what} is already in it, as {self.seen[identity]}",
                path=path,
                cure="see qemu-img info --backing-chain",
                errno=errno.ELOOP,
            )
        self.seen[identity] = path

    def buffered(self, path: str, *, writable: bool) -> File:
        """The file, opened through the page cache."""
        return self.files.file(path, read_only=not writable, direct_io=False, claimed=self.claimed, exclusive=writable)

    def storage(self, path: str, role: Role, *, writable: bool) -> FileStorage:
        """Storage of a file, through the page cache."""
        return self.storage_of(self.buffered(path, writable=writable), path, role)

    def for_engine(self, path: str, *, writable: bool, unit: int) -> File:
        """The file for guest data, in an image with units of `unit` bytes. Direct I/O writes whole blocks, with
        read-modify-write for parts. If a block contained several units, it could undo writes to the other units through
        the page cache, so smaller units are buffered.
        """
        opened = partial(self.files.file, path, read_only=not writable, claimed=self.claimed, exclusive=writable)
        file = opened(direct_io=self.direct)
        if not (writable and file.direct and unit < (block := max(_PAGE, file.offset_alignment))):
            return file
        self.files.warn(f"{path}: no direct I/O, for its clusters of {unit} bytes are less than blocks of {block}")
        return opened(direct_io=False)


class ImageSource:
    """One file of a chain, for the format that opens it. path: of the file. number: of the layer, counted from the top.
    writable: whether it may be written to. redo: changes that a former process has not written to it.
    """

    def __init__(
        self,
        files: _Files,
        path: str,
        number: int,
        *,
        writable: bool,
        named: str | Callable[[], str],
        redo: RedoLog | None = None,
    ) -> None:
        self._files = files
        self.path: Final = path
        self.number: Final = number
        self.writable: Final = writable
        self.redo: Final = redo
        self._named = named
        files.enter(path, writable=writable, what="backing file" if number else "image")

    @cached_property
    def named(self) -> str:
        """The absolute name by which the file was opened: relative names in it begin at its directory."""
        return self._named if isinstance(self._named, str) else self._named()

    def metadata(self) -> FileStorage:
        """The file, for metadata."""
        return self._files.storage(self.path, "metadata", writable=self.writable)

    def data(self, unit: int = 0) -> tuple[FileStorage, File]:
        """The file for guest data in units of `unit` bytes: the storage for Python, and the file for the engine."""
        return self._data(self.path, unit)

    def data_file(self, name: bytes, unit: int) -> tuple[FileStorage, File]:
        """Another file, which the image calls `name`, as `data`. Raises BackingError if the path policy refuses it."""
        path = self._files.policy.reach(name, named_by=self.named, what="data file").path
        self._files.enter(path, writable=self.writable, what="data file")
        self._files.files.warn(f"{self.path}: its data is in the external file {path}")
        return self._data(path, unit)

    def _data(self, path: str, unit: int) -> tuple[FileStorage, File]:
        storage = self._files.storage(path, "data", writable=self.writable)
        return storage, self._files.for_engine(path, writable=self.writable, unit=unit)


def open_chain(
    path: str,
    files: Files,
    policy: PathPolicy,
    *,
    format: Format,
    writable: bool = False,
    direct: bool = False,
    claimed: bool = True,
    home: Callable[[], str] | None = None,
    storage: StorageOf = plain,
    redo: RedoLog | None = None,
) -> Chain:
    """Opens the image of `format` at `path` and all its backing files. writable: the top image is written to. direct:
    guest data bypasses the page cache. home: returns the absolute form of `path`, which may be relative to the
    directory of another process; it is called if the image names other files. storage: makes the storage for each file.
    redo: changes of the top image that a former process has not written to it.
    Raises CorruptImage, UnsupportedImage, BackingError, and the exceptions of `format.open`.
    """
    chain = _Files(files=files, policy=policy, direct=direct, claimed=claimed, storage_of=storage)
    layers: list[Layer] = []
    data: list[File] = []
    source = ImageSource(chain, path, 0, writable=writable, named=home or path, redo=redo)
    while True:
        opened = format.open(source)
        layers.append(opened.layer)
        data.append(opened.file)
        if opened.backing is None:
            return Chain(layers, data)
        reached = policy.reach(opened.backing.name, named_by=source.named, what="backing file")
        format = format_named(_form(chain, opened.backing, reached.path, source.named))
        if len(layers) == _MOST_LAYERS:
            raise BackingError(
                f"more than {_MOST_LAYERS} images in its chain, the limit",
                path=reached.path,
                errno=errno.ELOOP,
                cure="make one image of some of them (qemu-img rebase, or commit)",
            )
        source = ImageSource(chain, reached.path, len(layers), writable=False, named=reached.named)


def _form(chain: _Files, backing: Backing, path: str, named_by: str) -> str:
    """Name of the format of the backing file."""
    if backing.format is not None:
        form = backing.format.decode("utf-8", "backslashreplace")
        if form in FORMATS:
            return form
        # Names of QEMU's drivers for the storage of a raw file.
        if form in ("file", "host_device"):
            file = chain.buffered(path, writable=False)
            if stat.S_ISBLK(os.fstat(file.fileno()).st_mode) == (form == "host_device"):
                return "raw"
        raise UnsupportedImage(
            f"its backing file {path} has the format '{form}'",
            path=named_by,
            cure=f"{' and '.join(FORMATS)} are known; convert it with qemu-img",
        )
    form = format_of_start(chain.storage(path, "data", writable=False).read(HostOffset(0), _PROBED))
    chain.files.warn(
        f"{named_by} does not say which format its backing file {path} has; it looks like {form} "
        f"(qemu-img rebase -u -F {form} says so)"
    )
    return form
