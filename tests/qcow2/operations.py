"""Operations on an image as Hypothesis values, with a bytearray as the model.

Sizes and offsets are mostly near the boundaries of clusters, where errors are likely. A discard is a hint: each of its
bytes may stay or read as zero afterwards. The model takes over the observed result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hypothesis import strategies as st

from blkloom import Device

from .attached import first_difference, read_all

Kind = Literal["write", "fua", "zeroes", "zeroes_unmap", "discard", "read", "flush", "suspend", "reopen", "snapshot"]

_GUEST: tuple[Kind, ...] = (
    *("write", "write", "write", "write", "fua"),
    *("zeroes", "zeroes_unmap", "discard", "discard", "read", "flush"),
)
_KEEPER: tuple[Kind, ...] = ("suspend", "reopen", "snapshot")


@dataclass(frozen=True)
class Operation:
    """offset and length in bytes; seed: of what is written, or which thing the keeper does."""

    kind: Kind
    offset: int = 0
    length: int = 0
    seed: int = 0


def data_of(operation: Operation) -> bytes:
    """No two sectors of it alike, no two operations alike."""
    unit = operation.seed.to_bytes(3, "big")
    found = b"".join(unit + (at & 0xFF).to_bytes(1, "big") for at in range(operation.length // 4 + 1))
    return found[: operation.length]


@st.composite
def operations(draw: st.DrawFn, *, size: int, cluster: int, most: int = 12, keeper: bool = True) -> list[Operation]:
    """A sequence. keeper: with reopening, suspending and snapshots in between."""
    edges = st.integers(0, size // min(cluster, size)).map(lambda n: n * cluster)
    near = st.builds(lambda edge, by: edge + by, edges, st.sampled_from([0, 0, 0, 1, 511, 512, -512, -1, 2048]))
    places = st.one_of(near, st.integers(0, size - 1)).filter(lambda at: 0 <= at < size)
    lengths = st.one_of(
        st.sampled_from([1, 512, 4096, cluster // 32 or 512, cluster - 512 or 512, cluster, 2 * cluster]),
        st.integers(1, 4 * cluster),
    )
    kinds = list(_GUEST + _KEEPER) if keeper else list(_GUEST)
    found = []
    for seed in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from(kinds))
        offset = draw(places)
        length = min(draw(lengths), size - offset)
        found.append(Operation(kind, offset, length, seed=seed + 1))
    return found


class Model:
    """The bytes a guest must read. touched: ranges (offset, end) that it wrote, zeroed or discarded."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.touched: list[tuple[int, int]] = []

    def do(self, device: Device, operation: Operation) -> None:
        """Carries out what concerns the guest, on the device and here. Raises AssertionError."""
        at, end = operation.offset, operation.offset + operation.length
        if operation.kind not in ("read", "flush"):
            self.touched.append((at, end))
        if operation.kind in ("write", "fua"):
            data = data_of(operation)
            assert device.pwrite(data, at, fua=operation.kind == "fua") == len(data)
            self.content[at:end] = data
        elif operation.kind in ("zeroes", "zeroes_unmap"):
            device.write_zeroes(at, operation.length, unmap=operation.kind == "zeroes_unmap")
            self.content[at:end] = bytes(operation.length)
        elif operation.kind == "discard":
            device.discard(at, operation.length)
            self._discarded(device.pread(operation.length, at), at)
        elif operation.kind == "read":
            found = device.pread(operation.length, at)
            assert not first_difference(found, bytes(self.content[at:end])), operation
        elif operation.kind == "flush":
            device.flush()

    def _discarded(self, found: bytes, at: int) -> None:
        end = at + len(found)
        for number, (byte, old) in enumerate(zip(found, self.content[at:end], strict=True)):
            assert byte in (old, 0), f"byte at {at + number:#x} is {byte:#x} after a discard, and was {old:#x}"
        self.content[at:end] = found

    def compare(self, device: Device) -> None:
        """The whole device against the model."""
        difference = first_difference(read_all(device), bytes(self.content))
        assert not difference, difference
