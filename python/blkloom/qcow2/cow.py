"""Copy on write: puts what a write does not cover where the write will go, before anybody is sent there.

What is published holds all of its old contents (or the new ones, where the write is at hand), so that whatever
happens to the write itself (the client goes, the machine stops), each byte reads as before or as after it.
One thread (the mapper's). May fail: OSError of the files below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from blkloom.qcow2.types import GuestOffset, HostOffset

if TYPE_CHECKING:
    from blkloom.qcow2.storage import Storage

_PIECE: Final = 1 << 20
_GLANCE: Final = 16
"""Most data can be told from zeros by so many bytes."""


class Below(Protocol):
    """What the image would read as if it had no clusters of its own: its backing chain."""

    def zeros(self, first: int, count: int) -> NDArray[np.bool_]:
        """Of `count` units from unit `first` on, those that certainly read as zeros."""

    def read_below(self, offset: GuestOffset, length: int) -> bytes:
        """Its bytes; zeros past its end."""


class Payload:
    """The bytes of the write that asks, fetched when first needed (a copy of them is made then)."""

    def __init__(self, offset: GuestOffset, length: int, fetch: Callable[[], bytes] | None) -> None:
        self.offset = offset
        self.end = offset + length
        self._fetch = fetch
        self._bytes: bytes | None = None
        self.at_hand: Final = fetch is not None

    def covers(self, low: int, high: int) -> bool:
        """Whether all of guest range [low, high) is at hand."""
        return self.at_hand and self.offset <= low and high <= self.end

    def part(self, low: int, high: int) -> bytes:
        """The bytes of [low, high), guest offsets within the write."""
        if self._bytes is None:
            assert self._fetch is not None, "at_hand says so"
            self._bytes = self._fetch()
        if (low, high) == (self.offset, self.end):
            return self._bytes
        return self._bytes[low - self.offset : high - self.offset]


class Relocation(Protocol):
    """The quick way to copy a cluster, for what the engine reads and would not write to."""

    def only_read(self, cluster: int) -> bool:
        """Whether a guest cluster is that, its first unit at least."""

    def relocate(self, cluster: int, host: int, patch: bytes, patch_at: int) -> bool:
        """Copies it, with the patch over it from byte `patch_at` on, to `host` of the data's storage. False, with
        nothing done, where some of it is anything else. Raises OSError.
        """


class Copier:
    """Copies old contents of guest ranges to host ranges of `storage`.

    read: the guest's contents as they are now: (offset, length) to bytes, zeros past the end of the disk. relocation:
    None for none.
    """

    def __init__(
        self, storage: Storage, read: Callable[[GuestOffset, int], bytes], relocation: Relocation | None = None
    ) -> None:
        self._storage = storage
        self._read = read
        self._relocation = relocation
        self.copied = 0
        """Bytes of old contents copied."""

    def fill(
        self, low: int, high: int, host: int, payload: Payload, *, zeroed: bool, below: Below | None = None
    ) -> None:
        """Makes the host range at `host` what guest range [low, high) holds with the payload over it, or without,
        if that is not at hand. zeroed: the host range reads as zeros already. below: all of it shows through from
        there.
        """
        read = below.read_below if below else self._read
        for start in range(low, high, _PIECE):
            end = min(start + _PIECE, high)
            contents = (
                payload.part(start, end)
                if payload.covers(start, end)
                else self._over(read(GuestOffset(start), end - start), start, payload)
            )
            if not (zeroed and is_zeros(contents)):
                self._storage.write(HostOffset(host + start - low), contents)

    def relocates(self, cluster: int) -> bool:
        """Whether `relocate` may be tried."""
        return self._relocation is not None and self._relocation.only_read(cluster)

    def relocate(self, cluster: int, cluster_bits: int, host: int, payload: Payload) -> bool:
        """`fill`, of one cluster and the quick way; False, with nothing done, where there is none."""
        assert self._relocation is not None, "it relocates"
        start = cluster << cluster_bits
        low, high = max(payload.offset, start), min(payload.end, start + (1 << cluster_bits))
        patch = payload.part(low, high) if payload.at_hand else b""
        done = self._relocation.relocate(cluster, host, patch, low - start)
        self.copied += done << cluster_bits
        return done

    def _over(self, old: bytes, low: int, payload: Payload) -> bytes:
        """The payload over what guest range [low, low + len(old)) holds."""
        self.copied += len(old)
        start, end = max(low, payload.offset), min(low + len(old), payload.end)
        if not payload.at_hand or start >= end:
            return old
        return b"".join((old[: start - low], payload.part(start, end), old[end - low :]))


def is_zeros(data: bytes) -> bool:
    """Whether there is nothing else in it."""
    return not any(data[:_GLANCE]) and data.count(0) == len(data)
