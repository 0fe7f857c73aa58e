"""Options and state that only FUSE exports have: options of a call, and details in `ExportState`."""

from __future__ import annotations

from typing import Self

import msgspec

from blkloom.control.states import ExportState

Identity = tuple[int, int]
"""st_dev and st_ino of a file; see stat(2)."""


class FuseOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`AddExport.options`. None: as of the process that mounts."""

    user: int | None = None
    group: int | None = None
    mode: int | None = None
    """Permission bits."""
    allow_other: bool = False
    """Other users than the one who mounts may use the file, as owner and mode allow."""
    uring: bool = False
    """Requests come over io_uring."""


class FuseDetails(msgspec.Struct, kw_only=True, omit_defaults=True):
    """`ExportState.details`. owner: initial (user, group, permission bits)."""

    owner: tuple[int, int, int]
    allow_other: bool = False
    uring: bool = False
    """Requests come over io_uring: no other worker can continue the connection."""
    mounted: str = ""
    """Path of the mount; `ExportState.path` is the same, or a link to it."""
    number: str = ""
    """"major:minor" of the mounted file system."""
    made: Identity | None = None
    """The file that was made to mount on."""
    negotiated: str = ""
    """State of the connection: hexadecimal of `_engine.fuse_init`."""
    survives: bool = False
    """Whether requests wait for another worker when a worker is killed; otherwise they fail."""

    @classmethod
    def of(cls, state: ExportState) -> Self:
        """Reads the details of a state. Raises msgspec.ValidationError."""
        return msgspec.convert(state.details, cls)

    def put(self, state: ExportState) -> None:
        """Writes the details into a state."""
        state.details = msgspec.to_builtins(self)
