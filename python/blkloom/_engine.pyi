"""The engine (Rust): executes requests to devices. It does not know image formats, tables or handshakes.

This file is the complete interface between Python and Rust. Python passes file descriptors and maps to the engine.
The engine's threads execute requests and never call Python. Python receives faults (`Device.next_faults`), notices
(`Notices`) and log records (`log_records`).

Offsets and lengths are bytes. Every method may be called from any thread. Every method that moves bytes or waits
releases the GIL. Failed I/O raises `OSError` with its errno.
"""

import os
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, final

from typing_extensions import Buffer, disjoint_base

__all__ = [
    "BackendOperation",
    "BackendQueue",
    "BadBlockFilter",
    "ClusterTable",
    "DelayFilter",
    "Detached",
    "DetachedFuse",
    "DetachedVhostUser",
    "Device",
    "DeviceCopy",
    "Engine",
    "ErrorFilter",
    "Export",
    "Extent",
    "Fault",
    "File",
    "FlakeyFilter",
    "FuseFile",
    "GuestMemory",
    "Map",
    "NbdClient",
    "Notices",
    "Region",
    "SharedMemory",
    "SwitchFilter",
    "Tee",
    "ThrottleFilter",
    "TlsClient",
    "TlsServer",
    "TlsSession",
    "Transport",
    "UblkNode",
    "VhostUserCall",
    "VhostUserDisk",
    "VhostUserLog",
    "end_log",
    "fuse_can_resend",
    "fuse_init",
    "fuse_invalidate",
    "fuse_is_over_uring",
    "fuse_resend",
    "has_log_records",
    "log_records",
    "mount",
    "raise_event",
    "serve_fuse",
    "serve_nbd",
    "serve_ublk",
    "serve_vhost_user",
    "ublk_control",
    "unmount",
    "vhost_user_inflight_length",
]

_Operation: TypeAlias = Literal["read", "write", "flush", "discard", "write_zeroes", "extents"]
_LogRecord: TypeAlias = tuple[int, str, str, str, int, str, float]
"""(level as in `logging`, module of the engine, text in one line, source file, line, thread, time in seconds)"""

@final
class File:
    """An open regular file or block device. Owns a duplicate of `fd`.

    direct: `fd` was opened with O_DIRECT. Requests of any alignment are accepted; unaligned ones use a slow
    read-modify-write under a range lock.
    label: the name in errors and logs (a path).
    """

    def __new__(cls, fd: int, *, writable: bool, direct: bool = False, label: str = "") -> File: ...
    @property
    def size(self) -> int:
        """Current size in bytes: the file's length or the block device's capacity."""
    @property
    def writable(self) -> bool: ...
    @property
    def direct(self) -> bool: ...
    @property
    def is_block_device(self) -> bool: ...
    @property
    def inline(self) -> Literal["always", "nowait", "never"]:
        """Whether I/O is first tried on the current thread: always (tmpfs, which never blocks), with RWF_NOWAIT, or
        never (all requests go to io_uring).
        """
    @property
    def offset_alignment(self) -> int:
        """Alignment in bytes of the offset and length of direct I/O. 1 if not direct."""
    @property
    def memory_alignment(self) -> int: ...
    @property
    def label(self) -> str: ...
    def fileno(self) -> int:
        """The descriptor. The `File` keeps it and closes it."""
    @property
    def in_flight(self) -> int:
        """Number of operations in flight: in io_uring, in a thread, or in a caller that waits. Operations served from
        the page cache are not counted.
        """
    def sync(self) -> None:
        """Sync the data, as fdatasync(2). After a sync has failed, here or for a request, all later syncs fail: the
        kernel reports an error only once, and bytes written before may be lost.
        """
    @property
    def sync_error(self) -> int:
        """The errno of the first failed sync. All later syncs fail with it. 0: no sync has failed."""
    def fail_syncs(self, errno: int) -> None:
        """Make all later syncs fail, because a sync failed elsewhere or bytes were lost. The first errno is kept."""
    @property
    def has_unreported_failure(self) -> bool:
        """Whether a sync has failed and `set_failure_reported` was not called since."""
    def set_failure_reported(self) -> None:
        """Declare that the failure is stored outside of this process. Flushes need not wait for that any more."""

@final
class Region:
    """Shared memory of a sealed memfd. Owns a duplicate of `fd`.

    The memfd must be sealed against shrinking (F_SEAL_SHRINK), so that no access can raise SIGBUS; EINVAL otherwise.
    Pages that were never written read as zeros and use no memory. Pages that the memfd has already (handed over by
    another process) keep their contents and count as `resident`.
    """

    def __new__(cls, fd: int, size: int, *, page_size: int = 4096) -> Region: ...
    @property
    def size(self) -> int: ...
    @property
    def resident(self) -> int:
        """Bytes of memory in use (whole pages)."""

@final
class Extent:
    """Where the bytes of a range are. Byte i of the range is at `offset` + i."""

    @staticmethod
    def data(file: File, offset: int, *, read_only: bool = False) -> Extent:
        """In a file. Writes to a read_only extent fault (copy on write)."""
    @staticmethod
    def memory(region: Region, offset: int) -> Extent: ...
    @staticmethod
    def zero(*, discard_writes: bool = False) -> Extent:
        """Reads as zeros. Writes fault, or are discarded if discard_writes (the zero target)."""
    @staticmethod
    def error(errno: int) -> Extent: ...
    @staticmethod
    def fault() -> Extent:
        """Ask the target, for reads and writes alike."""
    @staticmethod
    def device(device: Device, offset: int, *, read_only: bool = False) -> Extent:
        """In a lower device (stacking). Writes to a read_only extent fault."""
    @staticmethod
    def backend(queue: BackendQueue | NbdClient, offset: int, *, read_only: bool = False) -> Extent:
        """In a backend (neither a file nor memory). Writes to a read_only extent fault (copy on write)."""
    @staticmethod
    def stripes(chunk: int, legs: Sequence[Extent]) -> Extent:
        """Chunk i is chunk i // len(legs) of leg i % len(legs). `chunk` is in bytes, not
        necessarily a power of two; legs are data, memory, zero, error, device, backend or tee extents.
        """
    @staticmethod
    def unstriped(chunk: int, stripe: int, stripes: int, striped: Extent) -> Extent:
        """One leg of stripes, found in the striped range: chunk i is chunk i * `stripes` + `stripe` of `striped`.
        `chunk` is in bytes; `striped` is as a leg of `stripes`.
        """
    @staticmethod
    def filtered(
        filter: _Filter, reads: Extent, others: Extent | None = None, *, elsewhere: Extent | None = None
    ) -> Extent:
        """Requests that the filter lets pass: reads go to `reads`; writes, discards and write zeroes to `others`, by
        default also to `reads`. Block status is not filtered and comes from `reads`. A request that waits in the filter
        does not block a suspend: it waits at the gate instead, and the filter is asked again after the resume. What the
        filter sends elsewhere goes to `elsewhere`, by default an error EIO. The same extents are allowed as for
        `stripes`, and `Extent.fault()` for `elsewhere`. Several extents may share a filter.
        """
    @staticmethod
    def tee(tee: Tee, offset: int) -> Extent:
        """In all devices of a tee. Reads fault."""
    @staticmethod
    def table(table: ClusterTable) -> Extent:
        """In the locations of a cluster table. The range begins at the table's cluster 0."""
    @property
    def kind(self) -> str: ...
    @property
    def cluster(self) -> int:
        """Cluster size in bytes, for a table. 0 for other kinds."""

@final
class DelayFilter:
    """Delays requests: reads by `reads` seconds, others by `others`. Raises ValueError for seconds below 0."""

    def __new__(cls, reads: float, others: float) -> DelayFilter: ...
    @property
    def waiting(self) -> tuple[int, int]:
        """Number of parts of requests that wait now: reads, others."""

@final
class FlakeyFilter:
    """Is up for `up` seconds and down for `down` seconds in turn, beginning `elapsed` seconds ago. Whole seconds count,
    as in the kernel's dm-flakey. up, down: 0 to 2^32 - 1, not both 0 (ValueError).

    reads, others: what happens to requests while it is down. drop: writes succeed without an effect, reads pass. fail:
    EIO. elsewhere: they go to the extent `elsewhere`.
    """

    def __new__(
        cls, up: int, down: int, *, reads: _Treatment, others: _Treatment, elapsed: float = 0.0
    ) -> FlakeyFilter: ...
    @property
    def is_down(self) -> bool: ...

@final
class ErrorFilter:
    """Fails requests with `errno`.

    operations: read, write, discard, write_zeroes, flush; others pass. probability: of each part of a request, in
    billionths; 10^9 is always. seed: with the same seed, the same parts of a sequence of requests fail. Raises
    ValueError.
    """

    def __new__(
        cls, errno: int, operations: Sequence[str], *, probability: int = 1000000000, seed: int = 0
    ) -> ErrorFilter: ...

@final
class SwitchFilter:
    """Treats requests as for a `FlakeyFilter` that is down, and may be set at any time. With reads="try" they pass, and
    a read that then fails goes elsewhere. Raises ValueError.
    """

    def __new__(cls, reads: _Treatment = "pass", others: _Treatment = "pass") -> SwitchFilter: ...
    def set(self, reads: _Treatment, others: _Treatment) -> None: ...

@final
class BadBlockFilter:
    """Fails reads of bad blocks with EIO, while it is enabled. A write makes a block good. At first it is not
    enabled, and no block is bad. Methods may be called while requests are served.

    block: size in bytes. start: offset of the filtered range; blocks are counted from 0 on.
    """

    def __new__(cls, block: int, *, start: int = 0) -> BadBlockFilter: ...
    @property
    def enabled(self) -> bool: ...
    def enable(self, enabled: bool) -> None: ...
    def add(self, block: int, failing_writes: int = 0) -> bool:
        """Make a block bad. The first `failing_writes` (at most 255) writes to it fail. Returns False if it was bad."""
    def remove(self, block: int) -> bool:
        """Make a block good. Returns False if it was good."""
    def clear(self) -> int:
        """Make all blocks good. Returns the number of bad ones."""
    def list(self) -> list[tuple[int, int]]:
        """(block, writes that still fail) of all bad blocks, in order."""

@final
class ThrottleFilter:
    """Delays requests so that they keep limits. At first there are none."""

    def __new__(cls) -> ThrottleFilter: ...
    def set(self, limits: Sequence[tuple[_Per, _Of, int, float]]) -> None:
        """Replace the limits: (what is counted, of which requests, rate in operations or bytes a second, burst in
        seconds). The rate over any time is at most the limit plus one burst. A request that waits keeps its time.
        Raises ValueError.
        """
    @property
    def waiting(self) -> int:
        """Number of parts of requests that wait now."""

_Filter: TypeAlias = DelayFilter | FlakeyFilter | ErrorFilter | SwitchFilter | BadBlockFilter | ThrottleFilter
_Treatment: TypeAlias = Literal["pass", "fail", "drop", "elsewhere", "try"]
_Per: TypeAlias = Literal["operations", "bytes"]
_Of: TypeAlias = Literal["reads", "writes", "all"]

@final
class BackendQueue:
    """Queue of operations that Python executes for a backend (storage that is neither a file nor memory).

    Requests to extents of the backend become operations of at most `longest` bytes, which wait here in order. Any
    thread may take them, one thread at a time. Raises ValueError if `longest` or `most` is 0, OSError.
    """

    def __new__(cls, *, longest: int, most: int, most_bytes: int) -> BackendQueue: ...
    @property
    def limits(self) -> tuple[int, int, int]:
        """longest, most, most_bytes."""
    def fileno(self) -> int:
        """A descriptor of the queue that is readable while `take` has operations or cancellations."""
    def take(self) -> tuple[list[BackendOperation], list[tuple[int, int, int]]]:
        """Returns (operations to start, ids of cancelled operations).

        At most `most` operations with `most_bytes` bytes together are taken and not complete at a time; a single
        operation may have more bytes. Cancelled operations were taken before. They should end soon, and their results
        are ignored.
        """
    def close(self) -> None:
        """Fails all waiting and later operations with ESHUTDOWN."""

@final
class NbdClient:
    """A backend whose bytes are on an NBD server. Python connects and does the handshakes; the engine sends the
    requests, many at once on each connection. Requests wait while no connection is usable, without a limit of time.
    Operations of lost connections are sent again. Any thread may call any method.

    connections: number of slots. longest, longest_range: most bytes of a request with and without data. block: offsets
    and lengths of requests are multiples of this power of two. timeout: seconds after which a request without an answer
    cuts its connection. unflushed: others may have written before; otherwise a flush before the first write is not
    sent. Raises ValueError, OSError.
    """

    def __new__(
        cls,
        *,
        connections: int,
        longest: int,
        longest_range: int,
        block: int = 1,
        timeout: float | None = None,
        unflushed: bool = False,
    ) -> NbdClient: ...
    def fileno(self) -> int:
        """A descriptor that is readable after the state of a slot has changed, until `report` takes it."""
    def connect(
        self,
        engine: Engine,
        slot: int,
        fd: int,
        *,
        structured: bool,
        extended: bool,
        flags: int,
        allocation: int | None = None,
        tls: TlsSession | None = None,
    ) -> None:
        """Use a socket after its handshake for an absent slot; the engine duplicates it. flags: transmission flags.
        allocation: id of the metadata context base:allocation. tls: the session on fd, which belongs to the engine
        then. Raises OSError if the slot is not absent, or the client or the engine is closed.
        """
    def report(self, *, take: bool = False) -> dict[str, Any]:
        """The state. links: of each slot: absent, up, or ending (cut; the server has not closed it yet). usable:
        requests are being sent. failing: they fail at once. in_flight, waiting: numbers of requests. reconnects. lost:
        with `take`, connections lost since the last call with it: (slot, reason); `fileno` is not readable any more.
        """
    def give_up(self, errno: int) -> bool:
        """Fail the requests that wait, and later ones at once, until the next `connect`. Does nothing, and returns
        False, while requests are being sent.
        """
    def close(self) -> None:
        """End all connections. Requests fail with ESHUTDOWN."""

@final
class Tee:
    """Several devices (legs) that get the same writes, discards and write zeroes: those to open regions. Others go to
    the backend, like whatever has failed on one of the legs. A flush goes to all legs if all regions are open, else to
    the backend. At first all regions are shut. Any thread may call any method.

    Two writes of the same bytes have the same order on all legs. A write that has ended and did not reach all legs
    shuts its regions; its range is torn.

    size: bytes, at most those of each leg. region: bytes. Raises ValueError.
    """

    def __new__(cls, legs: Sequence[Device], backend: BackendQueue, size: int, region: int) -> Tee: ...
    def open(self, first: int, count: int) -> None:
        """Open `count` regions, except those with torn ranges."""
    def shut(self, first: int, count: int) -> bool:
        """Shut regions: no write to them begins on the legs any more. Returns whether one is in flight there."""
    def wait(self, first: int, count: int) -> bool:
        """Wait until no write to these regions is in flight on the legs. False: `end` was called."""
    def end(self) -> None:
        """Make `wait` return, now and later."""
    def torn(self) -> list[tuple[int, int]]:
        """Torn ranges: (offset, length)."""
    def mend(self, offset: int, length: int) -> None:
        """Declare that a range is not torn any more."""

@final
class BackendOperation:
    """An operation of a backend. Answer it once by `done` or `fail`, on any thread; only the first answer counts. An
    operation that is dropped without an answer fails with EIO.
    """

    @property
    def id(self) -> tuple[int, int, int]:
        """Unique among the operations that are not complete."""
    @property
    def operation(self) -> str:
        """read, write, discard, write_zeroes or flush."""
    @property
    def offset(self) -> int:
        """Bytes from the start of the backend."""
    @property
    def length(self) -> int: ...
    @property
    def fua(self) -> bool:
        """Whether the write must be durable when it is done (force unit access)."""
    @property
    def may_unmap(self) -> bool: ...
    @property
    def suspending(self) -> bool:
        """Whether a flush is that of a suspend, not of a client."""
    def payload(self) -> bytes:
        """A write's data (a copy), length bytes."""
    def done(self, data: Buffer | None = None) -> None:
        """Complete the operation. data: `length` bytes, for a read."""
    def fail(self, errno: int) -> None: ...

@final
class ClusterTable:
    """A two-level table of the locations of clusters. It is filled when requests fault, and read without locks.

    cluster: cluster size in bytes, a power of two from 512. page: entries per page, a power of two. Clusters of a page
    that is not installed, or was dropped, have the entry `missing`: that of cluster 0; it advances by one cluster each
    if it is data. Discards and zero writes to a table always fault, except those to devices.

    An entry is a u64: kind << 61 | file << 49 | (offset >> 9). Kinds: 0 fault, 1 data, 2 read-only data (writes fault),
    3 zero (writes fault), 4 error EIO. `file` is an index of `files`, and then of `devices`.
    """

    def __new__(
        cls,
        size: int,
        cluster: int,
        files: Sequence[File],
        *,
        devices: Sequence[Device] = (),
        missing: int = 0,
        page: int = 4096,
    ) -> ClusterTable: ...
    def install(self, first: int, entries: Buffer) -> None:
        """Store consecutive u64 entries (native endian) from cluster `first` on, in one or several pages. Other entries
        of these pages are unchanged, or `missing` if the page is new.
        """
    def fill(self, first: int, count: int, entry: int) -> None: ...
    def entry(self, cluster: int) -> int: ...
    def copy(
        self, first: int, count: int, file: File, offset: int, *, patch: Buffer | None = None, patch_at: int = 0
    ) -> bool:
        """Copy the bytes of `count` clusters from `first` on to `offset` of `file`. `patch` replaces the bytes of the
        copy from `patch_at` on. The last cluster of the table may be shorter. Returns False, and writes nothing, if an
        entry faults or is in a device. Raises OSError of the files.
        """
    def drop(self, page: int) -> None:
        """Drop a page. Its clusters have the entry `missing` then."""
    @property
    def pages(self) -> int:
        """Number of pages in memory."""

@final
class Map:
    """An immutable list of contiguous segments from offset 0. Without segments: a device of size 0.

    segments: (start, length, owner, extent) in bytes. owner: the target's number, which its faults and flushes have.
    Several consecutive segments may have the same owner.
    flush_owners: owners that receive a flush as a fault, after the data files were synced. fua_flushes: also after a
    durable write (FUA); otherwise only the files that it reaches are synced.
    """

    def __new__(
        cls,
        segments: Sequence[tuple[int, int, int, Extent]],
        *,
        flush_owners: Sequence[int] = (),
        fua_flushes: bool = True,
    ) -> Map: ...
    @property
    def size(self) -> int: ...
    def __len__(self) -> int: ...

@final
class Engine:
    """Event loop threads, started when first needed, and a thread pool.

    Each loop has an io_uring. Where io_uring is forbidden, the thread pool does all file I/O, and the log says so once
    (`blkloom.device.engine_log`).

    loops: number of event loops, 0 for one per CPU. spin_us: longest time in microseconds that a loop polls before it
    sleeps (it adapts, down to 0). memory: budget in bytes for payloads, replies and copies of the clients of all
    exports. Requests that exceed the budget wait in order, together with their connections; other connections do not
    wait.
    """

    def __new__(
        cls,
        *,
        loops: int = 0,
        io: Literal["auto", "io_uring", "threads"] = "auto",
        spin_us: int = 50,
        threads: int = 16,
        memory: int = 268435456,
    ) -> Engine: ...
    @property
    def io(self) -> Literal["io_uring", "threads"]: ...
    @property
    def loops(self) -> int: ...
    def memory(self) -> dict[str, int]:
        """Memory for clients: `budget` and `reserved` in bytes, `waiting`: number of requests that wait for memory."""
    def close(self) -> None:
        """Closes all connections, finishes the requests in flight and joins the threads. Does nothing in a fork."""

@final
class Fault:
    """A request that the map could not resolve. It waits until an answer (`retry`, `done`, `extents`, `fail`, `defer`)
    or its timeout. A fault that is dropped without an answer fails with EIO.
    """

    @property
    def operation(self) -> _Operation: ...
    @property
    def owner(self) -> int: ...
    @property
    def offset(self) -> int:
        """Bytes from the start of the device (not of the segment)."""
    @property
    def length(self) -> int: ...
    @property
    def context(self) -> str:
        """extents: the name of the metadata context. "base:allocation": data, holes and zeros."""
    @property
    def one(self) -> bool:
        """extents: only the first run is needed."""
    @property
    def fua(self) -> bool: ...
    @property
    def may_unmap(self) -> bool:
        """write_zeroes: the range may become a hole."""
    @property
    def fast(self) -> bool:
        """write_zeroes: must fail with ENOTSUP if it is not faster than writing zeros."""
    @property
    def sync_failed(self) -> bool:
        """Whether this fault reports a failed sync: a file of the device, or of one below, has an unreported failure.
        The request fails after any answer. The operation is "flush", and the owner has no meaning.
        """
    @property
    def again(self) -> bool:
        """Whether the request was deferred before (by `defer`)."""
    @property
    def no_space(self) -> int:
        """The errno (ENOSPC, EDQUOT) of a write for which storage had no space, at the location in a cluster table.
        0: it did not fail.
        """
    @property
    def expired(self) -> bool:
        """Whether the fault has timed out: the request has failed, and its operation must not be started any more."""
    @property
    def from_client(self) -> bool:
        """Whether the request came from a client of an export, which may be handed over to another process. False: it
        came from this process.
        """
    @property
    def blocks_suspend(self) -> bool:
        """Whether a device that the request is inside of has closed its gate and may wait for the answer."""
    @property
    def time_left(self) -> float:
        """Seconds until the fault times out."""
    def payload(self) -> bytes:
        """A write's data (a copy), length bytes."""
    def retry(self) -> None:
        """Look the request up again, because the map has changed."""
    def done(self, data: Buffer | None = None) -> None:
        """Complete the request: the target has executed it. data: `length` bytes, for a read."""
    def extents(self, extents: Sequence[tuple[int, int]]) -> None:
        """Answer an `extents` fault: (length, flags) of runs from its offset on."""
    def fail(self, errno: int) -> None: ...
    def defer(self, errno: int, seconds: float | None = None) -> None:
        """Defer the request, without a timeout. It faults again after `Device.retry_deferred`, or after `seconds`. When
        its device is suspended, it waits at the gate and is looked up again after the resume. It fails with errno after
        `Device.fail_deferred`; a flush fails at once. Raises ValueError for seconds below 0.
        """
    def interrupt(self, errno: int) -> None:
        """Like `defer`, for a handler that was cancelled: the next fault of the request is not `again`."""

@disjoint_base
class Device:
    """A block device that executes requests by its map. A new device is live with `map`, or suspended without.

    In a fork of the process that created it, where the engine has no threads, `close` does nothing and all other
    methods raise blkloom.errors.ForkedError.

    Device extents stack devices: at most 32 levels (ELOOP), and no cycles (ValueError).
    """

    def __new__(
        cls,
        engine: Engine,
        map: Map | None = None,
        *,
        name: str = "",
        fault_timeout: float = 30.0,
        **kwargs: Any,
    ) -> Device: ...
    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def suspended(self) -> bool: ...

    # life
    def suspend(self, *, flush: bool = True, timeout: float | None = None) -> None:
        """Queue new requests at the gate, finish those in flight, then flush. The flush skips files whose failure is
        reported already. timeout: seconds for all of it, including the wait for another suspend, swap or resume. On
        TimeoutError the device is as it was; `File.in_flight` shows which file did not answer.
        """
    def swap(self, map: Map) -> None:
        """Replace the map. Returns when no request uses the old map any more. Raises ValueError, OSError (ELOOP,
        ESHUTDOWN).
        """
    def resume(self) -> None: ...
    def synchronize(self) -> None:
        """Wait until no request in flight uses a map lookup from before this call. Faults are not waited for, so a
        fault handler may call it.
        """
    def next_faults(self, timeout: float | None = None) -> list[Fault] | None:
        """Wait for faults and return all of them. []: after `timeout`, when there are new I/O errors or log records,
        and after `wake_mapper`. None: the device is closed.
        """
    @property
    def io_errors(self) -> int:
        """Number of requests that failed because of storage or a target. Not counted: invalid requests of a client, and
        failures of the `error` target.
        """
    @property
    def last_io_error(self) -> tuple[str, int, int, str] | None:
        """(operation, offset, errno, path of the file or "") of the last I/O error."""
    @property
    def has_new_io_errors(self) -> bool: ...
    def new_io_errors(self) -> tuple[list[tuple[str, int, int, str, int]], int]:
        """I/O errors since the last call. Returns (errors, number of other errors). errors: (operation, offset, errno,
        path, count), the last one of each operation, errno and path, at most 8.
        """
    @property
    def gate_changes(self) -> int:
        """Number of times that this device, or one above, was suspended, resumed or closed."""
    def fault_event(self) -> int:
        """A descriptor of the device that is readable while `next_faults` would not wait. Raises OSError."""
    def wake_mapper(self) -> None:
        """Make the current or next call of `next_faults` return, even without a fault."""
    @property
    def deferred(self) -> int:
        """Number of deferred requests (see `Fault.defer`)."""
    def retry_deferred(self) -> None:
        """Retry all deferred requests: they fault again."""
    def fail_deferred(self) -> None:
        """Fail all deferred requests, and those deferred from now on: the device is about to close."""
    def attach_mapper(self) -> None:
        """Queue faults for `next_faults` from now on. Before this call they fail with EIO."""
    def close(self) -> None:
        """Finish the requests in flight without a flush, end `next_faults`, and fail later requests with ESHUTDOWN.
        Waits at most `fault_timeout` seconds; requests that are still in flight then end later.
        """

    # I/O, synchronous: 0 <= offset, offset + length <= size, else EINVAL (write: ENOSPC)
    def pread(self, length: int, offset: int) -> bytes: ...
    def pread_into(self, buffer: Buffer, offset: int) -> int: ...
    def pwrite(self, data: Buffer, offset: int, *, fua: bool = False) -> int: ...
    def flush(self) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None: ...
    def extents(
        self, offset: int = 0, length: int | None = None, *, context: str = "base:allocation"
    ) -> list[tuple[int, int, int]]:
        """Block status of the range: (offset, length, flags). Flags of base:allocation, as in NBD: 1 hole, 2 reads as
        zeros. For other metadata contexts each target answers an `extents` fault for its part of the range; EINVAL if a
        target does not know the context.
        """
    def batch(self, requests: Sequence[tuple[Literal["r", "w"], Buffer, int]]) -> list[int]:
        """Execute many reads and writes of (direction, buffer, offset), in no order. Returns the number of bytes or
        -errno of each request.
        """

    # I/O, asynchronous
    def submit(
        self,
        notices: Notices,
        token: int,
        operation: _Operation,
        offset: int,
        length: int,
        buffer: Buffer | None = None,
        *,
        fua: bool = False,
        unmap: bool = True,
        fast: bool = False,
        context: str = "base:allocation",
        suspending: bool = False,
    ) -> bool:
        """Start a request. True: it is complete (it was small and did not have to wait). False: a notice (token,
        result, errno) reports its end, and `buffer` must not change until then. Raises OSError if it fails at once.

        suspending: a flush is that of a suspend (`BackendOperation.suspending`).
        """
    def stats(self) -> dict[str, Any]:
        """Counters and latency histograms, see `blkloom.stats.Stats`. Reading them does not slow down the loops."""

@final
class DeviceCopy:
    """A copy of a range of one device to another, or a comparison, in progress, on threads of its own. Nothing else
    changes the range of either device meanwhile. It stops when it is dropped.
    """

    def __new__(
        cls,
        source: Device,
        target: Device,
        *,
        start: int,
        end: int,
        request_size: int,
        requests: int,
        zeroes: Literal["skip", "unmap", "allocate"] = "unmap",
        detect_zeroes: int = 0,
        compare: bool = False,
    ) -> DeviceCopy:
        """Starts it. start, end: bytes. requests: how many are in flight at once, each of at most `request_size` bytes.
        zeroes: what happens to ranges that the block status of the source says to be zeros: nothing, write zeroes that
        may deallocate, or write zeroes that may not. detect_zeroes: blocks of this size in the data that are zeros are
        treated likewise; 0: none are looked for. compare: reads both and writes nothing. Raises OSError, ValueError.
        """
    def fileno(self) -> int:
        """A descriptor that is readable after `position` has reached the watched offset, and after the end."""
    def watch(self, offset: int) -> None:
        """Makes the descriptor unreadable until `position` reaches `offset`, or until the end."""
    @property
    def position(self) -> int:
        """Everything before this offset is done. Not durable: a flush of the target makes it so."""
    @property
    def counts(self) -> tuple[int, int]:
        """Bytes done: (data, zeros of the source's block status)."""
    @property
    def ended(self) -> bool:
        """Whether no I/O of it is in flight any more, and there will be none."""
    @property
    def failure(self) -> tuple[Literal["source", "target"], str, int, int, int] | None:
        """(device, operation, offset, length, errno) of the failed request with the lowest offset; the operation is
        "differs" and the errno 0 for the first byte that differs. Final when it has ended.
        """
    def stop(self) -> None:
        """Begins no more requests."""
    def close(self) -> None:
        """Stops, and waits until it has ended."""

@final
class Notices:
    """Queue of events for an asyncio loop. `fileno()` is readable while `take()` has notices."""

    def __new__(cls) -> Notices: ...
    def fileno(self) -> int: ...
    def take(self) -> list[tuple[int, Any, int]]:
        """Take all notices: (token, result, errno). The token is that of `Device.submit`, `serve_nbd` or `serve_fuse`.

        result: None or the extents, if I/O has ended. A str (the reason), if a transport has closed. A `Detached` or
        `DetachedFuse`, if a transport was detached. A `DetachedVhostUser`, if it was detached or has closed. An int
        (`FuseFile.users`), if the open count of a FUSE file has changed.
        """

@final
class Export:
    """An export of a device, with its own statistics. read_only: clients cannot write."""

    def __new__(cls, device: Device, *, name: str = "", read_only: bool = False) -> Export: ...
    @property
    def device(self) -> Device: ...
    @property
    def name(self) -> str: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def connections(self) -> int:
        """Number of transports of all kinds that serve the export now."""
    def transports(self) -> dict[str, int]:
        """Number of transports that serve the export now, by kind: `"nbd"`, `"fuse"` (one per descriptor)."""
    def older_requests(self) -> int:
        """Number of requests of NBD clients in flight that began before the last call that returned 0. Requests that
        are answered at once are not among them. One caller only.
        """
    def stats(self) -> dict[str, Any]: ...

def serve_nbd(
    engine: Engine,
    export: Export,
    fd: int,
    notices: Notices,
    token: int,
    *,
    structured: bool = False,
    extended: bool = False,
    contexts: Sequence[tuple[int, str]] = (),
    initial: bytes = b"",
    unsent: bytes = b"",
    skipping: tuple[int, bytes] | None = None,
    max_payload: int = 33554432,
    stall_timeout: float = 60.0,
    read_only: bool = False,
    tls: TlsSession | None = None,
) -> Transport:
    """Serve NBD's transmission phase on a connected stream socket. The engine owns a duplicate of fd.

    contexts: (id, name) of the metadata contexts selected in the handshake. A block status reply covers all of them, in
    this order (see `Device.extents`). initial: bytes received and not served (after the handshake, or
    `Detached.initial`), of any length. unsent, skipping: from a `Detached`. stall_timeout: seconds.
    read_only: this client may not write, whatever the export is. tls: the session on fd, which belongs to the
    engine from now on; such a connection ends where others are detached.
    """

@final
class TlsServer:
    """Settings and credentials of TLS sessions, read from files when it is made. TLS 1.2 and 1.3.

    certificates: a directory with `server-cert.pem`, `server-key.pem`; with verify_peer, for which clients need a
    certificate, too, also `ca-cert.pem`, and `ca-crl.pem` if there is one. psk: a file of pre-shared keys, lines of
    `user:hexkey`. One of both. Raises OSError for a file that cannot be read, and ValueError for one that cannot be
    used; both name the file.
    """

    def __new__(
        cls, *, certificates: str | None = None, psk: str | None = None, verify_peer: bool = False
    ) -> TlsServer: ...
    def accept(self, fd: int) -> TlsSession:
        """Begin a session on a connected, non-blocking socket, of which it owns a duplicate."""

@final
class TlsClient:
    """Settings and credentials of TLS sessions with a server, read from files when it is made. TLS 1.2 and 1.3.

    certificates: a directory with `ca-cert.pem`, `ca-crl.pem` if there is one, and `client-cert.pem` with
    `client-key.pem` if there are any; None: the authorities of the system. verify: the server's certificate must be
    valid for its host. psk, user: a file of pre-shared keys, and whose key is used. Raises as `TlsServer`.
    """

    def __new__(
        cls, *, certificates: str | None = None, psk: str | None = None, user: str = "", verify: bool = True
    ) -> TlsClient: ...
    def connect(self, fd: int, host: str) -> TlsSession:
        """Begin a session on a connected, non-blocking socket, of which it owns a duplicate. host: the name or address
        that the server's certificate must have.
        """

@final
class TlsSession:
    """A TLS session. Nothing waits. Raises OSError, EPROTO if the client has broken the protocol."""

    def handshake(self) -> Literal["done", "read", "write"]:
        """Continue the handshake. Returns what the socket must be ready for before the next call."""
    def receive(self, size: int) -> bytes | None:
        """Received bytes; b"": the client has closed its side; None: nothing has arrived."""
    def send(self, data: bytes) -> int:
        """Send data as far as possible, after what was not sent before. Returns the number of accepted bytes. 0: call
        it again when the socket is writable.
        """
    @property
    def has_unsent(self) -> bool:
        """Accepted bytes wait for the socket: call `send(b"")` when it is writable."""
    @property
    def peer(self) -> tuple[Literal["certificate", "psk"], str, str | None] | None:
        """Who the client is: ("certificate", distinguished name, common name or None), ("psk", user, None)."""
    @property
    def agreed(self) -> str:
        """Version and cipher."""
    def close(self) -> None:
        """Send the closing message if that is possible, and close the duplicate of the socket."""

@final
class Transport:
    """A connection or descriptor that the engine serves."""

    def close(self) -> None:
        """Finish the requests in flight, send the replies, and close. A notice follows."""
    def detach(self, *, drain: bool = False) -> None:
        """Detach the client, which another engine will serve. The client does not notice.

        The engine receives no more, answers the requests in flight, and withdraws requests that wait at the gate of a
        suspended device. A notice follows: a `Detached` (`DetachedFuse`), or a str if the client closed the connection
        first. It cannot be undone (`close` does nothing any more), but `serve_nbd` (`serve_fuse`) can serve it again.

        drain: wait until the client has received its replies. A client that does not is closed after the stall timeout,
        or detached by another `detach()`. Without drain the remaining replies are in `Detached.unsent`. Both wait for
        storage (`File.in_flight`).
        """

@final
class Detached:
    """A detached NBD connection: its socket, and the state that `serve_nbd` needs to continue it.

    If the descriptor is not taken, the socket is closed with this object.
    """

    @property
    def initial(self) -> bytes:
        """Bytes of requests (whole or partial) that were received and not served."""
    @property
    def unsent(self) -> bytes:
        """Bytes of replies that the client has not received yet. The limits of a connection bound their number."""
    @property
    def skipping(self) -> tuple[int, bytes] | None:
        """The payload of a refused request, which follows `initial`: (remaining bytes to skip, the reply then)."""
    def take_descriptor(self) -> int:
        """Take the socket; the caller must close it. EBADF: it was taken before."""

def fuse_init(fd: int, *, timeout: float = 10.0, uring: bool = False) -> bytes:
    """Wait for INIT, the first request of a FUSE connection that was just mounted, and answer it. Returns what was
    negotiated, 64 bytes (fuse_init_out): those who serve the connection need it (`FuseFile`), and the kernel sends no
    other INIT.

    uring: requests are to come over io_uring, where the kernel has that (`fuse_is_over_uring` tells): reads and writes
    of up to 256 KiB then, less on machines with more than 32 CPUs.
    timeout: seconds; then TimeoutError. EPROTO: the kernel is older than Linux 4.20, or this is no such connection.
    """

def fuse_can_resend(negotiated: bytes) -> bool:
    """Whether the kernel sends requests again that were read and not answered (Linux 6.9 and newer). Without that no
    other process can go on with the connection of one that was killed, nor with one over io_uring.
    """

def fuse_is_over_uring(negotiated: bytes) -> bool:
    """Whether requests come over io_uring (Linux 6.14 and newer, where the fuse module's `enable_uring` is Y). Then the
    kernel holds all requests back until the connection is served.
    """

def fuse_resend(fd: int) -> None:
    """Have the kernel send again what was read through any descriptor of the connection and not answered: to be called
    once, when no engine serves any of them, by the one that goes on with them. EINVAL: the kernel cannot.
    """

def fuse_invalidate(fd: int) -> None:
    """Have the kernel forget attributes and the pages of mappings: the device has other contents, or another size.
    Pages that were changed are written first, so the connection must be served meanwhile.
    """

@final
class FuseFile:
    """A device as the regular file that a FUSE mount shows: what all descriptors of its connection share. The size is
    the device's: it cannot be truncated.

    negotiated: of `fuse_init`. owner: (user, group, permission bits) at first; chown(2) and chmod(2) change it.
    record: a memfd, empty at first, of which it owns a duplicate. Changes of the owner are recorded there before they
    are answered, and what is recorded there counts in place of `owner`; so are `users`. ValueError: `negotiated` is not
    of `fuse_init`, or `record` has something else.
    """

    def __new__(
        cls, export: Export, negotiated: bytes, owner: tuple[int, int, int], *, record: int | None = None
    ) -> FuseFile: ...
    @property
    def export(self) -> Export: ...
    @property
    def owner(self) -> tuple[int, int, int]:
        """(user, group, permission bits), now."""
    @property
    def users(self) -> int:
        """How many times it is open. One that came or went while its server was killed may be missing: whether the
        file is in use, unmounting says.
        """

def serve_fuse(
    engine: Engine, file: FuseFile, fd: int, notices: Notices, token: int, *, unserved: bytes = b""
) -> Transport:
    """Serve one descriptor of a file's connection, from here on the engine's (it owns a duplicate of fd). To be called
    for each: the mount's, and its clones, which other loops serve. unserved: of the `DetachedFuse` of that descriptor.
    A connection over io_uring is served through one descriptor, once: what it has taken and not answered when it is
    detached or its process ends is lost, and fails when the last descriptor is closed. OSError: io_uring is not
    permitted, or not to be had.

    The file is dead once all descriptors are closed; as long as another process holds one, its users wait for a server.
    """

def ublk_control(
    control: int,
    command: str,
    *,
    device: int = 4294967295,
    data: int = 0,
    buffer: bytes = b"",
    timeout: float = 30.0,
) -> bytes:
    """Send a command to the ublk driver and wait for its end. control: a descriptor of /dev/ublk-control. device:
    number of the device; by default the driver chooses one for a new device. data: the command's argument. buffer:
    what the driver reads; it is returned with what the driver has written. timeout: seconds; the command goes on after
    a TimeoutError. OSError: the driver refuses. ValueError: no such command.

    Some commands wait for I/O of the device: the thread that calls must not be needed to serve it.
    """

@final
class UblkNode:
    """A device as the kernel's block device /dev/ublkbN: what all of its queues share."""

    def __new__(cls, export: Export) -> UblkNode: ...
    @property
    def export(self) -> Export: ...
    def leave_unanswered(self, leaves: bool) -> None:
        """Whether requests that wait when the queues or the device are closed are left to the next server of the block
        device. Otherwise they fail.
        """

def serve_ublk(
    engine: Engine,
    node: UblkNode,
    fd: int,
    notices: Notices,
    token: int,
    *,
    queue: int,
    depth: int,
    payload: int,
    privileged: bool,
) -> Transport:
    """Serve a queue of /dev/ublkcN. To be called for each queue; then the driver can start the block device. fd: a
    descriptor of /dev/ublkcN, which the engine keeps open in other ways until the queue has ended. queue: its number.
    depth: its number of requests. payload: most bytes of a read or write. privileged: False keeps the driver from
    reading the partition table when it starts the block device, and from BLKRRPART afterwards. The transport's end is
    "removed" when the block device was removed. OSError: io_uring is not permitted, or not to be had.
    """

@final
class GuestMemory:
    """The memory of a virtual machine, which another program shares. Forks do not have it."""

    def __new__(cls, regions: Sequence[tuple[int, int, int, int, int]], *, may_end_this: bool) -> GuestMemory:
        """regions: (descriptor, offset in its file, bytes, address in the machine, address in the other program).
        may_end_this: the other program may end this process anyway (as one of the same user); otherwise it must not be
        able to take the memory away, which would end this process. ValueError: it could (a file that can shrink or has
        huge pages), or a region is beyond the end of its file, or two have the same address in the machine.
        """

@final
class SharedMemory:
    """Memory that another program shares, as in `GuestMemory`."""

    def __new__(cls, fd: int, offset: int, size: int, *, may_end_this: bool) -> SharedMemory:
        """ValueError: see `GuestMemory`."""

@final
class VhostUserDisk:
    """A device as a virtio block device: what all of its queues share. serial: its first 20 bytes are used."""

    def __new__(cls, export: Export, serial: bytes) -> VhostUserDisk: ...
    @property
    def export(self) -> Export: ...

@final
class VhostUserCall:
    """Where the driver of a queue is told that requests are answered. It may change while the queue is served."""

    def __new__(cls) -> VhostUserCall: ...
    def replace(self, fd: int | None) -> None:
        """fd: an eventfd, of which a duplicate is kept. None: the driver polls. Raises OSError."""

@final
class VhostUserLog:
    """Memory in which a front-end finds the pages of guest memory that were written, for a live migration. memory: a
    bit for each page of 4 KiB, from guest address 0 on.
    """

    def __new__(cls, memory: SharedMemory) -> VhostUserLog: ...
    def set_event(self, fd: int | None) -> None:
        """fd: an eventfd that is raised after changes, of which a duplicate is kept. Raises OSError."""

@final
class DetachedVhostUser:
    """A queue of a virtio block device that has ended."""

    @property
    def next(self) -> int:
        """Index in the available ring of the first request that was not taken."""
    @property
    def failure(self) -> str | None:
        """Why it has ended, if it was not detached: how the driver has broken the rules, or that it was closed."""

def raise_event(fd: int) -> None:
    """Makes the eventfd of another program readable, and never waits for that program. Raises OSError."""

def vhost_user_inflight_length(size: int) -> int:
    """Bytes for the requests in flight of a queue with so many descriptors."""

def serve_vhost_user(
    engine: Engine,
    disk: VhostUserDisk,
    guest: GuestMemory,
    notices: Notices,
    token: int,
    *,
    inflight: tuple[SharedMemory, int],
    kick: int,
    call: VhostUserCall,
    size: int,
    descriptors: int,
    available: int,
    used: int,
    next: int,
    event_idx: bool,
    indirect: bool,
    write_through: bool,
    log: VhostUserLog | None,
    used_log: int | None,
) -> Transport:
    """Serve a queue of a virtio block device. inflight: memory for its requests in flight, and the offset in it; those
    that are there are served again. kick: an eventfd of the driver; a duplicate is kept, and never read. size: number
    of descriptors. descriptors, available, used: addresses in the other program. next: index in the available ring of
    the first request, if none is in flight. event_idx, indirect: features. write_through: each write is durable before
    it is answered. log: written pages are marked there; those of the used ring as from the guest address
    `used_log` on, unless that is None. The transport's end is a `DetachedVhostUser`. With `detach(drain=True)`, all
    requests that were taken are answered before that; otherwise those that wait are left in flight. A queue whose rings
    or requests in flight break the rules ends at once, with a `failure`. ValueError: the rings are not in the memory,
    or the log does not cover it.
    """

@final
class DetachedFuse:
    """A descriptor of a FUSE connection between two engines."""

    @property
    def unserved(self) -> bytes:
        """Requests that were read and not answered; none where `fuse_resend` brings them back."""
    def take_descriptor(self) -> int:
        """The engine's duplicate, from now on the caller's to close. EBADF: it was taken before."""

def mount(source: str, path: str | os.PathLike[str], kind: str, options: str, *, read_only: bool = False) -> None:
    """Mount a file system (mount(2)), without set-user-ID programs and device nodes. kind: of file system. options: of
    that kind, as its driver reads them.
    """

def unmount(path: str | os.PathLike[str], *, lazy: bool = False, force: bool = False) -> None:
    """Unmount a file system (umount2(2)); a symbolic link at `path` is not followed. lazy: also while files of it are
    open; it is gone when they are closed. force: requests to its server fail first (MNT_FORCE).
    """

def has_log_records() -> bool:
    """Whether `log_records` has records to return."""

def log_records() -> tuple[list[_LogRecord], int]:
    """Log records of the engine since the last call. Returns (at most 256 records, number of dropped records). A fork
    has a log of its own. New records wake the mapper of every device.
    """

def end_log() -> tuple[list[_LogRecord], int]:
    """Stop the queue and return its last records, as `log_records`. Later records go to standard error."""
