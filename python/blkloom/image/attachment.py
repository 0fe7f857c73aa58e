"""Map filler of an image: fills the engine's cluster table when faults ask for it.

The table is filled `_STRETCH` units at a time, for all layers at once. The engine serves units in the table without
Python. Some units must first be made in memory (compressed clusters, and the cluster that contains the end of a file).
Such a unit stays a fault until it is read. Then it is made, several of them on several threads, and its entry refers to
that memory. Pages of the table may be dropped at any time, because faults fill them again. One thread (the mapper's).
May fail: CorruptImage, OSError.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from blkloom._engine import ClusterTable
from blkloom.errors import ResourceError
from blkloom.image import cluster_entries
from blkloom.image.allocation_status import allocation
from blkloom.image.chain import Chain
from blkloom.image.decompressed_cache import DecompressedCache, Key
from blkloom.image.layer import Job
from blkloom.image.types import Words
from blkloom.units import format_size

_STRETCH: Final = 8192
"""Units; as many as the entries of an L2 table of 64 KiB."""
_FEW: Final = 64
"""Up to this many units are faster to look up one by one than together over all layers."""
_PAGES_A_TABLE: Final = 1 << 20
_LARGEST_PAGE: Final = 1 << 20
"""The engine's limit."""
_MOST_PAGES: Final = 1 << 24
"""The engine keeps eight bytes for each."""
_TABLE_LIMIT: Final = 256 << 20
"""Maximum bytes of entries in memory: enough for 16 TiB of disk in clusters of 512 KiB, 2 TiB in 64 KiB."""

_KIND_SHIFT: Final = int(cluster_entries.KIND_SHIFT)
_DATA: Final = int(cluster_entries.DATA) >> _KIND_SHIFT
_ONLY_READ: Final = int(cluster_entries.READ_ONLY) >> _KIND_SHIFT

_AHEAD: Final = 4
"""Clusters per thread that are made in advance for a sequential reader."""


Asks: TypeAlias = Literal["what is not known", "writes", "everything"]
"""Requests that the engine passes to Python: those without an entry in its table; also all writes; or all requests."""


@dataclass(slots=True)
class _Look:
    """Result of a lookup: the entries of the units from `first` on. around: the entries from `low` on, in whole
    clusters of every layer. keys: clusters that must be made in memory. corrupt: the first unit of `found` with
    inconsistent metadata, None for none.
    """

    first: int
    found: Words
    low: int
    around: Words
    keys: list[Key]
    corrupt: int | None


class Attachment:
    """The map filler of one image. chain: the attached chain, which this object does not close. size: bytes of the
    table. cache: bytes for clusters made in memory. synchronize: waits until no request is in flight that looked up the
    table before.
    """

    def __init__(self, chain: Chain, size: int, *, cache: int, synchronize: Callable[[], None]) -> None:
        self.chain: Final = chain
        self.size: Final = size
        self.faults = 0
        """Number of requests that Python handled."""
        self._bits = chain.unit_bits
        self._top_shift = chain.top.unit_bits - self._bits
        self._shifts = np.array([chain.making_bits(number) - self._bits for number in range(len(chain.layers))])
        self._units = -(-size >> self._bits)
        self._page = max(_STRETCH, min(1 << max(self._units // _PAGES_A_TABLE - 1, 0).bit_length(), _LARGEST_PAGE))
        if self._units > _MOST_PAGES * self._page:
            raise ResourceError(
                f"a disk of {format_size(size)} in pieces of {format_size(1 << self._bits)}, the smallest in its "
                "chain, is more than can be mapped",
                errno=errno.EFBIG,
                cure="convert the images below to larger clusters (qemu-img convert)",
            )
        self._synchronize = synchronize
        self.cache: Final = DecompressedCache(cache, chain.largest_cluster, self._evicted)
        files = [*chain.files, self.cache.file]
        self.table: Final = ClusterTable(size, 1 << self._bits, files, page=self._page)
        self._memory_file = cluster_entries.READ_ONLY | cluster_entries.file_field(len(chain.files))
        self._filled: OrderedDict[int, set[int]] = OrderedDict()
        self._workers = min(os.cpu_count() or 1, 8)
        self._pool: ThreadPoolExecutor | None = None
        self._next_cluster: Key | None = None
        self._ready: dict[tuple[int, int], bytes | None] = {}
        self._asks: Asks = "what is not known"

    def ask(self, what: Asks) -> None:
        """Sets which requests the engine must pass to Python. When it returns, no request is in flight that began
        before.
        """
        if what != self._asks:
            self._asks = what
            self.forget()
            self._synchronize()

    @property
    def asks_everything(self) -> bool:
        """Whether all requests are passed to Python, so that writes must be done here."""
        return self._asks == "everything"

    def read(self, offset: int, length: int) -> bytes | None:
        """Answers a read fault: returns its bytes, or None once the table has changed and the engine can look up
        again.
        """
        self.faults += 1
        if (offset, length) in self._ready:
            return self._ready.pop((offset, length))
        look = self._look(offset, length)
        if look is None:
            return None
        if look.corrupt is not None:
            raise self.chain.contradiction(int(look.found[look.corrupt]), look.first + look.corrupt)
        if not look.keys:
            self._tell(look.first, look.found)
            return None
        made = self._make(look.keys)
        data = self._bytes(look, made, offset, length)
        self._install(look)
        if len(made) > len(look.keys):
            self._publish_keys(key for key in made if key not in look.keys)
        return data

    def prefetch(self, reads: Iterable[tuple[int, int]]) -> None:
        """Prefetches for the given reads (offset, length): makes the clusters that they need, all at once."""
        self._ready.clear()
        looks: dict[tuple[int, int], _Look] = {}
        for read in reads:
            if (look := self._look(*read)) is None:
                self._ready[read] = None
            elif look.corrupt is None:
                looks[read] = look
        keys = list(dict.fromkeys(key for look in looks.values() for key in look.keys))[: self.cache.slots]
        made = self._make(keys, raises=False) if len(keys) > 1 else {}
        for (offset, length), look in looks.items():
            if all(key in made or self.cache.place(key) is not None for key in look.keys):
                self._ready[offset, length] = self._bytes(look, made, offset, length)
                self._install(look)

    def leads_to_data(self, offset: int, length: int) -> bool:
        """Whether the engine may write to all of the range by itself, because an earlier fault in the queue has
        prepared it.
        """
        first, end = self._range(offset, length)
        data = end - first <= _FEW and all(kind == _DATA for kind in self._kinds(first, end))
        self.faults += data
        return data

    def prepare(self, offset: int, length: int) -> None:
        """Fills the table around a write fault, so that writes nearby cause no faults."""
        self.faults += 1
        self._fill_missing(*self._range(offset, length))

    def prepare_together(self, writes: Sequence[tuple[int, int]]) -> None:
        """`prepare` for several writes (offset, length); does not count faults."""
        shift = self._bits + _STRETCH.bit_length() - 1
        for first in {end >> shift for offset, length in writes for end in (offset, offset + length - 1)}:
            self._fill_missing(first * _STRETCH, (first + 1) * _STRETCH)

    def publish(self, first: int, end: int) -> None:
        """Stores the entries of the units [first, end) in the engine's table."""
        if first < end:
            self._tell(first, self._for_engine(self.chain.entries(first, end - first), first))

    def install(self, first: int, entries: Words) -> None:
        """Stores entries of the engine's table for units of the *top image* from `first` on. Stretches that are not
        filled stay so: no request needs them, and no memory is counted for them.
        """
        shift = self._top_shift
        if (
            not shift
            and first // _STRETCH == (first + entries.size - 1) // _STRETCH
            and first + entries.size <= self._units
        ):
            if first // _STRETCH in self._filled.get(first // self._page, ()):  # nearly always
                self._tell(first, entries)
            return
        low, end = first << shift, min(first + entries.size << shift, self._units)  # the table may end before the image
        for stretch in range(low // _STRETCH, -(-end // _STRETCH) if low < end else 0):
            if stretch in self._filled.get(stretch * _STRETCH // self._page, ()):
                start, stop = max(low, stretch * _STRETCH), min(end, (stretch + 1) * _STRETCH)
                part = entries[start - low >> shift : -(-(stop - low) >> shift)]
                self._tell(start, cluster_entries.spread(part, shift, self._bits)[: stop - start])

    def only_read(self, cluster: int) -> bool:
        """See `Relocation.only_read`."""
        bits = self.chain.top.cluster_bits
        inside = cluster + 1 << bits <= self.size
        unit = cluster << bits - self._bits
        return inside and next(self._kinds(unit, unit + 1)) == _ONLY_READ

    def relocate(self, cluster: int, host: int, patch: bytes, patch_at: int) -> bool:
        """See `Relocation.relocate`."""
        shift = self.chain.top.cluster_bits - self._bits
        file = self.chain.files[0]
        return self.table.copy(cluster << shift, 1 << shift, file, host, patch=patch, patch_at=patch_at)

    def forget(self) -> None:
        """Clears the engine's table, so that every request faults again."""
        for page in self._filled:
            self.table.drop(page)
        self._filled.clear()

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """See `allocation_status.allocation`."""
        self.faults += 1
        return allocation(self.chain, offset, length)

    def close(self) -> None:
        """Ends the threads and frees the memory."""
        if self._pool:
            self._pool.shutdown()
            self._pool = None
        self.cache.close()

    # below: the table

    def _range(self, offset: int, length: int) -> tuple[int, int]:
        return offset >> self._bits, min(-(-(offset + length) >> self._bits), self._units)

    def _look(self, offset: int, length: int) -> _Look | None:
        """Looks up the range, and fills the table there. None if the table has all that the engine needs."""
        first, end = self._range(offset, length)
        self._fill_missing(first, end)
        if end - first <= _FEW and all(self._kinds(first, end)):
            return None
        low, high = self._whole_clusters(first, end)
        around = self.chain.entries(low, high - low)
        found = around[first - low : end - low]
        corrupt = np.flatnonzero(cluster_entries.kinds(found) == cluster_entries.CORRUPT_KIND)
        return _Look(first, found, low, around, self._keys(found, first), int(corrupt[0]) if corrupt.size else None)

    def _kinds(self, first: int, end: int) -> Iterator[int]:
        """Kinds of the units [first, end) in the engine's table, 0 for faults."""
        return (self.table.entry(unit) >> _KIND_SHIFT for unit in range(first, end))

    def _install(self, look: _Look) -> None:
        """Stores entries in the engine's table, including units in memory."""
        self._tell(look.low, self._for_engine(look.around, look.low))

    def _tell(self, first: int, entries: Words) -> None:
        """Stores entries in the engine's table, as far as the engine may serve requests by them."""
        if self._asks == "everything":
            return
        if self._asks == "writes":
            entries = np.where(
                cluster_entries.kinds(entries) == _DATA, entries ^ cluster_entries.READ_ONLY_BIT, entries
            )
        self.table.install(first, entries.data)

    def _whole_clusters(self, first: int, end: int) -> tuple[int, int]:
        """Extends a range of units to whole clusters of every layer."""
        mask = (self.chain.largest_cluster >> self._bits) - 1
        return first & ~mask, min((end + mask) & ~mask, self._units)

    def _fill_missing(self, first: int, end: int) -> None:
        """Fills the stretches of the units [first, end) that are not filled yet."""
        for stretch in range(first // _STRETCH, -(-end // _STRETCH)):
            page, low = stretch * _STRETCH // self._page, stretch * _STRETCH
            if stretch not in self._filled.get(page, ()):
                self.publish(low, min(low + _STRETCH, self._units))
                self._filled.setdefault(page, set()).add(stretch)
                self._drop_pages(page)

    def _drop_pages(self, newest: int) -> None:
        self._filled.move_to_end(newest)
        while len(self._filled) * self._page * 8 > max(_TABLE_LIMIT, 2 * self._page * 8):
            page, _ = self._filled.popitem(last=False)
            self.table.drop(page)

    def _for_engine(self, found: Words, first: int) -> Words:
        """Entries for the engine: units in memory refer to their slot, or are faults if they are not made yet; corrupt
        units are faults.
        """
        kinds = cluster_entries.kinds(found)
        found[kinds == cluster_entries.CORRUPT_KIND] = cluster_entries.SHOWS_THROUGH
        waiting = np.flatnonzero(kinds == cluster_entries.IN_MEMORY_KIND)
        if not waiting.size:
            return found
        numbers, clusters = self._layers_and_clusters(found[waiting], waiting + first)
        found[waiting] = cluster_entries.SHOWS_THROUGH
        if not self.cache.used:
            return found
        for key in dict.fromkeys(zip(numbers.tolist(), clusters.tolist(), strict=True)):
            if (place := self.cache.place(key)) is not None:
                mine = waiting[(numbers == key[0]) & (clusters == key[1])]
                offsets = (mine + first - self._units_of(key)[0] << self._bits) + place
                found[mine] = self._memory_file | offsets.astype(np.uint64) >> cluster_entries.SECTOR_SHIFT
        return found

    # below: what is made in memory

    def _keys(self, found: Words, first: int) -> list[Key]:
        """The clusters of the units that must be in memory, in order."""
        waiting = np.flatnonzero(found >> cluster_entries.KIND_SHIFT == cluster_entries.IN_MEMORY_KIND)
        if not waiting.size:
            return []
        numbers, clusters = self._layers_and_clusters(found[waiting], waiting + first)
        return list(dict.fromkeys(zip(numbers.tolist(), clusters.tolist(), strict=True)))

    def _make(self, keys: list[Key], *, raises: bool = True) -> dict[Key, bytes]:
        """Makes the missing clusters, and some more for a sequential reader, and puts them into the cache. Returns the
        made clusters. Unless it `raises`, a cluster that cannot be made is left to the request that needs it.
        """
        wanted = [key for key in keys if self.cache.place(key) is None]
        if not wanted:
            return {}
        ahead = self._ahead(keys)
        outcomes: dict[Key, bytes | OSError] = {}
        jobs: dict[Key, Job] = {}
        for key in [*wanted, *ahead]:
            try:
                jobs[key] = self.chain.making(*key)
            except OSError as error:
                outcomes[key] = error
        outcomes |= zip(jobs, self._do_all(list(jobs.values())), strict=True)
        made = {key: outcome for key, outcome in outcomes.items() if isinstance(outcome, bytes)}
        self.cache.put(made)
        failures = [outcomes[key] for key in wanted if key not in made]
        if raises and failures and isinstance(failures[0], OSError):
            self._publish_keys(made)
            raise failures[0]
        return made

    def _do_all(self, jobs: list[Job]) -> Iterable[bytes | OSError]:
        """Runs the jobs, on several threads if they are worth it."""
        if len(jobs) < 2 or self._workers < 2:
            return [_outcome(job) for job in jobs]
        self._pool = self._pool or ThreadPoolExecutor(self._workers, thread_name_prefix="blkloom-unpack")
        return self._pool.map(_outcome, jobs)

    def _ahead(self, keys: list[Key]) -> list[Key]:
        """More compressed clusters to make for a sequential reader (readahead)."""
        reads_on = self._next_cluster == keys[0] and self._workers > 1
        number, last = keys[-1]
        self._next_cluster = (number, last + 1)
        bits = self.chain.making_bits(number)
        if not reads_on or bits != self.chain.layers[number].cluster_bits:
            return []
        room = min(self._workers * _AHEAD, self.cache.slots // 4)
        end = min(last + 1 + max(room - len(keys), 0), self.size >> bits)
        found: list[Key] = []
        for cluster in range(last + 1, end):
            if self.chain.layers[number].compressed(cluster) is None:
                break
            found.append((number, cluster))
        self._next_cluster = (number, last + 1 + len(found))
        return [key for key in found if self.cache.place(key) is None]

    def _bytes(self, look: _Look, made: dict[Key, bytes], offset: int, length: int) -> bytes | None:
        """The bytes of the range, if all of it is in memory."""
        found, first = look.found, look.first
        if not look.keys or not (found >> cluster_entries.KIND_SHIFT == cluster_entries.IN_MEMORY_KIND).all():
            return None
        numbers, clusters = self._layers_and_clusters(found, np.arange(first, first + found.size))
        cuts = (np.flatnonzero((numbers[1:] != numbers[:-1]) | (clusters[1:] != clusters[:-1])) + 1).tolist()
        parts: list[bytes] = []
        for start, stop in zip([0, *cuts], [*cuts, found.size], strict=True):
            key = (int(numbers[start]), int(clusters[start]))
            low, high = max(first + start << self._bits, offset), min(first + stop << self._bits, offset + length)
            within = low - (key[1] << self.chain.making_bits(key[0]))
            part = made[key][within : within + high - low] if key in made else self.cache.read(key, within, high - low)
            if part is None:  # made room for another one of these
                part = self.chain.making(*key)()[within : within + high - low]
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _layers_and_clusters(self, found: Words, units: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The layers of units in memory, and their clusters in these layers."""
        numbers = (found >> cluster_entries.FILE_SHIFT & cluster_entries.FILE_MASK).astype(np.intp)
        return numbers, units >> self._shifts[numbers]

    def _units_of(self, key: Key) -> tuple[int, int]:
        shift = int(self._shifts[key[0]])
        return key[1] << shift, min(key[1] + 1 << shift, self._units)

    def _publish_keys(self, keys: Iterable[Key]) -> None:
        """Stores the entries of these clusters in the engine's table, neighbouring ones together."""
        low = high = 0
        for first, end in sorted(map(self._units_of, keys)):
            if first > high:
                self.publish(low, high)
                low = first
            high = max(high, end)
        self.publish(low, high)

    def _evicted(self, keys: list[Key]) -> None:
        """Turns the entries of evicted clusters into faults. When it returns, no request reads their slots."""
        for first, end in map(self._units_of, keys):
            if first // self._page in self._filled:
                self.table.fill(first, end - first, int(cluster_entries.SHOWS_THROUGH))
        self._synchronize()


def _outcome(job: Job) -> bytes | OSError:
    try:
        return job()
    except OSError as error:
        return error
