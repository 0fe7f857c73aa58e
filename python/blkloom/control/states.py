"""What a device is to those who keep it, look after it or show it: all of its state, as values that control
messages carry and the registry stores.

Unknown fields are ignored, absent ones have their defaults: a newer peer may have more.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
"""A count, an id, an offset in bytes or in sectors."""


class _Value(msgspec.Struct, kw_only=True, omit_defaults=True):
    pass


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """What a stored descriptor is. role and key:
    file: `w`/`r` then `d`/`-` then the path as the table has it; claim: the path; memory: a number
    within its load; listen: the export's id; connection: a number within the device.
    load: the loaded table it belongs to (0: the device itself).
    """

    device: int
    """The device's minor number, unique in a run directory while the device lives."""
    load: int
    role: Literal["file", "claim", "memory", "listen", "connection"]
    key: str


class FailedSync(msgspec.Struct, frozen=True, kw_only=True):
    """A file that could not be synced through the descriptor of that label, and the errno: what was written through it
    may be lost, and every flush fails until its load has gone.
    """

    label: Label
    errno: int


class Loaded(_Value):
    """A table in a slot. load: a number no other load of this run directory has had. read_only: so is the device for
    as long as this table is live, and only so long. whole: see `Target.whole`.
    """

    load: int
    table: str
    read_only: bool = False
    shared: bool = False
    whole: bool = False


class ExportState(_Value):
    """One NBD export. id: unique within the device. name: what clients ask for (they also get it by
    the empty name). unix: socket path, or ""; otherwise host and port. automatic: the socket every
    device has at `<run-dir>/dev/<name>`.
    """

    id: str
    name: str
    unix: str = ""
    host: str = ""
    port: int = 0
    read_only: bool = False
    automatic: bool = False


class ConnectionState(_Value):
    """A live NBD connection on its way to another worker. export: the `ExportState.id`. contexts: (id, name) of the
    metadata contexts it selected. initial: base64 of bytes received and not served. unsent: base64 of replies it
    has not taken. stored: both are in the device's memfd of unfinished bytes instead: where they begin, and
    the length of either. skipping: bytes of a refused payload still to come, and base64 of the reply then.
    """

    export: str
    number: int
    structured: bool = False
    extended: bool = False
    contexts: list[tuple[int, str]] = []
    max_payload: int = 32 << 20
    initial: str = ""
    unsent: str = ""
    stored: tuple[int, int, int] | None = None
    skipping: tuple[int, str] | None = None


class LoopNotes(_Value):
    """What `blkloom loop` was told of a device it made, and no table says. partition: its number, if it is
    a partition of the device it stands on.
    """

    sizelimit: Number = 0
    """Bytes; 0: up to the end of the file."""
    partscan: bool = False
    partition: Number = 0
    shared: bool = False
    """Its file is not locked."""


class DeviceState(_Value):
    """All that makes a device, but for its descriptors."""

    name: str
    minor: int
    uuid: str = ""
    active: Loaded | None = None
    inactive: Loaded | None = None
    suspended: bool = False
    event: int = 0
    exports: list[ExportState] = []
    connections: list[ConnectionState] = []
    """Only while it is handed over."""
    autoclear: bool = False
    """It ends when its last user leaves, if there was one."""
    opened: bool = False
    """It has had a user."""
    loop: LoopNotes | None = None
    failed_syncs: list[FailedSync] = []
    io_errors: int = 0
    """Of the workers it has had, too."""
    last_io_error: str = ""
    """As `errors.describe_io_error` says it."""


class OpenedFile(_Value):
    """A file that a device has open. path: as its table has it. name: what leads to it now, with ` (deleted)` behind it
    where nothing does, as the kernel's backing_file. device, inode: stat(2)'s st_dev and st_ino.
    """

    path: str
    name: str
    device: int
    inode: int
    size: int
    """Bytes, now."""


class DeviceInfo(_Value):
    """What `info`, `ls` and `top` show."""

    name: str
    minor: int
    uuid: str = ""
    state: Literal["ACTIVE", "SUSPENDED", "FAILED"] = "ACTIVE"
    reason: str = ""
    """Why it is FAILED, or what it waits for."""
    read_only: bool = False
    live: bool = False
    inactive: bool = False
    open_count: int = 0
    """Clients connected, and devices standing on this one."""
    connections: int = 0
    event: int = 0
    targets: int = 0
    """Segments of the live table."""
    types: list[str] = []
    """Names of the live table's targets, each once."""
    size: int = 0
    """Bytes."""
    worker: int = 0
    """Process id; 0: none."""
    restarts: int = 0
    deferred: bool = False
    exports: list[ExportState] = []
    deps: list[str] = []
    """What it stands on: `blkloom:NAME` and paths."""
    holders: list[str] = []
    """Devices that stand on it."""
    sync_errors: list[str] = []
    """`<path> had failed: <why>` of each file that could not be synced, here or below; flushes fail until it is opened
    anew.
    """
    autoclear: bool = False
    loop: LoopNotes | None = None
    io_errors: int = 0
    """Requests of its clients that storage has failed since the device was made."""
    last_io_error: str = ""
