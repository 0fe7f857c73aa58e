"""Storage whose failures are noted, and may be made: what an image that lives in a device is read and written through.

One for the metadata of a file and one for the guest data in it, so that each knows whose failure it sees. Threads and
errors are those of `FileStorage`; what failed is raised on.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from typing_extensions import override

from blkloom.qcow2.storage import FileStorage, Role

if TYPE_CHECKING:
    from blkloom._engine import File
    from blkloom.qcow2.injection import Injected, Injection
    from blkloom.qcow2.troubles import Kind, Troubles
    from blkloom.qcow2.types import HostOffset

_READS: Final[dict[Role, tuple[Kind, Injected]]] = {
    "metadata": ("metadata_read", "metadata_reads"),
    "data": ("data_read", "data_reads"),
}
_WRITES: Final[dict[Role, tuple[Kind, Injected]]] = {
    "metadata": ("metadata_write", "metadata_writes"),
    "data": ("data_write", "data_writes"),
}


class WatchedStorage(FileStorage):
    """`file`, for one role of it. injection: None where nothing is ever made to fail."""

    def __init__(self, file: File, path: str, role: Role, troubles: Troubles, injection: Injection | None) -> None:
        super().__init__(file.fileno(), path, file)
        self._opened = file
        self._reads = _READS[role]
        self._writes = _WRITES[role]
        self._troubles = troubles
        self._injection = injection

    @override
    def read(self, offset: HostOffset, length: int) -> bytes:
        try:
            if self._injection:
                self._injection.meet(self._reads[1], self.path)
            return super().read(offset, length)
        except OSError as error:
            self._troubles.note(self._reads[0], error, f"{length} bytes at {offset:#x} of {self.path}")
            raise

    @override
    def write(self, offset: HostOffset, data: bytes) -> None:
        try:  # as `_doing`, for what copies on write do often
            if self._injection:
                self._injection.meet(self._writes[1], self.path)
            super().write(offset, data)
        except OSError as error:
            self._troubles.note(self._writes[0], error, f"{len(data)} bytes at {offset:#x} of {self.path}")
            raise

    @override
    def zero(self, offset: HostOffset, length: int) -> None:
        with self._doing(*self._writes, offset, length):
            super().zero(offset, length)

    @override
    def punch(self, offset: HostOffset, length: int) -> bool:
        try:
            return super().punch(offset, length)
        except OSError as error:
            self._troubles.note(self._writes[0], error, f"a hole of {length} bytes at {offset:#x} of {self.path}")
            raise

    @override
    def sync(self) -> None:
        try:
            try:
                if self._injection:
                    self._injection.meet("syncs", self.path)
            except OSError as error:
                self._opened.fail_syncs(error.errno or errno.EIO)
                raise
            super().sync()
        except OSError as error:
            self._troubles.note("sync", error, self.path)
            raise

    @override
    def truncate(self, size: int) -> None:
        before = self.size()
        if size < before:
            self._troubles.cut_failed = True
            super().truncate(size)
            self._troubles.cut_failed = False
        else:
            with self._doing("allocation", "allocations", before, size - before):
                super().truncate(size)

    @override
    def reserve(self, offset: HostOffset, length: int) -> None:
        with self._doing("allocation", "allocations", offset, length):
            super().reserve(offset, length)

    @contextmanager
    def _doing(self, kind: Kind, injected: Injected, offset: int, length: int) -> Iterator[None]:
        try:
            if self._injection:
                self._injection.meet(injected, self.path)
            yield
        except OSError as error:
            self._troubles.note(kind, error, f"{length} bytes at {offset:#x} of {self.path}")
            raise
