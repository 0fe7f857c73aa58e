"""Dispatch of faults: calls the handler of the target for a fault, and passes its result to the engine.

Runs on the mapper's thread. Exceptions of a handler, and errors about invalid results, go to the caller, which turns
them into an errno.
"""

from __future__ import annotations

import errno
from itertools import islice
from types import CoroutineType
from typing import Any, Final

from blkloom import _engine
from blkloom.device.compose import Owner
from blkloom.errors import FaultError
from blkloom.targets.loaded import RETRY
from blkloom.units import Bytes

CHANGES: Final = frozenset({"write", "discard", "write_zeroes"})
"""Operations that a read-only device refuses, and that are not started after their time limit."""
_ALLOCATION: Final = "base:allocation"
_MOST_RUNS: Final = 16384
"""The engine's limit for one request."""


def call_handler(owner: Owner, fault: _engine.Fault) -> Any:
    """Calls the target's handler; returns an answer, or a coroutine. Raises the exception of the handler, and
    FaultError for an operation that the device refuses.
    """
    target, offset, length = owner.target, Bytes(fault.offset - owner.start), Bytes(fault.length)
    operation = fault.operation
    if owner.read_only and operation in CHANGES:  # the device guarantees this for every target
        raise FaultError(errno.EROFS, "the device is read-only")
    match operation:
        case "read":
            return target.read(offset, length)
        case "write" if fault.no_space:
            return target.on_no_space(offset, length, fault.no_space)
        case "write":
            return target.write_lazily(offset, length, fault.payload, fua=fault.fua)
        case "discard":
            return target.discard(offset, length)
        case "write_zeroes":
            return target.write_zeroes(offset, length, may_unmap=fault.may_unmap, fast=fault.fast)
        case "extents" if fault.context == _ALLOCATION:
            return target.extents(offset, length)
        case "extents":
            return target.block_status(fault.context, offset, length)
        case "flush":
            return target.flush()
        case other:
            raise FaultError(errno.EOPNOTSUPP, f"no handler for {other}")


def give_answer(owner: Owner, fault: _engine.Fault, answer: Any) -> None:
    """Answers the fault with the result of the handler. Raises ValueError or TypeError for an invalid result."""
    if answer is RETRY:
        fault.retry()
        return
    operation = fault.operation
    if operation == "read":
        size = memoryview(answer).nbytes
        if size != fault.length:
            name = owner.target.name
            raise ValueError(f"read handler of target {name} returned {size} bytes, not {fault.length}")
        fault.done(answer)
    elif operation == "extents":
        runs = list(islice(answer, 1 if fault.one else _MOST_RUNS))
        if not runs:
            handler = "extents" if fault.context == _ALLOCATION else "block_status"
            raise ValueError(f"{handler} handler of target {owner.target.name} says nothing")
        fault.extents(runs)
    else:
        check_no_coroutine(owner, answer)
        fault.done()


def check_no_coroutine(owner: Owner, answer: object) -> None:
    """Raises TypeError if a plain handler has returned a coroutine."""
    if type(answer) is CoroutineType:
        answer.close()
        raise TypeError(f"a handler of target {owner.target.name} returned a coroutine; define it with 'async def'")
