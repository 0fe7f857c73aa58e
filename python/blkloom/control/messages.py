"""Everything that is said on a control socket, as types.

A line of JSON each, tagged by "kind"; descriptors ride along (SCM_RIGHTS) with the first byte of a line
and are counted in its `fds`. Two conversations use it:

- client → supervisor, on `<run-dir>/control.sock`: `Request` with one of `ClientCall`;
- supervisor → worker, on a socket pair made with the worker, or on `<run-dir>/workers/<worker>.sock`
  when a supervisor comes back: `Request` with one of `WorkerCall`.

Either side greets with `Hello` first. Who gets a `Request` sends exactly one `Reply` or `Failure` with
its `id`, in any order. While a request is open the one who serves it may send `OpenFile` ("open this
file with your rights", answered by `Opened` or `OpenRefused`). A worker may at any time send `Keep`,
`Drop` and `Happened`; they are not answered, and what a worker sent before a `Reply` is acted on before. `SyncFailed`
is answered with `Noted`. Unknown fields are ignored (a newer peer may add some). A request with an unknown verb, or
with a value that is none or out of range, gets a `Failure`, and the conversation goes on.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from blkloom.control.states import DeviceState, ExportState, FailedSync, Label, Loaded, LoopNotes, Number

PROTOCOL: Final = 1
"""Grows when an old peer would misunderstand a new one."""
LONGEST_LINE: Final = 64 << 20
MOST_DESCRIPTORS: Final = 250
"""One line carries at most this many (SCM_MAX_FD is 253); more go in several `Keep`s or `Hold`s."""
MOST_READ: Final = 1 << 20
"""Bytes that one `ReadDevice` may ask for."""

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Errno = Annotated[int, msgspec.Meta(ge=1, le=4095)]
Descriptors = Annotated[int, msgspec.Meta(ge=0, le=MOST_DESCRIPTORS)]
"""How many descriptors come with a message."""


class _Message(msgspec.Struct, tag_field="kind", kw_only=True, omit_defaults=True):
    pass


class _Call(msgspec.Struct, tag_field="verb", kw_only=True, omit_defaults=True):
    pass


# What is said


class Hello(_Message, tag="hello"):
    """Who is speaking. Sent first by both sides."""

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


class Reply(_Message, tag="reply"):
    """The answer of a call that succeeded."""

    id: int
    result: Any = None
    """What the call's docstring says, as plain JSON; convert with msgspec.convert."""
    fds: Descriptors = 0


class OpenFile(_Message, tag="open"):
    """Open `path`, as seen from where you are, with your rights. request: whom it is for. With a descriptor: open what
    that one is, whatever the path leads to now.
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
    """The file is open; its descriptor rides along."""

    id: Number
    fds: Descriptors = 1


class OpenRefused(_Message, tag="refused"):
    """The file cannot be opened."""

    id: Number
    errno: Errno


# What a client asks of the supervisor.


class Selector(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """A device by its uuid or by its minor number: one of both."""

    uuid: str = ""
    minor: int | None = None

    def __str__(self) -> str:
        return f"with uuid {self.uuid!r}" if self.minor is None else f"with minor number {self.minor}"


DeviceKey = str | Selector
"""A device as a call names it. A str is its name, whatever is in it."""


class Create(_Call, tag="create"):
    """→ DeviceInfo. table None: `--notable`. Otherwise created, loaded and resumed, or not at all."""

    name: str
    uuid: str = ""
    minor: int | None = None
    table: str | None = None
    source: str = "table"
    """What the table's text is called in errors."""
    read_only: bool = False
    shared: bool = False
    suspended: bool = False
    autoclear: bool = False
    """Removed when its last client leaves, or the last device that stands on it; once it had one."""
    loop: LoopNotes | None = None


class Load(_Call, tag="load"):
    """→ None. same_files: paths that the live table has, too, mean the files it has open, wherever they lead now."""

    device: DeviceKey
    table: str
    source: str = "table"
    read_only: bool = False
    shared: bool = False
    same_files: bool = False


class Clear(_Call, tag="clear"):
    """Empties the inactive slot. → None."""

    device: DeviceKey


class Suspend(_Call, tag="suspend"):
    """timeout: seconds for requests in flight to end; None: the supervisor's default."""

    device: DeviceKey
    flush: bool = True
    timeout: Seconds | None = None


class Resume(_Call, tag="resume"):
    """Swaps the inactive table in, and goes live. → None."""

    device: DeviceKey
    flush: bool = True
    timeout: Seconds | None = None


class Remove(_Call, tag="remove"):
    """force: first an error table goes in. deferred: when the last user leaves. retry: for some seconds."""

    device: DeviceKey
    force: bool = False
    deferred: bool = False
    retry: bool = False


class RemoveAll(_Call, tag="remove_all"):
    """→ list of names that could not be removed, each with why: [[name, what], ...]."""

    force: bool = False
    deferred: bool = False


class Retain(_Call, tag="retain"):
    """The device stays when its last user leaves, whatever was asked before (autoclear, deferred). → None."""

    device: DeviceKey


class Rename(_Call, tag="rename"):
    """One of both."""

    device: DeviceKey
    name: str = ""
    uuid: str = ""


class GetTable(_Call, tag="table"):
    """→ the table's text ("" for none)."""

    device: DeviceKey
    inactive: bool = False


class GetStatus(_Call, tag="status"):
    """→ list of [start, length, target, status] a segment; sectors."""

    device: DeviceKey


class GetFiles(_Call, tag="files"):
    """→ list of OpenedFile: those of the live table, each path once. A device that has failed has none."""

    device: DeviceKey


class GetInfo(_Call, tag="info"):
    """→ list of DeviceInfo by minor; device "": of all."""

    device: DeviceKey = ""


class SendMessage(_Call, tag="message"):
    """→ the target's answer, or None."""

    device: DeviceKey
    sector: Number
    text: str


class ReadDevice(_Call, tag="read"):
    """→ base64 of `length` bytes from `offset` on, as a client would read them. At most MOST_READ; it is
    for looking at what is on a device (partition tables) without being a client of it.
    """

    device: DeviceKey
    offset: Number
    length: Number


class Wait(_Call, tag="wait"):
    """→ the event number, as soon as it is above `event` (None: above the present one)."""

    device: DeviceKey
    event: Number | None = None


class GetStats(_Call, tag="stats"):
    """→ {name: {"device": `Device.stats()`, "exports": {id: `Export.stats()`}, "memory": `Engine.memory()` of its
    worker}}; device "": of all.
    """

    device: DeviceKey = ""


class AddExport(_Call, tag="export"):
    """→ ExportState with where it listens (port 0 becomes the port it got). unix "" and host "": the
    automatic socket once more (after `unexport`). host "" with a port: localhost. allow_remote: `host` may be an
    address that other hosts reach.
    """

    device: DeviceKey
    name: str = ""
    unix: str = ""
    host: str = ""
    port: Port = 0
    read_only: bool = False
    allow_remote: bool = False


class RemoveExport(_Call, tag="unexport"):
    """id: the export's, or a socket path. Its clients are disconnected."""

    device: DeviceKey
    id: str


class GetVersion(_Call, tag="version"):
    """→ {"version", "protocol", "pid", "devices", "workers", "run_dir", "limits": {...}}."""


class Upgrade(_Call, tag="upgrade"):
    """The supervisor and every worker are replaced by what is installed now. → {"workers": n}."""


class Reap(_Call, tag="reap"):
    """→ list of what was removed, a line each: sockets, state files and immutable flags nobody owns."""


class Stop(_Call, tag="stop"):
    """Every device is drained, flushed and removed; then the supervisor ends. → None. force: also while clients
    are connected to devices; they are cut off.
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
    | ReadDevice
    | Wait
    | GetStats
    | AddExport
    | RemoveExport
    | GetVersion
    | Upgrade
    | Reap
    | Stop
)


# What the supervisor asks of a worker. `minor` names the device.


class Hold(_Call, tag="hold"):
    """Bring these devices up, lower ones first, from the state and the descriptors that ride along (in
    the order of `labels`): new ones, those of a worker that died, or those another worker handed over.
    more: further descriptors for the same devices come in the next `Hold`. → None.
    """

    devices: list[DeviceState] = []
    labels: list[Label] = []
    more: bool = False
    fds: int = 0


class WorkerLoad(_Call, tag="load"):
    """→ {"deps": [...], "targets": n, "types": [...], "size": n, "whole": bool} of the table loaded. Files are
    asked for with `OpenFile`. Raises as `Device.load`; then nothing changed.
    """

    minor: int
    loaded: Loaded
    source: str = "table"
    same_files: bool = False


class WorkerClear(_Call, tag="clear"):
    """Empties the inactive slot."""

    minor: int


class WorkerSuspend(_Call, tag="suspend"):
    """Drains, and flushes. → None."""

    minor: int
    flush: bool = True
    timeout: float | None = None


class WorkerResume(_Call, tag="resume"):
    """→ {"targets": n, "types": [...], "size": n, "event": n}, and "table": its text, where a target found its
    size changed. Files are asked for with `OpenFile`. swap: False: the inactive table stays.
    """

    minor: int
    flush: bool = True
    timeout: float | None = None
    swap: bool = True


class Release(_Call, tag="release"):
    """The device ends: drained and flushed, its exports and files closed. fail: without waiting."""

    minor: int
    fail: bool = False


class WorkerRename(_Call, tag="rename"):
    """Sets both."""

    minor: int
    name: str
    uuid: str = ""


class WorkerStatus(_Call, tag="status"):
    """→ list of [start, length, target, status] a segment; sectors."""

    minor: int


class WorkerFiles(_Call, tag="files"):
    """→ list of OpenedFile; see `GetFiles`."""

    minor: int


class WorkerMessage(_Call, tag="message"):
    """→ the target's answer, or None."""

    minor: int
    sector: int
    text: str


class WorkerRead(_Call, tag="read"):
    """→ base64 of the bytes."""

    minor: int
    offset: int
    length: int


class WorkerStats(_Call, tag="stats"):
    """→ {minor: {"device": ..., "exports": {id: ...}, "memory": ...}} of all its devices."""


class Serve(_Call, tag="serve"):
    """Accept on the listening socket that rides along."""

    minor: int
    export: ExportState
    fds: int = 1


class Unserve(_Call, tag="unserve"):
    """Ends an export and its connections."""

    minor: int
    id: str


class Describe(_Call, tag="describe"):
    """For a supervisor that came back: → {"devices": [DeviceState], "infos": [DeviceInfo]}, after
    `Keep`s with every descriptor it holds.
    """


class Freeze(_Call, tag="freeze"):
    """Drain, stop accepting, take the connections out of the engine; from here on nothing moves.
    → {"devices": [DeviceState]} with connections, whose descriptors came before in `Keep`s.
    """

    timeout: float | None = None


class Thaw(_Call, tag="thaw"):
    """The hand-over failed: go on as before `Freeze`."""


class Leave(_Call, tag="leave"):
    """End now. flush: False after a hand-over: nothing is flushed, unlocked or unlinked, another
    process owns it all.
    """

    flush: bool = True


WorkerCall = (
    Hold
    | WorkerLoad
    | WorkerClear
    | WorkerSuspend
    | WorkerResume
    | Release
    | WorkerRename
    | WorkerStatus
    | WorkerFiles
    | WorkerMessage
    | WorkerRead
    | WorkerStats
    | Serve
    | Unserve
    | Describe
    | Freeze
    | Thaw
    | Leave
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


# What a worker says on its own


class Keep(_Message, tag="keep"):
    """Store these descriptors: a worker that takes my place will need them."""

    labels: list[Label]
    fds: int = 0


class Drop(_Message, tag="drop"):
    """They are not needed any more."""

    labels: list[Label]


class Happened(_Message, tag="happened"):
    """The device's clients or event number changed, or it has had I/O errors. opened: there was a client since the
    device began. io_errors, last_io_error: as in `DeviceState`.
    """

    minor: int
    connections: int
    event: int
    opened: bool = False
    io_errors: int = 0
    last_io_error: str = ""
    failed_syncs: list[FailedSync] = []
    """All there are."""


class SyncFailed(_Message, tag="sync_failed"):
    """Remember these, all that the device has, and answer with `Noted`: until then no client is told."""

    id: int
    minor: int
    failed_syncs: list[FailedSync]


class Noted(_Message, tag="noted"):
    """A worker that takes the place of the one which said `SyncFailed` will know of it."""

    id: int


FromClient = ClientRequest | Opened | OpenRefused | Hello
ToClient = Hello | Reply | Failure | OpenFile
ToWorker = Hello | WorkerRequest | Opened | OpenRefused | Noted
FromWorker = Hello | Reply | Failure | OpenFile | Keep | Drop | Happened | SyncFailed
