"""The files that one table has open, by path and mode, and the targets that use them.

A file is open once for each mode (direct or buffered, writable or not). `SharedFiles` shares it with other tables of
the device. A target may unlock its files while the device is suspended (`lend`), so that other programs can use them.
At the resume it opens and locks them again (`reacquired`).
Used by the loading thread, under the device's control lock.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TypeAlias

from blkloom._engine import File
from blkloom.errors import BackingError, Place, TableError
from blkloom.filemap.lease import Leases
from blkloom.filemap.mappings import mapped_to_write
from blkloom.open_files import descriptor_path
from blkloom.targets.descriptors import Descriptors
from blkloom.targets.holding import Identity, SharedFiles

_Way: TypeAlias = tuple[str, bool, bool, bool]
"""How a file is opened: path, writable, direct, shared."""


class TableFiles:
    """The open files of one table."""

    def __init__(self, held: SharedFiles, descriptors: Descriptors, deps: list[str]) -> None:
        """deps: list to which the path of each open file is added; it is removed with the file."""
        self._held = held
        self._descriptors = descriptors
        self._deps = deps
        self._used: list[Identity] = []
        self._files: dict[_Way, tuple[Identity, File]] = {}
        self._askers: dict[_Way, set[int]] = {}
        self._places: dict[_Way, str] = {}
        self._let_go: set[_Way] = set()
        self._unreachable: dict[_Way, BackingError] = {}
        self._by_blocks: dict[Identity, bool] = {}
        self._segments: dict[Identity, dict[int, bool]] = {}

    def open(
        self,
        path: str,
        owner: int,
        place: Place | None,
        *,
        writable: bool,
        direct: bool,
        shared: bool,
        by_blocks: bool,
        unlocked: bool,
        exclusive: bool,
    ) -> File:
        """Opens a file as `LoadContext.file` does, for the target `owner`, whose segment is at `place`."""
        key = (path, writable, direct, shared)
        if key in self._unreachable:
            raise self._unreachable[key]
        if key not in self._files:
            identity, file = self._held.take(
                path, writable=writable, direct=direct, shared=shared, descriptors=self._descriptors, unlocked=unlocked
            )
            self._used.append(identity)
            self._files[key] = identity, file
            # The path may be relative to the directory of another process.
            self._places[key] = path if os.path.isabs(path) else os.path.realpath(f"/proc/self/fd/{file.fileno()}")
            if path not in self._deps:
                self._deps.append(path)
        identity, file = self._files[key]
        self._askers.setdefault(key, set()).add(owner)
        if unlocked:
            self._let_go.add(key)
        elif key in self._let_go:
            self._held.claim_again(identity, self._descriptors)
            self._let_go.discard(key)
        if self._by_blocks.setdefault(identity, by_blocks) != by_blocks:
            raise TableError(
                "a file whose blocks are mapped cannot be used in another way too",
                place=place,
                value=path,
                cure="say block_map in all segments of the table that use the file, or in none",
            )
        if owner >= 0:
            users = self._segments.setdefault(identity, {})
            users[owner] = exclusive or users.get(owner, False)
            if len(users) > 1 and any(users.values()):
                raise TableError(
                    "an image that is written to cannot be used by two segments",
                    place=place,
                    value=path,
                    cure="give it one segment, and others parts of that device (linear)",
                )
        return file

    def descriptors(self) -> list[int]:
        """Of all files; they stay open as long as the table is loaded."""
        return [file.fileno() for _, file in self._files.values()]

    def absolute(self, path: str, file: File) -> str:
        """The absolute path of `file`, which was opened as `path`. A relative path begins at the directory in which it
        was opened; symbolic links in the path of that directory are resolved. Raises BackingError.
        """
        if os.path.isabs(path):
            return path
        folder, name = os.path.split(path)
        try:
            # The trailing slash distinguishes it from files of the load, so that a later process finds it again.
            fd = self._descriptors.open(os.path.join(folder or ".", ""), writable=False, direct=False)
        except BackingError as error:
            if error.errno != errno.ESTALE:
                raise
            # A former process of an older version did not keep the directory: use the resolved path, as it did.
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

    def shares(self, file: File) -> bool:
        """Whether another table of the device has the same file open."""
        return self._held.users_of(file) > sum(self._held.is_same(used, file) for used in self._used)

    def is_only_way(self, file: File) -> bool:
        """Whether the device has the file open in one mode only."""
        return self._held.ways_to(file) == 1

    @cached_property
    def mapped_to_write(self) -> Mapping[Identity, int]:
        """Files that a process has mapped for writing, with its pid, at the time of the load."""
        return mapped_to_write()

    @property
    def leases(self) -> Leases:
        """The leases on the files of the device."""
        return self._held.leases

    def lend(self, owner: int) -> None:
        """Unlocks the files of the target `owner` until `reacquired`, so that other programs can use them."""
        for key in self._asked_by(owner):
            self._let_go.add(key)
            self._held.lend(self._files[key][0])

    @contextmanager
    def reacquired(self, owner: int) -> Iterator[None]:
        """Opens the files of the target `owner` again: in the `with` block, the target opens all its files. A file that
        `lend` unlocked is locked again when it is opened, and reopened if its path leads to another file now. A file
        that is not opened in the block is closed. Raises BackingError, and BusyError while another program uses one of
        the files; then all of them are unlocked.
        """
        former = self._asked_by(owner)
        for key in former:
            self._segments.get(self._files[key][0], {}).pop(owner, None)
        try:
            for key in former:
                try:
                    if key in self._let_go and self._is_replaced(key):
                        self._give_up(key)
                        continue
                except BackingError as error:  # no error unless the file is needed
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
            self._deps.remove(key[0])
        self._used.remove(identity)
        if identity not in self._used:
            self._by_blocks.pop(identity, None)
        self._held.release(identity)

    def written(self, owner: int | None = None) -> list[File]:
        """Files that may have been written to: of the target `owner`, or of all targets."""
        keys = list(self._files) if owner is None else self._asked_by(owner)
        return list(dict.fromkeys(self._files[key][1] for key in keys if key[1]))

    def keep_failures(self) -> None:
        """Records failed syncs with the descriptors, for the next process of the device."""
        for (path, writable, direct, _), (_, file) in list(self._files.items()):
            if file.sync_error:
                self._descriptors.sync_failed(path, writable=writable, direct=direct, number=file.sync_error)

    def close(self) -> None:
        """Releases all files. A second call does nothing."""
        self._files.clear()
        self._askers.clear()
        while self._used:
            self._held.release(self._used.pop())
