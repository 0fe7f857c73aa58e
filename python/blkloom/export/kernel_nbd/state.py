"""State of a kernel NBD device in addition to that of every export: options of a call, and details in `ExportState`."""

from __future__ import annotations

import hashlib
import os
from typing import Annotated, Final, Self

import msgspec

from blkloom.control.rundir import RunDir
from blkloom.control.states import ExportState

MOST_CONNECTIONS: Final = 8
_PREFIX: Final = "blkloom"


def usual_connections() -> int:
    """One for each CPU of this process, at most `MOST_CONNECTIONS`."""
    return min(len(os.sched_getaffinity(0)), MOST_CONNECTIONS)


class KernelNbdOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`AddExport.options`. timeout: see `timeouts`. connections: 0 for `usual_connections`."""

    timeout: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 30
    connections: Annotated[int, msgspec.Meta(ge=0, le=MOST_CONNECTIONS)] = 0


class KernelNbdDetails(msgspec.Struct, kw_only=True, omit_defaults=True):
    """`ExportState.details`. tag: see `new_tag`."""

    tag: str
    timeout: int
    connections: int
    number: int = -1
    """Of /dev/nbdN; -1: not made yet."""
    paused: float = 0.0
    """When a worker stopped serving for a hand-over; CLOCK_MONOTONIC."""
    oldest: float = 0.0
    """All requests that waited then began after this time."""

    @classmethod
    def of(cls, state: ExportState) -> Self:
        """Raises msgspec.ValidationError."""
        return msgspec.convert(state.details, cls)

    def put(self, state: ExportState) -> None:
        """Into the state."""
        state.details = msgspec.to_builtins(self)


def new_tag(run_dir: RunDir) -> str:
    """A text that tells a device of ours from others: of the run directory, and of the export."""
    return f"{_of_run_dir(run_dir)}-{os.urandom(6).hex()}"


def another_tag(tag: str) -> str:
    """Another one for the same run directory."""
    return f"{tag.rpartition('-')[0]}-{os.urandom(6).hex()}"


def is_of(run_dir: RunDir, tag: str) -> bool:
    """Whether a device with this tag was made for this run directory."""
    return tag.rpartition("-")[0] == _of_run_dir(run_dir)


def _of_run_dir(run_dir: RunDir) -> str:
    path = os.fsencode(os.path.realpath(run_dir.path))
    return f"{_PREFIX}-{hashlib.blake2b(path, digest_size=8, person=b'blkloom-nbd').hexdigest()}"
