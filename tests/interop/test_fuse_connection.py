"""The kernel's handling of the requests of a FUSE connection when descriptors are closed, and after RESEND.

The FUSE export and its survival depend on each of these (engine/fuse-wire/src/lib.rs lists them).
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from blkloom.export.fuse.mount import answers
from fuse_by_hand import RESENT, SIZE, TIMEOUT, FuseByHand, Op

BLOCK = 4096
ReadInThread = Callable[[], tuple[Future[bytes], Callable[[], None]]]


@pytest.fixture
def fuse(tmp_path: Path) -> Iterator[FuseByHand]:
    with FuseByHand(tmp_path / "node") as fuse:
        yield fuse


def reading(offset: int = 0) -> Callable[[int], bytes]:
    return lambda fd: os.pread(fd, BLOCK, offset)


def test_the_root_of_a_mount_may_be_a_regular_file(fuse: FuseByHand) -> None:
    status = fuse.serve(fuse.start(os.fstat))
    assert (status.st_size, status.st_mode) == (SIZE, 0o100600)


# descriptors


def test_a_request_is_answered_through_the_descriptor_it_was_read_through(fuse: FuseByHand) -> None:
    clone = fuse.clone()
    read = fuse.start(reading())
    request = fuse.take(Op.READ, through=clone)
    with pytest.raises(FileNotFoundError):
        fuse.answer(request, b"1" * BLOCK, through=fuse.device)
    fuse.answer(request, b"2" * BLOCK)
    assert fuse.serve(read) == b"2" * BLOCK


def test_copies_of_a_descriptor_are_one_descriptor(fuse: FuseByHand) -> None:
    clone = fuse.clone()
    copy = os.dup(clone)
    fuse.descriptors.append(copy)
    read = fuse.start(reading())
    request = fuse.take(Op.READ, through=clone)
    fuse.close(clone)
    fuse.answer(request, b"1" * BLOCK, through=copy)
    assert fuse.serve(read) == b"1" * BLOCK


def test_requests_read_through_a_descriptor_fail_when_its_last_copy_closes(fuse: FuseByHand) -> None:
    clone = fuse.clone()
    lost = fuse.start(reading())
    fuse.take(Op.READ, through=clone)
    kept = fuse.start(reading(BLOCK))
    request = fuse.take(Op.READ)
    fuse.close(clone)
    with pytest.raises(ConnectionAbortedError):
        fuse.serve(lost)
    fuse.answer(request, b"1" * BLOCK)
    assert fuse.serve(kept) == b"1" * BLOCK


def test_requests_that_were_not_read_wait_for_the_next_reader(fuse: FuseByHand) -> None:
    first, clone = fuse.device, fuse.clone()
    go_on = threading.Event()
    read = fuse.start(lambda fd: go_on.wait(TIMEOUT) and os.pread(fd, BLOCK, 0))
    fuse.answer_simply(fuse.take(Op.OPEN))
    fuse.close(first)
    go_on.set()
    assert fuse.serve(read, through=clone) == bytes(BLOCK)


def test_a_connection_ends_with_its_last_descriptor_and_its_mount_remains(fuse: FuseByHand) -> None:
    read = fuse.start(reading())
    fuse.take(Op.READ)
    assert answers(fuse.path, timeout=0.1) is None, "GETATTR waits"
    fuse.close(fuse.device)
    with pytest.raises(ConnectionAbortedError):
        read.result(TIMEOUT)
    assert answers(fuse.path) is False
    with pytest.raises(OSError, match="not connected") as caught:
        os.stat(fuse.path)
    assert caught.value.errno == errno.ENOTCONN


# RESEND


def both_read(fuse: FuseByHand, through: int) -> list[Future[bytes]]:
    """Two READs, at 0 and at BLOCK, read through the descriptor in this order and not answered."""
    reads = []
    for offset in (0, BLOCK):
        reads.append(fuse.start(reading(offset)))
        assert fuse.take(Op.READ, through=through).offset == offset
    return reads


def test_resend_brings_unanswered_requests_back_oldest_first_for_any_descriptor(fuse: FuseByHand) -> None:
    clone = fuse.clone()
    reads = both_read(fuse, clone)
    fuse.resend()
    requests = [fuse.next(), fuse.next()]
    assert [(request.opcode, request.offset) for request in requests] == [(Op.READ, 0), (Op.READ, BLOCK)]
    assert all(request.unique & RESENT for request in requests)
    fuse.close(clone)  # they do not belong to it any more
    for request, letter in zip(requests, (b"1", b"2"), strict=True):
        fuse.answer(request, letter * BLOCK)
    assert [fuse.serve(read) for read in reads] == [b"1" * BLOCK, b"2" * BLOCK]


def test_resend_may_be_asked_for_through_any_descriptor(fuse: FuseByHand) -> None:
    clone = fuse.clone()
    read = fuse.start(reading())
    request = fuse.take(Op.READ)
    fuse.resend(through=clone)
    assert fuse.next().unique == request.unique | RESENT
    fuse.resend()
    again = fuse.next(through=clone)
    assert again.unique == request.unique | RESENT, "the bit stays"
    fuse.answer(again, b"1" * BLOCK)
    assert fuse.serve(read) == b"1" * BLOCK


def test_what_was_read_before_resend_can_not_be_answered_after_it(fuse: FuseByHand) -> None:
    read = fuse.start(reading())
    request = fuse.take(Op.READ)
    fuse.resend()
    with pytest.raises(FileNotFoundError):
        fuse.answer(request, b"1" * BLOCK)
    resent = fuse.next()
    with pytest.raises(FileNotFoundError):
        fuse.answer(request, b"1" * BLOCK)
    fuse.answer(resent, b"2" * BLOCK)
    assert fuse.serve(read) == b"2" * BLOCK


def test_resend_after_reading_brings_what_was_just_read_twice(fuse: FuseByHand) -> None:
    read = fuse.start(reading())
    mine = fuse.take(Op.READ)
    fuse.resend()
    assert fuse.next().unique == mine.unique | RESENT
    assert not read.done()


def test_resent_requests_come_before_those_that_were_not_read_yet(fuse: FuseByHand) -> None:
    clone = fuse.clone()
    fuse.start(reading())
    fuse.take(Op.READ, through=clone)
    fuse.start(reading(BLOCK))
    assert not fuse.is_quiet(), "the second one's GETATTR waits"
    fuse.resend()
    first, second = fuse.next(), fuse.next()
    assert (first.opcode, bool(first.unique & RESENT)) == (Op.READ, True)
    assert (second.opcode == Op.READ, bool(second.unique & RESENT)) == (False, False)


def test_the_data_of_a_write_is_sent_again(fuse: FuseByHand) -> None:
    data = os.urandom(SIZE // 2)
    write = fuse.start(lambda fd: os.pwrite(fd, data, BLOCK))
    first = fuse.take(Op.WRITE)
    fuse.resend()
    second = fuse.next()
    assert second.body == first.body
    assert second.body[40:] == data
    fuse.answer_simply(second)
    assert fuse.serve(write) == len(data)


def test_init_is_resent_until_it_is_answered_and_never_after(fuse: FuseByHand) -> None:
    init = fuse.next()
    assert init.opcode == Op.INIT
    fuse.resend()
    again = fuse.next()
    assert (again.opcode, again.unique) == (Op.INIT, init.unique | RESENT)
    fuse.answer_simply(again)
    fuse.resend()
    assert fuse.is_quiet()
    assert fuse.serve(fuse.start(reading())) == bytes(BLOCK)


def test_resend_with_nothing_to_resend_does_nothing(fuse: FuseByHand) -> None:
    assert fuse.serve(fuse.start(reading())) == bytes(BLOCK)
    fuse.resend()
    assert fuse.serve(fuse.start(reading())) == bytes(BLOCK)


# signals


@pytest.fixture
def read_in_thread(fuse: FuseByHand) -> Iterator[ReadInThread]:
    """Starts a read; and what sends its thread a signal, whose handler does nothing."""

    def start() -> tuple[Future[bytes], Callable[[], None]]:
        thread: Future[int] = Future()

        def read(fd: int) -> bytes:
            thread.set_result(threading.get_ident())
            return os.pread(fd, BLOCK, 0)

        return fuse.start(read), lambda: signal.pthread_kill(thread.result(TIMEOUT), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    yield start
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_sends_an_interrupt_that_names_the_request(fuse: FuseByHand, read_in_thread: ReadInThread) -> None:
    read, interrupt = read_in_thread()
    request = fuse.take(Op.READ)
    interrupt()
    told = fuse.next()
    assert (told.opcode, told.unique) == (Op.INTERRUPT, request.unique | 1)
    assert told.interrupted == request.unique
    fuse.answer(request, b"1" * BLOCK)
    assert fuse.serve(read) == b"1" * BLOCK


def test_no_interrupt_comes_after_one_was_answered_with_enosys(fuse: FuseByHand, read_in_thread: ReadInThread) -> None:
    first, interrupt_first = read_in_thread()
    request = fuse.take(Op.READ)
    interrupt_first()
    fuse.answer(fuse.take(Op.INTERRUPT), error=errno.ENOSYS)
    fuse.answer_simply(request)
    fuse.serve(first)
    second, interrupt_second = read_in_thread()
    request = fuse.take(Op.READ)
    interrupt_second()
    assert fuse.is_quiet()
    fuse.answer(request, b"2" * BLOCK)
    assert fuse.serve(second) == b"2" * BLOCK


def test_the_interrupt_of_a_resent_request_names_it_as_it_was_resent(
    fuse: FuseByHand, read_in_thread: ReadInThread
) -> None:
    read, interrupt = read_in_thread()
    fuse.take(Op.READ)
    interrupt()
    assert fuse.next().opcode == Op.INTERRUPT
    fuse.resend()
    request, told = fuse.next(), fuse.next()
    assert (request.opcode, told.opcode) == (Op.READ, Op.INTERRUPT)
    assert told.interrupted == request.unique
    fuse.answer(request, b"1" * BLOCK)
    assert fuse.serve(read) == b"1" * BLOCK
