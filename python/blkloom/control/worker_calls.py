"""Calls of the supervisor to a worker, as types; see `messages`. `minor` names the device."""

from __future__ import annotations

import msgspec

from blkloom.control.states import DeviceState, ExportState, Label, Loaded


class _Call(msgspec.Struct, tag_field="verb", kw_only=True, omit_defaults=True):
    pass


class Hold(_Call, tag="hold"):
    """Start these devices, lower ones first, from their states and the descriptors of this message (in the order of
    `labels`): new devices, devices of a worker that has died, or devices that another worker hands over. more: the
    next `Hold` has further descriptors for the same devices. → None.
    """

    devices: list[DeviceState] = []
    labels: list[Label] = []
    more: bool = False
    fds: int = 0


class WorkerLoad(_Call, tag="load"):
    """→ TableLoaded. Files are asked for with `OpenFile`. Raises as `Device.load`; then nothing changed."""

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
    """→ Resumed. Files are asked for with `OpenFile`. swap: False: the inactive table stays."""

    minor: int
    flush: bool = True
    timeout: float | None = None
    swap: bool = True


class Release(_Call, tag="release"):
    """Drains, flushes and closes a device, with its exports and files. fail: do not wait for requests."""

    minor: int
    fail: bool = False


class WorkerRename(_Call, tag="rename"):
    """Sets name and uuid."""

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
    """Serve an export. keys: of the descriptors of its endpoint, which come with the message in this order. again: it
    is served already, in another state: that ends first, with its connections.
    """

    minor: int
    export: ExportState
    keys: tuple[str, ...] = ("",)
    again: bool = False
    fds: int = 1


class WorkerReloadTls(_Call, tag="reload-tls"):
    """Reads the TLS credentials of a device's exports again."""

    minor: int


class Unserve(_Call, tag="unserve"):
    """Ends an export and its connections."""

    minor: int
    id: str


class Describe(_Call, tag="describe"):
    """For a new supervisor: → Description, after `Keep`s with all descriptors of the worker."""


class Freeze(_Call, tag="freeze"):
    """Begin a hand-over: accept no clients, detach the connected ones from the engine, then suspend the devices (drain
    and flush). Nothing changes after that. → Frozen; `Keep`s before it have the descriptors of the connections.
    """

    timeout: float | None = None


class Thaw(_Call, tag="thaw"):
    """The hand-over has failed: continue as before `Freeze`."""


class Leave(_Call, tag="leave"):
    """End the process. flush: False after a hand-over: flush, unlock and unlink nothing, because another process owns
    everything.
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
    | WorkerReloadTls
    | Describe
    | Freeze
    | Thaw
    | Leave
)
