"""The redo log of an image: what counts, in which order it is written, and what becomes of the memory."""

from __future__ import annotations

import os
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
