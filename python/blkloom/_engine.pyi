"""The engine: moves bytes, knows nothing of formats, tables or protocols' handshakes.

This file is the border of blkloom. Python hands over file descriptors and maps; the engine's
threads execute requests against them and never call Python. What comes back are faults
(`Device.next_faults`) and notices (`Notices`).

Offsets and lengths are bytes. Every method may be called from any thread; every method that
moves bytes or waits releases the GIL. An I/O that fails raises `OSError` with its errno.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, final

from typing_extensions import Buffer, disjoint_base

__all__ = [
    "ClusterTable",
    "Connection",
    "Detached",
    "Device",
    "Engine",
    "Export",
    "Extent",
    "Fault",
    "File",
    "Map",
    "Notices",
    "Region",
    "serve_nbd",
]

_Operation: TypeAlias = Literal["read", "write", "flush", "discard", "write_zeroes", "extents"]

@final
class File:
    """An open file or block device and how to move bytes to and from it. Owns a duplicate of `fd`.

    direct: `fd` was opened with O_DIRECT. Requests of any alignment are still accepted; those that
    do not fit `offset_alignment` take a slow read-modify-write under a range lock.
    label: what errors and logs call it (a path).
    """

    def __new__(cls, fd: int, *, writable: bool, direct: bool = False, label: str = "") -> File: ...
    @property
    def size(self) -> int:
        """Bytes, now: the file's length or the block device's capacity."""
    @property
    def writable(self) -> bool: ...
    @property
    def direct(self) -> bool: ...
    @property
    def is_block_device(self) -> bool: ...
    @property
    def inline(self) -> Literal["always", "nowait", "never"]:
        """How the file is met first: it never blocks (tmpfs), it is asked with RWF_NOWAIT, or its
        requests always go to io_uring.
        """
    @property
    def offset_alignment(self) -> int:
        """Bytes a direct I/O's offset and length must be multiples of; 1 when not direct."""
    @property
    def memory_alignment(self) -> int: ...
    @property
    def label(self) -> str: ...
    def fileno(self) -> int:
        """The File's own descriptor; it stays the File's."""
    @property
    def in_flight(self) -> int:
        """Operations that storage has not answered: handed to io_uring or a thread, or keeping a caller
        waiting. What is done at once, out of the page cache, does not count.
        """
    def sync(self) -> None:
        """As fdatasync(2). Once it has failed, here or for a request, it always fails: the kernel tells of an error
        once, and what was written before may be lost.
        """
    @property
    def sync_error(self) -> int:
        """The errno of the sync that failed, which all that follow fail with; 0: none has."""
    def fail_syncs(self, errno: int) -> None:
        """They fail from now on: one has failed, or what was written is lost otherwise. The first errno stays."""
    @property
    def has_unreported_failure(self) -> bool:
        """A sync has failed, and `set_failure_reported` was not called since."""
    def set_failure_reported(self) -> None:
        """The failure is known to who must remember it when this process has ended: flushes need not wait for that."""

@final
class Region:
    """A piece of memory shared through a sealed memfd. Owns a duplicate of `fd`.

    The memfd must be sealed against shrinking (F_SEAL_SHRINK), so touching it can never raise
    SIGBUS; EINVAL otherwise. What was never written reads as zeros and takes no memory. What it
    holds already (another process's memory, handed over) is there and counts as `resident`.
    """

    def __new__(cls, fd: int, size: int, *, page_size: int = 4096) -> Region: ...
    @property
    def size(self) -> int: ...
    @property
    def resident(self) -> int:
        """Bytes of memory that hold data (whole pages)."""

@final
class Extent:
    """Where the bytes of a range are. Offsets grow with the range."""

    @staticmethod
    def data(file: File, offset: int, *, read_only: bool = False) -> Extent:
        """In a file. Writes to a read_only extent fault (copy on write)."""
    @staticmethod
    def memory(region: Region, offset: int) -> Extent: ...
    @staticmethod
    def zero(*, discard_writes: bool = False) -> Extent:
        """Reads as zeros. Writes fault, or vanish when discard_writes (the zero target)."""
    @staticmethod
    def error(errno: int) -> Extent: ...
    @staticmethod
    def fault() -> Extent:
        """Ask the target, for reads and writes alike."""
    @staticmethod
    def device(device: Device, offset: int, *, read_only: bool = False) -> Extent:
        """In another device (stacking). Writes to a read_only extent fault."""
    @staticmethod
    def stripes(chunk: int, legs: Sequence[Extent]) -> Extent:
        """Chunk i is chunk i // len(legs) of leg i % len(legs). `chunk` is in bytes, not
        necessarily a power of two; legs are data, memory, zero, error or device extents.
        """
    @staticmethod
    def table(table: ClusterTable) -> Extent:
        """A mapping that grows; the range begins at the table's cluster 0."""
    @property
    def kind(self) -> str: ...

@final
class ClusterTable:
    """Two levels of atomically readable entries, filled in as faults ask for it.

    `cluster` bytes a power of two from 512; `page` entries a page, a power of two. A page never
    installed, or dropped, faults. Discards and zero writes to a table always fault.

    An entry is a u64: kind << 61 | file << 49 | (offset >> 9), kind 0 fault, 1 data, 2 data
    read-only (writes fault), 3 zero (writes fault), 4 error EIO. `file` counts in `files`.
    """

    def __new__(cls, size: int, cluster: int, files: Sequence[File], *, page: int = 4096) -> ClusterTable: ...
    def install(self, first: int, entries: Buffer) -> None:
        """Store consecutive u64 entries (native endian) from cluster `first` on; they may span
        pages; pages they touch only in part keep (or start with) fault elsewhere.
        """
    def fill(self, first: int, count: int, entry: int) -> None: ...
    def entry(self, cluster: int) -> int: ...
    def copy(
        self, first: int, count: int, file: File, offset: int, *, patch: Buffer | None = None, patch_at: int = 0
    ) -> bool:
        """Write what `count` clusters from `first` on hold to `offset` of `file`, with `patch` over it from byte
        `patch_at` of it on; the disk's last cluster may be cut. False, with nothing done, where the table faults.
        Raises OSError of the files.
        """
    def drop(self, page: int) -> None:
        """Forget a page; the next request in its range faults."""
    @property
    def pages(self) -> int:
        """Pages held in memory."""

@final
class Map:
    """An immutable list of contiguous segments from 0, searched by bisection; none: a device of size 0.

    segments: (start, length, owner, extent) in bytes; owner is the target's number that faults
    and flushes name. Several consecutive entries may share an owner.
    flush_owners: owners that want a flush as a fault (after the data files below were synced).
    """

    def __new__(
        cls,
        segments: Sequence[tuple[int, int, int, Extent]],
        *,
        flush_owners: Sequence[int] = (),
    ) -> Map: ...
    @property
    def size(self) -> int: ...
    def __len__(self) -> int: ...

@final
class Engine:
    """Loop threads (started when first needed), each with an io_uring, or a thread pool where
    io_uring is forbidden (the log says so once).

    loops: 0 for one a CPU. spin_us: how long at most a loop polls before it sleeps (adapts down
    to 0 when that gains nothing). memory: bytes that clients of all exports together may make it keep, for payloads,
    replies and copies; requests that find none wait, in order, and only their connections with them.
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
        """Of clients: `budget` and `reserved`, bytes, and `waiting`, requests that wait for some."""
    def close(self) -> None:
        """Closes every connection, finishes what is in flight and joins the threads. Nothing in a fork."""

@final
class Fault:
    """A request the map could not answer, parked until `answer` or `fail` (or its time is over)."""

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
        """extents: of which metadata context; "base:allocation" for what the range holds."""
    @property
    def one(self) -> bool:
        """extents: whoever asks looks at the first run only."""
    @property
    def fua(self) -> bool: ...
    @property
    def may_unmap(self) -> bool:
        """write_zeroes: the range may become a hole."""
    @property
    def fast(self) -> bool:
        """write_zeroes: only if faster than writing; ENOTSUP otherwise."""
    @property
    def sync_failed(self) -> bool:
        """A file of the device, or of one below, has an unreported failure. The request fails, whatever is answered,
        but not before; the operation is "flush" and the owner has no meaning.
        """
    @property
    def again(self) -> bool:
        """Its request was held before."""
    @property
    def full(self) -> int:
        """A write that was sent where a cluster table says, and found no space there: the errno (ENOSPC, EDQUOT).
        0: not so.
        """
    @property
    def expired(self) -> bool:
        """Its time is over: the request has failed, and what it asks for must not be begun any more."""
    def payload(self) -> bytes:
        """A write's data (a copy), length bytes."""
    def retry(self) -> None:
        """The map has changed: look it up again."""
    def done(self, data: Buffer | None = None) -> None:
        """The target did it. Reads pass `length` bytes of data."""
    def extents(self, extents: Sequence[tuple[int, int]]) -> None:
        """Answer of an `extents` fault: (length, flags) from its offset on."""
    def fail(self, errno: int) -> None: ...
    def hold(self, errno: int) -> None:
        """Not now. The request waits, and its time is not over: until `Device.retry_held`, when it faults anew; or at
        the gate of its device, when that is suspended, to be looked up after the resume. After `Device.fail_held` it
        fails with errno, as a flush always does.
        """

@disjoint_base
class Device:
    """Executes requests against a map. Born live with `map`, or suspended with none. In a fork of the process that made
    it, where the engine has no threads, `close` does nothing and the rest raises blkloom.errors.ForkedError.

    Devices stand on one another by device extents, 32 at most (ELOOP), and never in a circle (ValueError).
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
        """Stop new requests (they park), finish those in flight, flush; files whose failure is reported
        already are passed over. TimeoutError leaves the device as it was; `File.in_flight` says which
        file holds it up. It comes in time also while another suspend, swap or resume is under way.
        """
    def swap(self, map: Map) -> None:
        """Replace the map. Live: returns when no request that began before is in flight. Raises
        ValueError, OSError (ELOOP, ESHUTDOWN).
        """
    def resume(self) -> None: ...
    def synchronize(self) -> None:
        """Wait until no request that looked up the map before this call is in flight. Parked
        faults do not count, so a fault handler may call it.
        """
    def next_faults(self, timeout: float | None = None) -> list[Fault] | None:
        """All waiting faults, waiting for the first; [] after `timeout`, when there are new I/O errors, and when
        woken; None once closed.
        """
    @property
    def io_errors(self) -> int:
        """Requests that storage has failed, or a target that was asked, since the device was made; not what a client
        asked for and may not have, and not what the target `error` fails.
        """
    @property
    def last_io_error(self) -> tuple[str, int, int, str] | None:
        """(operation, offset, errno, path of the file or "") of the last."""
    @property
    def has_new_io_errors(self) -> bool: ...
    def new_io_errors(self) -> tuple[list[tuple[str, int, int, str, int]], int]:
        """What has come since this was called before: (operation, offset, errno, path, how many) of the last one of
        each operation, errno and path, 8 at most; and how many more there were of others.
        """
    def wake_mapper(self) -> None:
        """Has `next_faults` return now, or the next time it is called, though no fault waits."""
    @property
    def held(self) -> int:
        """How many requests wait because `Fault.hold` said so."""
    def retry_held(self) -> None: ...
    def fail_held(self) -> None:
        """They fail, and from now on what would be held: the device is about to close."""
    def attach_mapper(self) -> None:
        """From now on faults wait for `next_faults` (before, they fail with EIO)."""
    def close(self) -> None:
        """Drains without flushing, ends `next_faults`, fails what comes later with ESHUTDOWN. Waits
        `fault_timeout` at most, whatever else is under way; what still is then, ends by itself.
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
        """(offset, length, flags) covering the range; flags as NBD's base:allocation: 1 hole, 2 reads as zeros.
        Other metadata contexts are asked of the map's owners, in faults for as much of each segment as is in the range,
        and their flags are what those say; EINVAL from one that does not know the context.
        """
    def batch(self, requests: Sequence[tuple[Literal["r", "w"], Buffer, int]]) -> list[int]:
        """Many reads into / writes from (buffer, offset) at once, in no order. Returns bytes moved or -errno, one a
        request.
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
    ) -> bool:
        """True: it was small, nothing had to be waited for, and it is done. Raises OSError of what failed as fast.
        False: its end comes as a notice (token, result, errno), and `buffer` must stay as it is until then.
        """
    def stats(self) -> dict[str, Any]:
        """See `blkloom.stats.Stats`: counters and histograms; reading them costs the loops nothing."""

@final
class Notices:
    """What happened, for an event loop: readable `fileno()` means `take()` has something."""

    def __new__(cls) -> Notices: ...
    def fileno(self) -> int: ...
    def take(self) -> list[tuple[int, Any, int]]:
        """(token, result, errno): the I/O submitted with token has ended (result: None, or the
        extents), or the connection served with token has closed (result: a str, the reason) or was
        detached (result: a `Detached`).
        """

@final
class Export:
    """One way in to a device, with counters of its own. A client of a read_only export cannot write."""

    def __new__(cls, device: Device, *, name: str = "", read_only: bool = False) -> Export: ...
    @property
    def device(self) -> Device: ...
    @property
    def name(self) -> str: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def connections(self) -> int: ...
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
) -> Connection:
    """NBD's transmission phase on a connected stream socket, from here on the engine's (it owns
    a duplicate of fd). contexts: (id, name) of the metadata contexts selected in the handshake; a block
    status answers for all of them, in this order (see `Device.extents`). initial: bytes received but not
    served: beyond the handshake, or `Detached.initial`; as many as they may be. unsent, skipping: of a
    `Detached`.
    """

@final
class Connection:
    def close(self) -> None:
        """Finish what is in flight, send the replies that fit, close. The notice follows."""
    def detach(self, *, drain: bool = False) -> None:
        """Let go of the client without its noticing, for another engine to go on with it: read no more,
        finish and answer what was begun, take back what waits at a suspended device's gate. The notice
        follows: a `Detached`, or a str where the client left first. Not to be undone (`close` does nothing
        any more): `serve_nbd` again.

        drain: not before the client has taken its replies; one that does not is closed after the stall
        timeout, or let go by `detach()`. Without it the client is not waited for: what it has not taken is
        in `Detached.unsent`. Storage that does not answer holds both up (`File.in_flight`).
        """

@final
class Detached:
    """A connection between two engines: its socket, and what `serve_nbd` needs to go on with it.

    Freed with the descriptor not taken, it closes the socket.
    """

    @property
    def initial(self) -> bytes:
        """Requests, whole and in part, received and not served, as the client sent them."""
    @property
    def unsent(self) -> bytes:
        """What the client has not taken of its replies yet; as many bytes as a connection may have
        unanswered at most.
        """
    @property
    def skipping(self) -> tuple[int, bytes] | None:
        """Of a refused request, whose payload comes behind `initial`: how many bytes of that are still to
        come, and the reply then.
        """
    def take_descriptor(self) -> int:
        """The socket, from now on the caller's to close. EBADF: it was taken before."""
