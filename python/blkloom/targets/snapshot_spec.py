"""Arguments of targets with an exception store, and how they open it: `snapshot` and `snapshot-merge`.

Source: Linux Documentation/admin-guide/device-mapper/snapshot.rst; dm-snap.c and dm-exception-store.c for the texts of
errors. Used by the loading thread.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Final, Self

from typing_extensions import override

from blkloom import _engine
from blkloom.errors import BackingError
from blkloom.table.arguments import Arguments
from blkloom.table.syntax import Syntax, argument, flag, options
from blkloom.targets.device_ref import DeviceRef, whole_device
from blkloom.targets.exception_store import chunk_fault, read_header
from blkloom.targets.load_context import LoadContext
from blkloom.targets.spec import TargetSpec
from blkloom.units import SECTOR, Bytes, Sectors, to_bytes

DEFAULT_CHUNK: Final = Sectors(32)
"""The chunk size that 0 stands for."""


def _kind(arguments: Arguments) -> str:
    text = arguments.word("P|PO|N")
    if text.upper() not in ("P", "PO", "N"):
        raise arguments.error("Exception store type is not P or N", value=text)
    return text.upper()


def _chunk(arguments: Arguments) -> Sectors:
    chunk = arguments.sectors("chunk size")
    if fault := chunk_fault(chunk):
        raise arguments.error(fault, value=str(chunk), cure="give a power of 2 up to 2097152, in sectors; 32 is usual")
    return chunk


_ARGUMENTS: Final[Syntax] = (
    whole_device("origin", "origin"),
    whole_device("cow", "COW device"),
    argument("kind", "<P|PO|N>", _kind),
    argument("chunk", "<chunk size>", _chunk),
    options(flag("discard_zeroes_cow"), flag("discard_passdown_origin")),
)


class SnapshotSpec(TargetSpec):
    """Base class of targets with an exception store. kind: P persistent, PO with the status Overflow, N transient.
    chunk: 0 for the default. discard_zeroes_cow: a discarded chunk that is in the store reads as zeros.
    discard_passdown_origin: discards of unchanged chunks go to the origin.
    """

    origin: DeviceRef
    cow: DeviceRef
    kind: str
    chunk: Sectors
    discard_zeroes_cow: bool = False
    discard_passdown_origin: bool = False

    arguments: ClassVar[Syntax] = _ARGUMENTS
    singleton: ClassVar[bool] = True

    @classmethod
    @override
    def parse(cls, arguments: Arguments) -> Self:
        found = super().parse(arguments)
        if found.discard_passdown_origin and not found.discard_zeroes_cow:
            what = "discard_passdown_origin feature depends on discard_zeroes_cow"
            raise arguments.error(what, value="discard_passdown_origin", cure="give both, or neither")
        return found

    @override
    def device_refs(self) -> Sequence[DeviceRef]:
        return (self.origin, self.cow)

    def check(self, context: LoadContext) -> Bytes:
        """Checks what any target with a store needs; returns the size of the store. Raises TableError."""
        if self.origin.path == self.cow.path:
            what = "COW device cannot be the same as origin device"
            raise context.refuse(what, value=self.cow.path, cure="name another file or device for the changes")
        size = self.cow.size(context)
        if size < 2 * SECTOR:
            raise context.refuse("COW device too small", value=self.cow.path, cure="give it room for the changes")
        return Bytes(size // SECTOR * SECTOR)

    @contextmanager
    def opening_store(self, use: str, cure: str) -> Iterator[None]:
        """Turns errors of the store in the block into BackingError. use: what it cannot be."""
        try:
            yield
        except (OSError, ValueError) as error:
            what = f"the exception store cannot be {use}: {getattr(error, 'strerror', None) or error}"
            number = getattr(error, "errno", None) or errno.EINVAL
            raise BackingError(what, path=self.cow.path, errno=number, cure=cure) from error

    def chunk_of(self, cow: _engine.Device, context: LoadContext) -> Bytes:
        """The chunk size; that of the persistent store on `cow`, if there is one. Raises TableError, OSError."""
        if self.kind == "N":
            if not self.chunk:
                raise context.refuse("Chunk size not set", value="0", cure="a transient store has no default; try 32")
            return to_bytes(self.chunk)
        try:
            header = read_header(cow)
        except ValueError as error:
            cure = "name its store; for a new snapshot, zero its first chunk"
            raise context.refuse(str(error), value=self.cow.path, cure=cure) from error
        chunk = self.chunk or DEFAULT_CHUNK
        if header is None or header.chunk == chunk:
            return to_bytes(chunk)
        if self.chunk:
            what = f"chunk size {header.chunk} in device metadata overrides table chunk size of {chunk}"
            context.warn(f"{self.cow.path}: {what}")
        return to_bytes(header.chunk)
