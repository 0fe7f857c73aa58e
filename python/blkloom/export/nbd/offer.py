"""The exports that a server offers in the handshake, and their lookup by name.

Pure data. A `Catalogue` is immutable; its entries are asked for an `Offer` each time, because a
device's size may change while the server runs. Source: proto.md "Size constraints",
"Transmission flags", NBD_OPT_EXPORT_NAME on the default export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Final, Self

import msgspec

from blkloom.errors import UsageError
from blkloom.export.nbd.codes import STRING_LIMIT, TransmissionFlag
from blkloom.units import DEVICE_LIMIT, SECTOR

CONTEXT_OFFERS: Final = 1024
"""Metadata contexts that an export offers at most, besides base:allocation; a list of them takes 4 MiB."""

_MAXIMUM: Final = 32 << 20


class BlockSizes(msgspec.Struct, frozen=True):
    """Size constraints of an export, in bytes. The defaults are the protocol's own.

    minimum: offsets and lengths are multiples of it (a power of two up to 65536). preferred:
    the efficient size (a power of two, at least 512 and the minimum). maximum: the largest payload
    (at least preferred). Raises UsageError otherwise.
    """

    minimum: int = 1
    preferred: int = 4096
    maximum: int = _MAXIMUM

    def __post_init__(self) -> None:
        if not (_power_of_two(self.minimum) and self.minimum <= 65536):
            raise UsageError(
                f"minimum block size {self.minimum} is not possible", cure="give a power of two from 1 to 65536"
            )
        if not (_power_of_two(self.preferred) and max(self.minimum, 512) <= self.preferred < 1 << 32):
            raise UsageError(
                f"preferred block size {self.preferred} is not possible",
                cure=f"give a power of two, at least {max(self.minimum, 512)}",
            )
        if not self.preferred <= self.maximum < 1 << 32:
            raise UsageError(
                f"maximum payload {self.maximum} is not possible", cure=f"give {self.preferred} to 4294967295 bytes"
            )

    @classmethod
    def fitting(cls, size: int, logical: int, optimal: int) -> Self:
        """The sizes for a device of `size` bytes with blocks of `logical` bytes and efficient I/O of `optimal` bytes.

        Nothing is enforced: the engine serves requests of any alignment, clients that do not ask for these
        sizes use the protocol's default of 1, and for devices that need only sectors the same is offered. A
        larger block is offered so that clients send no request for which a block must be read, changed and
        written back. The size is a multiple of the minimum; otherwise clients could not reach the end (qemu
        refuses such an export).
        """
        minimum = min(logical, size & -size) if size else logical
        preferred = min(max(optimal, minimum), _MAXIMUM)
        return cls(minimum, preferred) if minimum > SECTOR else cls(preferred=preferred)


class Offer(msgspec.Struct, frozen=True):
    """One export: its canonical name (may be ""), its size in bytes, its properties.

    multi_conn: a flush on one connection covers writes completed on the others. contexts: metadata contexts
    besides base:allocation, all of them `negotiable`. Raises UsageError for a name or description that is
    no NBD string, or an impossible size.
    """

    name: str
    size: int
    description: str = ""
    read_only: bool = False
    multi_conn: bool = True
    block_sizes: BlockSizes = msgspec.field(default_factory=BlockSizes)
    contexts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_string("export name", self.name)
        check_string("description", self.description)
        if not 0 <= self.size < DEVICE_LIMIT:
            raise UsageError(f"export '{self.name}' has an impossible size of {self.size} bytes")

    def flags(self, *, structured: bool) -> TransmissionFlag:
        """The transmission flags. structured: structured replies or extended headers are in use."""
        flag = TransmissionFlag
        flags = flag.HAS_FLAGS | flag.SEND_FLUSH | flag.SEND_FUA | flag.SEND_CACHE
        if self.read_only:
            flags |= flag.READ_ONLY
        else:
            flags |= flag.SEND_TRIM | flag.SEND_WRITE_ZEROES | flag.SEND_FAST_ZERO
        if structured:
            flags |= flag.SEND_DF
        if self.multi_conn:
            flags |= flag.CAN_MULTI_CONN
        return flags


class Catalogue:
    """Exports by name, in order. The name "" finds the export of that name, else the first."""

    def __init__(self, offers: Mapping[str, Callable[[], Offer]]) -> None:
        self._offers = dict(offers)

    @classmethod
    def of(cls, *offers: Offer) -> Self:
        """A catalogue of offers that do not change."""
        return cls({offer.name: partial(_same, offer) for offer in offers})

    def __iter__(self) -> Iterator[Offer]:
        return (offer() for offer in self._offers.values())

    def __len__(self) -> int:
        return len(self._offers)

    def find(self, name: str) -> Offer | None:
        """The offer of the export `name`; None if there is none."""
        if name == "" and "" not in self._offers:
            return next(iter(self), None)
        found = self._offers.get(name)
        return found() if found is not None else None


def check_string(what: str, text: str) -> None:
    """Raises UsageError if `text` is not a string of the protocol: UTF-8, no NUL, up to 4096 bytes."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} '{text}' is not valid Unicode") from error
    if "\0" in text:
        raise UsageError(f"{what} '{text}' contains a NUL character")
    if size > STRING_LIMIT:
        raise UsageError(f"{what} takes {size} bytes", cure=f"use at most {STRING_LIMIT}")


def negotiable(names: Iterable[str]) -> tuple[str, ...]:
    """Selects the metadata contexts that can be offered: `namespace:leaf` outside of `base:`, strings of the protocol,
    each once, at most CONTEXT_OFFERS.
    """
    found: dict[str, None] = {}
    for name in names:
        namespace, colon, leaf = name.partition(":")
        if colon and leaf and namespace not in ("", "base") and _is_string(name):
            found[name] = None
    return tuple(islice(found, CONTEXT_OFFERS))


def _is_string(text: str) -> bool:
    try:
        check_string("metadata context", text)
    except UsageError:
        return False
    return True


def _same(offer: Offer) -> Offer:
    return offer


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
