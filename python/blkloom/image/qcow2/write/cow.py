"""Copy on write: fills the part of a new cluster that the write does not cover, before the engine gets the new entry.

A cluster has all of its old contents, or the new contents where the bytes of the write are available, before the engine
gets its entry. So each byte has its value from before or after the write, even if the client disconnects or the machine
stops. One thread (the mapper's). May fail: OSError of the files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from blkloom.image.types import GuestOffset, HostOffset

if TYPE_CHECKING:
    from blkloom.image.format import Below, Relocation
    from blkloom.image.storage import Storage

_PIECE: Final = 1 << 20
_GLANCE: Final = 16
"""Number of bytes that distinguish most data from zeros."""


class Payload:
    """The bytes of a write. They are fetched, with a copy, when they are first needed."""

    def __init__(self, offset: GuestOffset, length: int, fetch: Callable[[], bytes] | None) -> None:
        self.offset = offset
        self.end = offset + length
        self._fetch = fetch
        self._bytes: bytes | None = None
        self.at_hand: Final = fetch is not None

    def covers(self, low: int, high: int) -> bool:
        """Whether the payload has all bytes of the guest range [low, high)."""
        return self.at_hand and self.offset <= low and high <= self.end

    def part(self, low: int, high: int) -> bytes:
        """The bytes of [low, high), guest offsets within the write."""
        if self._bytes is None:
            assert self._fetch is not None, "at_hand says so"
            self._bytes = self._fetch()
        if (low, high) == (self.offset, self.end):
            return self._bytes
        return self._bytes[low - self.offset : high - self.offset]


class Copier:
    """Copies old contents of guest ranges to host ranges of `storage`.

    read: current contents of the guest's disk: (offset, length) to bytes, zeros past the end of the disk. relocation:
    None for no fast copies.
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
        """Writes the contents of guest range [low, high) to the host range at `host`, with the payload over it if it is
        available. zeroed: the host range already reads as zeros. below: all of the range is provided by the backing
        chain.
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
        """`fill` for one cluster with the fast copy. Returns False, without any change, if there is none."""
        assert self._relocation is not None, "it relocates"
        start = cluster << cluster_bits
        low, high = max(payload.offset, start), min(payload.end, start + (1 << cluster_bits))
        patch = payload.part(low, high) if payload.at_hand else b""
        done = self._relocation.relocate(cluster, host, patch, low - start)
        self.copied += done << cluster_bits
        return done

    def _over(self, old: bytes, low: int, payload: Payload) -> bytes:
        """The payload merged over the contents `old` of guest range [low, low + len(old))."""
        self.copied += len(old)
        start, end = max(low, payload.offset), min(low + len(old), payload.end)
        if not payload.at_hand or start >= end:
            return old
        return b"".join((old[: start - low], payload.part(start, end), old[end - low :]))


def is_zeros(data: bytes) -> bool:
    """Whether all bytes are zero."""
    return not any(data[:_GLANCE]) and data.count(0) == len(data)
