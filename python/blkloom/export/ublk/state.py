"""State of a ublk block device in addition to that of every export: options of a call, and details in `ExportState`."""

from __future__ import annotations

import hashlib
import os
from typing import Final, Literal, Self

import msgspec

from blkloom.control.rundir import RunDir
from blkloom.control.states import ExportState

OnFailure = Literal["reissue", "fail"]
"""What becomes of requests when the worker dies. reissue: those that it had not answered are sent to the next worker,
so a write may be executed twice. fail: they fail, and only later requests wait for the next worker.
"""
REISSUE: Final = "reissue"


class UblkOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`AddExport.options`."""

    on_failure: OnFailure = REISSUE


class UblkDetails(msgspec.Struct, kw_only=True, omit_defaults=True):
    """`ExportState.details`. tag: see `new_tag`."""

    tag: int
    on_failure: OnFailure = REISSUE
    number: int = -1
    """Of /dev/ublkbN; -1: not made yet."""
    queues: int = 0
    depth: int = 0
    most_bytes: int = 0
    """Of a read or write."""
    quiesces: bool = False
    """The driver can be told to send no more requests to a worker that is about to end."""

    @classmethod
    def of(cls, state: ExportState) -> Self:
        """Raises msgspec.ValidationError."""
        return msgspec.convert(state.details, cls)

    def put(self, state: ExportState) -> None:
        """Into the state."""
        state.details = msgspec.to_builtins(self)


def new_tag(run_dir: RunDir) -> int:
    """A number that tells a device of ours from others: of the run directory, and of the export."""
    return _of_run_dir(run_dir) << 32 | int.from_bytes(os.urandom(4), "big")


def is_of(run_dir: RunDir, tag: int) -> bool:
    """Whether a device with this tag was made for this run directory."""
    return tag >> 32 == _of_run_dir(run_dir)


def _of_run_dir(run_dir: RunDir) -> int:
    path = os.fsencode(os.path.realpath(run_dir.path))
    # 31 bits: the whole tag is a number that JSON readers take.
    return int.from_bytes(hashlib.blake2b(path, digest_size=4, person=b"blkloom-ublk").digest(), "big") >> 1 | 1
