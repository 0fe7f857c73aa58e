"""The redo log of an image: what counts, in which order it is written, and what becomes of the memory."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest

from blkloom.image.redo_log import RedoLog, Step


class Storage:
    """Notes calls, and fails at the one with number `fails`."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.fails = -1

    def write(self, offset: int, data: bytes) -> None:
        self._note(("write", offset, data))

    def sync(self) -> None:
        self._note(("sync",))

    def sync_data(self) -> None:
        self._note(("sync data",))

    def _note(self, call: tuple[object, ...]) -> None:
        if len(self.calls) == self.fails:
            raise OSError(5, "fails")
        self.calls.append(call)


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("test")
    yield fd
    os.close(fd)


def replayed(memory: int) -> list[tuple[object, ...]]:
    """The calls of a next process."""
    storage, log = Storage(), RedoLog(os.dup(memory))
    log.replay(storage, storage.sync_data)  # type: ignore[arg-type]
    assert log.is_empty
    log.close()
    return storage.calls


def test_records_are_written_by_step_with_a_sync_after_each(memory: int) -> None:
    log = RedoLog(os.dup(memory))
    log.add(Step.L1, 100, b"l1")
    log.add(Step.L2, 200, b"old")
    log.add(Step.REFCOUNTS, 300, b"count")
    log.add(Step.L2, 200, b"new")
    log.commit()
    log.close()
    assert replayed(memory) == [
        ("sync data",),
        ("write", 300, b"count"),
        ("sync",),
        ("write", 200, b"old"),
        ("write", 200, b"new"),
        ("sync",),
        ("write", 100, b"l1"),
        ("sync",),
    ]


def test_data_is_durable_before_tables_without_any_refcounts(memory: int) -> None:
    log = RedoLog(os.dup(memory))
    log.add(Step.L2, 0, b"entry")
    log.commit()
    log.close()
    assert replayed(memory) == [("sync data",), ("sync",), ("write", 0, b"entry"), ("sync",)]


def test_what_was_not_committed_does_not_count(memory: int) -> None:
    log = RedoLog(os.dup(memory))
    log.add(Step.L2, 0, b"one")
    log.commit()
    log.add(Step.L2, 8, b"two")
    log.close()
    assert ("write", 8, b"two") not in replayed(memory)


def test_a_cleared_log_is_empty_and_goes_on(memory: int) -> None:
    log = RedoLog(os.dup(memory))
    log.add(Step.L2, 0, bytes(9 << 20))
    log.commit()
    assert log.is_large
    log.clear()
    assert log.is_empty
    assert not log.is_large
    assert os.fstat(memory).st_size < 1 << 20, "its memory is free again"
    log.add(Step.L1, 8, b"after")
    log.commit()
    log.close()
    assert ("write", 8, b"after") in replayed(memory)


def test_a_replay_that_fails_is_done_again(memory: int) -> None:
    log = RedoLog(os.dup(memory))
    log.add(Step.REFCOUNTS, 0, b"count")
    log.add(Step.L2, 8, b"entry")
    log.commit()
    storage = Storage()
    storage.fails = 3
    with pytest.raises(OSError, match="fails"):
        log.replay(storage, storage.sync_data)  # type: ignore[arg-type]
    assert not log.is_empty
    log.close()
    assert [call for call in replayed(memory) if call[0] == "write"] == [("write", 0, b"count"), ("write", 8, b"entry")]


PTRACE_SINGLESTEP = 9
"""Source: linux/ptrace.h. 0, PTRACE_TRACEME, is in the traced process."""

TRACED = """
import ctypes, os, signal, sys
from blkloom.image.redo_log import RedoLog, Step

log = RedoLog(int(sys.argv[1]))
log.add(Step.L2, 8, b"one")
log.commit()
if ctypes.CDLL(None, use_errno=True).ptrace(0, 0, None, None):
    sys.exit(os.strerror(ctypes.get_errno()))
os.kill(os.getpid(), signal.SIGSTOP)
log.add(Step.L2, 16, b"two")
log.commit()
log.clear()
log.add(Step.L1, 24, b"three")
log.commit()
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_death_between_any_two_instructions_leaves_all_changes_of_a_commit_or_none(memory: int) -> None:
    """Runs the process by single instructions."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    with subprocess.Popen(
        [sys.executable, "-c", TRACED, str(memory)], pass_fds=[memory], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                assert process.stderr is not None
                pytest.skip(f"ptrace is not permitted here: {process.stderr.read().strip()}")
            found = [committed(memory)]
            while True:
                assert ptrace(PTRACE_SINGLESTEP, process.pid, None, None) == 0, os.strerror(ctypes.get_errno())
                _, status = os.waitpid(process.pid, 0)
                assert os.WIFSTOPPED(status), f"ended with status {status}"
                if os.WSTOPSIG(status) == signal.SIGSTOP:
                    break
                if (now := committed(memory)) != found[-1]:
                    found.append(now)
        finally:
            process.kill()
    one, two, three = (
        struct.pack("=QII", offset, len(data), step) + data
        for offset, data, step in ((8, b"one", Step.L2), (16, b"two", Step.L2), (24, b"three", Step.L1))
    )
    assert found == [one, one + two, b"", three]


def committed(memory: int) -> bytes:
    """The records that count."""
    data = os.pread(memory, 4096, 0)
    return data[8 : 8 + int.from_bytes(data[:8], sys.byteorder)]
