"""The messages of control sockets, as types.

Each message is a line of JSON with the tag "kind". Descriptors are sent with the first byte of a line (SCM_RIGHTS), and
its field `fds` counts them. There are two connections:

- client → supervisor, on `<run-dir>/control.sock`: `Request` with one of `ClientCall`;
- supervisor → worker, on a socket pair made with the worker, or on `<run-dir>/workers/<worker>.sock`
  when a new supervisor connects: `Request` with one of `WorkerCall`.

Both sides send `Hello` first. The receiver of a `Request` sends exactly one `Reply` or `Failure` with its `id`, in any
order. Before that it may send `OpenFile` ("open this file with your rights"), which is answered by `Opened` or
`OpenRefused`. A worker may send `Keep`, `Drop` and `DeviceChanged` at any time; they have no answer, and they are
handled before a `Reply` that was sent later. `SyncFailed` is answered with `Noted`. Unknown fields are ignored, because
a newer peer may add some. A request with an unknown verb or an invalid value gets a `Failure`; the connection stays
usable.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from blkloom.control.faults import Fault
from blkloom.control.states import FailedSync, Label, LoopNotes, NodeOptions, Number, SocketPermissions
from blkloom.control.worker_calls import (
    Describe,
    Freeze,
    Hold,
    Leave,
    Release,
    Serve,
    Thaw,
    Unserve,
    WorkerCall,
    WorkerClear,
    WorkerFiles,
    WorkerLoad,
    WorkerMessage,
    WorkerRead,
    WorkerReloadTls,
    WorkerRename,
    WorkerResume,
    WorkerStats,
    WorkerStatus,
    WorkerSuspend,
)

__all__ = [
    "Describe",
    "Freeze",
    "Hold",
    "Leave",
    "Release",
    "Serve",
    "Thaw",
    "Unserve",
    "WorkerCall",
    "WorkerClear",
    "WorkerFiles",
    "WorkerLoad",
    "WorkerMessage",
    "WorkerRead",
    "WorkerReloadTls",
    "WorkerRename",
    "WorkerResume",
    "WorkerStats",
    "WorkerStatus",
    "WorkerSuspend",
]
"""Of `worker_calls`; every message can be imported from here."""

PROTOCOL: Final = 1
"""Protocol version. It increases when an old peer would misunderstand a new one."""
LONGEST_LINE: Final = 64 << 20
MOST_DESCRIPTORS: Final = 250
"""Most descriptors of one line (SCM_MAX_FD is 253); more are sent in several `Keep`s or `Hold`s."""
MOST_READ: Final = 1 << 20
"""Most bytes of one `ReadDevice`."""

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Errno = Annotated[int, msgspec.Meta(ge=1, le=4095)]
Descriptors = Annotated[int, msgspec.Meta(ge=0, le=MOST_DESCRIPTORS)]
"""Number of descriptors of a message."""


class _Message(msgspec.Struct, tag_field="kind", kw_only=True, omit_defaults=True):
    pass


class _Call(msgspec.Struct, tag_field="verb", kw_only=True, omit_defaults=True):
    pass


# Messages


class Hello(_Message, tag="hello"):
    """Greeting: version and process of the sender. Both sides send it first."""

    protocol: int = PROTOCOL
    version: str = ""
    pid: Number = 0


class Failure(_Message, tag="failure"):
    """An error as it is raised on the other side. type: a class name of `blkloom.errors`."""

    id: int
    type: str = "BlkloomError"
    what: str = ""
    cure: str = ""
    errno: int | None = None
    path: str = ""
    value: str = ""
    source: str = ""
    line: int = 0
    column: int = 0
    holders: list[int] = []
    """Processes that use the file, for a BusyError."""


class Reply(_Message, tag="reply"):
    """The answer of a call that succeeded."""

    id: int
    result: Any = None
    """The result, as the docstring of the call says, in plain JSON; convert it with msgspec.convert."""
    fds: Descriptors = 0


class OpenFile(_Message, tag="open"):
    """Open `path`, in your mount namespace and working directory, with your rights. request: id of the request that
    needs it. With a descriptor: reopen that file, even if the path leads to another one now.
    """

    id: int
    request: int
    path: str
    writable: bool = False
    direct: bool = False
    exclusive: bool = False
    """O_EXCL, for claiming a block device."""
    fds: Descriptors = 0


class Opened(_Message, tag="opened"):
    """The file is open. Comes with its descriptor."""

    id: Number
    fds: Descriptors = 1


class OpenRefused(_Message, tag="refused"):
    """The file cannot be opened."""

    id: Number
    errno: Errno


# What a client asks of the supervisor.


class Selector(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Selects a device by either uuid or minor number."""

    uuid: str = ""
    minor: int | None = None

    def __str__(self) -> str:
        return f"with uuid '{self.uuid}'" if self.minor is None else f"with minor number {self.minor}"


DeviceKey = str | Selector
"""The device of a call. A str is always a name."""


class Create(_Call, tag="create"):
    """→ DeviceInfo. table None: `--notable`. Otherwise created, loaded and resumed, or not at all."""

    name: str
    uuid: str = ""
    minor: int | None = None
    table: str | None = None
    source: str = "table"
    """Name of the table text in errors."""
    read_only: bool = False
    shared: bool = False
    suspended: bool = False
    autoclear: bool = False
    """Remove it when the last client has left and no device is stacked on it; only after it has had a user."""
    loop: LoopNotes | None = None
    node: NodeOptions = NodeOptions()
    """For each attach of the device."""
    fault: str = ""
    """See `DeviceInfo.fault`; for a device that is made again."""


class Load(_Call, tag="load"):
    """→ None. same_files: for paths that are also in the live table, use its open files, even if moved."""

    device: DeviceKey
    table: str
    source: str = "table"
    read_only: bool = False
    shared: bool = False
    same_files: bool = False
    fault: str = ""
    """See `DeviceInfo.fault`; for `SetFault`."""


class Clear(_Call, tag="clear"):
    """Empties the inactive slot. → None."""

    device: DeviceKey


class Suspend(_Call, tag="suspend"):
    """timeout: seconds for requests in flight to end; None: the supervisor's default. lock_fs: freeze file systems that
    are mounted from the device's node, or from a node of a device above it, until it is resumed; only with `flush`.
    """

    device: DeviceKey
    flush: bool = True
    lock_fs: bool = True
    timeout: Seconds | None = None


class Resume(_Call, tag="resume"):
    """Makes the inactive table active and continues I/O. → None."""

    device: DeviceKey
    flush: bool = True
    timeout: Seconds | None = None
    attach: bool = False
    """Attach it as well, if it is not attached (dmsetup's --addnodeonresume)."""


class Remove(_Call, tag="remove"):
    """Removes a device. force: load an error table first. deferred: remove it after its last user has left. retry: for
    some seconds.
    """

    device: DeviceKey
    force: bool = False
    deferred: bool = False
    retry: bool = False


class RemoveAll(_Call, tag="remove_all"):
    """→ the devices that could not be removed, each with the reason: [[name, what], ...]."""

    force: bool = False
    deferred: bool = False


class Retain(_Call, tag="retain"):
    """Cancels autoclear and deferred removal: the device stays after its last user has left. → None."""

    device: DeviceKey


class Rename(_Call, tag="rename"):
    """Sets either the name or the uuid. → None."""

    device: DeviceKey
    name: str = ""
    uuid: str = ""


class GetTable(_Call, tag="table"):
    """Reads a table. → its text ("" for an empty slot)."""

    device: DeviceKey
    inactive: bool = False


class GetStatus(_Call, tag="status"):
    """→ list of [start, length, target, status] a segment; sectors."""

    device: DeviceKey


class GetFiles(_Call, tag="files"):
    """Lists open files. → list of OpenedFile: those of the live table, each path once; empty for a failed device."""

    device: DeviceKey


class GetInfo(_Call, tag="info"):
    """Reads states. → list of DeviceInfo by minor; device "": of all devices."""

    device: DeviceKey = ""


class SendMessage(_Call, tag="message"):
    """→ the target's answer, or None."""

    device: DeviceKey
    sector: Number
    text: str


class SetFault(_Call, tag="fault"):
    """Makes a live device faulty, in place of a former fault; fault None: makes it well again. → None."""

    device: DeviceKey
    fault: Fault | None = None


class TakeSnapshot(_Call, tag="snapshot"):
    """Makes the device `name`, a writable snapshot of a live device. → DeviceInfo. store: the path of a file for the
    exceptions, which is zeros; "": a RAM device of `size` bytes (0: room for all). chunk: sectors; 0: the default.
    lock_fs, timeout: see `Suspend`.
    """

    device: DeviceKey
    name: str
    store: str = ""
    size: Number = 0
    chunk: Number = 0
    lock_fs: bool = True
    timeout: Seconds | None = None


class DeleteSnapshot(_Call, tag="delete_snapshot"):
    """Removes a snapshot, or all snapshots of a device. → None."""

    device: DeviceKey


class MergeSnapshot(_Call, tag="merge_snapshot"):
    """Removes a snapshot and begins to merge what it contained into its origin. → the name of the origin."""

    device: DeviceKey


class FinishMerge(_Call, tag="finish_merge"):
    """Gives the origin its former table again, if the merge is complete. → whether it is."""

    device: DeviceKey


class ListSnapshots(_Call, tag="snapshots"):
    """→ list of SnapshotInfo; device "": of all devices."""

    device: DeviceKey = ""


class SnapshotInfo(msgspec.Struct, frozen=True):
    """A snapshot. origin: name of its device. store: path of the file with its exceptions, or `blkloom:NAME`."""

    name: str
    origin: str
    store: str


class ReadDevice(_Call, tag="read"):
    """Reads from a device without a connection to it, for partition tables. → base64 of `length` bytes (at most
    MOST_READ) from `offset` on.
    """

    device: DeviceKey
    offset: Number
    length: Number


class Wait(_Call, tag="wait"):
    """Waits for an event. → the event number, as soon as it is above `event` (None: above the present one)."""

    device: DeviceKey
    event: Number | None = None


class GetStats(_Call, tag="stats"):
    """→ {name: {"device": `Device.stats()`, "exports": {id: `Export.stats()`}, "memory": `Engine.memory()` of its
    worker}}; device "": of all.
    """

    device: DeviceKey = ""


class AddExport(_Call, tag="export"):
    """Adds an export. → ExportState with its address (port 0 is replaced by the port). kind: see `export.registry`.
    path: of kinds with a file; "" for the file in the run directory. options: of this kind.

    nbd: unix "" and host "": the automatic socket again (after `unexport`). host "" with a port: localhost.
    allow_remote: `host` may be an address that other hosts can reach.
    """

    device: DeviceKey
    kind: str = "nbd"
    name: str = ""
    unix: str = ""
    host: str = ""
    port: Port = 0
    path: str = ""
    read_only: bool = False
    allow_remote: bool = False
    shared: bool = False
    """Also for writing while the device is attached for writing as a block device."""
    socket: SocketPermissions = SocketPermissions()
    """Of a Unix socket."""
    options: dict[str, Any] = {}


class ReloadTls(_Call, tag="reload_tls"):
    """Reads the TLS credentials of the exports of a device again, for clients that connect from then on. → None.
    Clients that are connected stay. If they cannot be used, those before stay, and it fails.
    """

    device: DeviceKey


class RemoveExport(_Call, tag="unexport"):
    """Removes an export. → None. id: of the export, or its address. NBD clients are disconnected. For a file that is
    open it is refused (EBUSY), unless `force`: requests of its users then fail.
    """

    device: DeviceKey
    id: str
    force: bool = False


class Attach(_Call, tag="attach"):
    """→ Attached. via: a name of `attach.registry`, or "auto". block_device: with "auto", only ways whose node is one.
    partitions: make nodes of the partitions, too, if the node is a block device. shared: as in `AddExport`. options: of
    the export that serves the node. scan: see `NodeOptions`; None: as it was.
    """

    device: DeviceKey
    via: str = "auto"
    options: dict[str, Any] = {}
    read_only: bool = False
    partitions: bool = False
    block_device: bool = False
    shared: bool = False
    scan: bool | None = None


class Detach(_Call, tag="detach"):
    """→ None. lazy: also a node that is in use; it goes after its last use. force: the same, and what its users ask
    fails from now on.
    """

    device: DeviceKey
    lazy: bool = False
    force: bool = False


class ScanPartitions(_Call, tag="scan_partitions"):
    """Updates the kernel's partitions of a node that is a block device to the partition table. → list of warnings.
    remove: removes them instead.
    """

    device: DeviceKey
    remove: bool = False


class MakeNodes(_Call, tag="mknodes"):
    """Makes the stable names of nodes again where they are not as they should be. → None. device "": of all. A device
    that does not exist is no error: it has no name.
    """

    device: DeviceKey = ""


class GetVersion(_Call, tag="version"):
    """→ {"version", "protocol", "pid", "devices", "workers", "run_dir", "limits": {...}}."""


class Upgrade(_Call, tag="upgrade"):
    """Replaces the supervisor and every worker by the installed version. → {"workers": n}."""


class Reap(_Call, tag="reap"):
    """Removes stale sockets, state files and immutable flags. → list with a line for each."""


class Stop(_Call, tag="stop"):
    """Drains, flushes and removes every device; then the supervisor ends. → None. force: also while clients are
    connected to devices; they are disconnected.
    """

    force: bool = False


ClientCall = (
    Create
    | Load
    | Clear
    | Suspend
    | Resume
    | Remove
    | RemoveAll
    | Retain
    | Rename
    | GetTable
    | GetStatus
    | GetFiles
    | GetInfo
    | SendMessage
    | SetFault
    | TakeSnapshot
    | DeleteSnapshot
    | MergeSnapshot
    | FinishMerge
    | ListSnapshots
    | ReadDevice
    | Wait
    | GetStats
    | AddExport
    | RemoveExport
    | ReloadTls
    | Attach
    | Detach
    | ScanPartitions
    | MakeNodes
    | GetVersion
    | Upgrade
    | Reap
    | Stop
)


class ClientRequest(_Message, tag="request"):
    """A call to the supervisor."""

    id: Number
    call: ClientCall


class WorkerRequest(_Message, tag="request"):
    """A call to a worker."""

    id: int
    call: WorkerCall
    fds: int = 0


# Notifications of a worker


class Keep(_Message, tag="keep"):
    """Store these descriptors: a replacement of this worker will need them."""

    labels: list[Label]
    fds: int = 0


class Drop(_Message, tag="drop"):
    """These descriptors are no longer needed."""

    labels: list[Label]


class DeviceChanged(_Message, tag="happened"):
    """The device's clients or event number changed, or it has had I/O errors. opened: there was a client since the
    device began. io_errors, last_io_error: as in `DeviceState`. gone: ids of exports that were unmounted.
    """

    minor: int
    connections: int
    event: int
    opened: bool = False
    io_errors: int = 0
    last_io_error: str = ""
    failed_syncs: list[FailedSync] = []
    """All failed syncs of the device."""
    gone: list[str] = []


class SyncFailed(_Message, tag="sync_failed"):
    """Record all failed syncs of the device, and answer with `Noted`. Clients get no error before that answer."""

    id: int
    minor: int
    failed_syncs: list[FailedSync]


class Noted(_Message, tag="noted"):
    """The answer to `SyncFailed`: a replacement of the worker will know of the failures."""

    id: int


FromClient = ClientRequest | Opened | OpenRefused | Hello
ToClient = Hello | Reply | Failure | OpenFile
ToWorker = Hello | WorkerRequest | Opened | OpenRefused | Noted
FromWorker = Hello | Reply | Failure | OpenFile | Keep | Drop | DeviceChanged | SyncFailed
