"""The states of devices and exports, as values in control messages and in the registry.

Unknown fields are ignored and missing fields have their defaults, because a newer peer may have more fields.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
"""A count, an id, an offset in bytes or in sectors."""


class _Value(msgspec.Struct, kw_only=True, omit_defaults=True):
    pass


Role = Literal["file", "claim", "memory", "changes", "listen", "connection", "export"]
"""The purpose of a stored descriptor."""


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """The label of a stored descriptor. role and key:
    file: `w`/`r` then `d`/`-` then the path as the table has it; claim: the path; memory and changes: a number within
    its load; listen: the export's id, of one whose endpoint is a listening socket; connection: a number within the
    device; export: the export's id, a slash, and which descriptor of its endpoint it is.
    load: the loaded table it belongs to (0: the device itself).
    """

    device: int
    """The device's minor number, unique in a run directory while the device lives."""
    load: int
    role: Role
    key: str


def file_label(device: int, load: int, path: str, *, writable: bool, direct: bool) -> Label:
    """The label of an open file of a table. path: as the table has it."""
    return Label(device=device, load=load, role="file", key=f"{'w' if writable else 'r'}{'d' if direct else '-'}{path}")


def file_path(label: Label) -> str:
    """The path in a label of `file_label`."""
    return label.key[2:]


def export_label(device: int, export: str, role: Role, key: str) -> Label:
    """The label of a descriptor of an endpoint. export: id of the export. key: which one; "" for the only one."""
    return Label(device=device, load=0, role=role, key=f"{export}/{key}" if key else export)


def export_key(label: Label) -> tuple[str, str]:
    """The arguments of `export_label`: id of the export, and key."""
    export, _, key = label.key.partition("/")
    return export, key


class FailedSync(msgspec.Struct, frozen=True, kw_only=True):
    """A failed sync: label of the descriptor, and errno. Data written through it may be lost, and every flush fails
    until the table of that load is dropped.
    """

    label: Label
    errno: int


class Loaded(_Value):
    """A table in a slot. load: a number that no other load of this run directory has had. read_only: the device is
    read-only while this table is live. whole: see `LoadedTarget.whole`. fault: see `DeviceInfo.fault`.
    """

    load: int
    table: str
    read_only: bool = False
    shared: bool = False
    whole: bool = False
    fault: str = ""


class SocketPermissions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who may connect to a Unix socket. None: mode 0600, and user and group of the process that listens."""

    mode: Number | None = None
    uid: Number | None = None
    gid: Number | None = None

    @property
    def is_default(self) -> bool:
        """Whether nothing is given."""
        return (self.mode, self.uid, self.gid) == (None, None, None)


class ExportState(_Value):
    """One export. id: unique within the device. kind: see `export.registry`. read_only: for its clients. automatic:
    every device has it, and it follows the device's name.

    nbd: name: what clients ask for (they also get it by the empty name). unix: socket path, or ""; otherwise host and
    port. The automatic one is at `<run-dir>/dev/<name>`.

    Kinds with a file: path: of the file. details: fields that only this kind uses (fuse: `export.fuse.state`).
    """

    id: str
    name: str
    kind: str = "nbd"
    unix: str = ""
    host: str = ""
    port: int = 0
    path: str = ""
    read_only: bool = False
    automatic: bool = False
    of_node: bool = False
    """It was added for a node, and is removed with it."""
    recovery_timeout: float = 300.0
    """Seconds that I/O waits for another worker, of kinds whose clients do not notice a worker's death; then it fails.
    """
    socket: SocketPermissions = SocketPermissions()
    """Of exports with a Unix socket."""
    details: dict[str, Any] = {}

    @property
    def address(self) -> str:
        """The address, for messages."""
        return self.path or self.unix or f"{self.host}:{self.port}"


class NodeOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the nodes of a device are to be. uid, gid, mode (permission bits): None: as the system makes them."""

    uid: Number | None = None
    gid: Number | None = None
    mode: Number | None = None
    scan: bool = True
    """udev looks what is on the node, and activates what it finds (LVM, MD, btrfs)."""
    at_resume: bool = False
    """The next resume attaches the device."""

    @property
    def has_permissions(self) -> bool:
        """Whether owner or permissions are given."""
        return (self.uid, self.gid, self.mode) != (None, None, None)


class NodeState(_Value):
    """The node of an attached device. via: the way (`attach.registry`). export: id of the export that serves it. path:
    of the node; "" while it is being attached. link: its stable name. used_by: who uses it, where `info` looks.
    """

    via: str
    export: str
    path: str = ""
    link: str = ""
    read_only: bool = False
    partitions: bool = False
    exclusive: bool = False
    """Other exports are for reading only meanwhile."""
    restricted: list[str] = []
    """Ids of the exports for which that was changed."""
    restricted_others: list[tuple[int, str]] = []
    """The same for exports of its disk or its partitions: minor number of the device, id."""
    own_export: bool = True
    """The export was added for the node, and goes with it."""
    holds_open: bool = False
    """The kernel keeps the file of the export open once, for as long as the node is there."""
    lazy: bool = False
    """It goes after its last use."""
    former: tuple[int, int, int] | None = None
    """User, group and permission bits of the node before they were changed; None if they were not."""
    used: bool = False
    """It has had a user; noted only for autoclear."""
    frozen: bool = False
    """A suspend has frozen the file systems on it, or is about to."""
    details: dict[str, Any] = {}
    """Fields that only this way uses."""
    fixed_size: int = 0
    """Bytes of a node whose size the kernel cannot change; 0: it can."""
    used_by: list[str] = []


class ConnectionState(_Value):
    """A connection during a hand-over. export: the `ExportState.id`. contexts: (id, name) of the selected metadata
    contexts. initial: base64 of bytes that were received, but not served. unsent: base64 of replies that the client has
    not read. stored: both are in the device's memfd of unfinished bytes instead: their offset, and the length of each.
    skipping: the number of bytes of a refused payload that will still arrive, and base64 of the reply to it.
    """

    export: str
    number: int
    structured: bool = False
    extended: bool = False
    contexts: list[tuple[int, str]] = []
    max_payload: int = 32 << 20
    read_only: bool = False
    initial: str = ""
    unsent: str = ""
    stored: tuple[int, int, int] | None = None
    skipping: tuple[int, str] | None = None


class LoopNotes(_Value):
    """Settings of a device of `blkloom loop` that are not in its table. partition: its number, if it is a partition of
    the device below it.
    """

    sizelimit: Number = 0
    """Bytes; 0: up to the end of the file."""
    partscan: bool = False
    partition: Number = 0
    shared: bool = False
    """Its file is not locked."""


class DeviceState(_Value):
    """The complete state of a device, without its descriptors."""

    name: str
    minor: int
    uuid: str = ""
    active: Loaded | None = None
    inactive: Loaded | None = None
    suspended: bool = False
    event: int = 0
    exports: list[ExportState] = []
    connections: list[ConnectionState] = []
    """Set only during a hand-over."""
    autoclear: bool = False
    """Autoclear: remove it after its last user has left."""
    opened: bool = False
    """It has had a user."""
    loop: LoopNotes | None = None
    failed_syncs: list[FailedSync] = []
    io_errors: int = 0
    """Including those of its former workers."""
    last_io_error: str = ""
    """Text of `errors.describe_io_error`."""


class OpenedFile(_Value):
    """An open file of a device. path: as in the table. name: the present path, or the last one followed by `
    (deleted)`, as in the kernel's backing_file. device, inode: st_dev and st_ino of stat(2).
    """

    path: str
    name: str
    device: int
    inode: int
    size: int
    """Present size in bytes."""


class DeviceInfo(_Value):
    """The state of a device for `info`, `ls` and `top`."""

    name: str
    minor: int
    uuid: str = ""
    state: Literal["ACTIVE", "SUSPENDED", "FAILED"] = "ACTIVE"
    fault: str = ""
    """What `blkloom fault` has made of it, in the words of that command: `slow 10ms`; "": nothing."""
    reason: str = ""
    """The reason why it is FAILED or waits."""
    read_only: bool = False
    shared: bool = False
    """The files of its live table are not locked."""
    live: bool = False
    inactive: bool = False
    open_count: int = 0
    """Number of connected clients plus devices above it."""
    connections: int = 0
    event: int = 0
    targets: int = 0
    """Number of segments of the live table."""
    types: list[str] = []
    """Names of the targets in the live table, each once."""
    size: int = 0
    """Bytes."""
    block_size: int = 512
    """Bytes of a logical block."""
    worker: int = 0
    """Process id; 0: none."""
    restarts: int = 0
    deferred: bool = False
    exports: list[ExportState] = []
    node: NodeState | None = None
    """None: it is not attached."""
    node_options: NodeOptions = NodeOptions()
    deps: list[str] = []
    """Devices and files below it: `blkloom:NAME` and paths."""
    holders: list[str] = []
    """Devices above it."""
    sync_errors: list[str] = []
    """`<path> had failed: <why>` for each file of this device or a lower one that could not be synced. Flushes fail
    until the file is reopened.
    """
    autoclear: bool = False
    loop: LoopNotes | None = None
    io_errors: int = 0
    """Number of requests that have failed with an I/O error since the device was made."""
    last_io_error: str = ""
