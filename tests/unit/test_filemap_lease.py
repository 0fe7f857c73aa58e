"""Leases: the holder of a lease is notified of every open, and stops before the other process gets the file."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blkloom.filemap.lease import GivenUp, Leases
from blkloom.filemap.not_mappable import NotMappable

pytestmark = pytest.mark.timeout(60)
WHY = "another process opened or truncated the file"


class Holder:
    """A device with users of one file, and the order in which things happen to them."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(4096))
        self.path = path
        self.leases = Leases(path.parent / "records")
        self.fd = os.open(path, os.O_RDWR)
        self.happened: list[str] = []
        self.given_up = threading.Event()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.happened.append("stopped")
        yield
        self.happened.append("goes on")
        self.given_up.set()

    def user(self, name: str) -> GivenUp:
        def given_up(why: str) -> bool:
            self.happened.append(f"{name}: {why}")
            return False

        return given_up

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    made = Holder(tmp_path / "file")
    try:
        made.leases.take(made.fd, "file", made.stopped, lambda why: False, keep_writers_out=False)(False)
    except NotMappable as error:
        pytest.skip(str(error))
    join_handlers()
    yield made
    made.close()


def handlers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "blkloom-leases"]


def join_handlers() -> None:
    """They end when there is nothing left to keep."""
    for thread in handlers():
        thread.join(5)
        assert not thread.is_alive()


def test_all_users_change_over_in_one_stop_before_the_other_gets_the_file(holder: Holder) -> None:
    for name in "ab":
        holder.leases.take(holder.fd, "file", holder.stopped, holder.user(name), keep_writers_out=False)
    with pytest.raises(BlockingIOError):
        os.open(holder.path, os.O_RDONLY | os.O_NONBLOCK)
    os.close(os.open(holder.path, os.O_RDONLY))
    assert holder.happened == ["stopped", f"a: {WHY}", f"b: {WHY}", "goes on"]


@pytest.mark.parametrize("way", ["read", "write", "truncate"])
def test_another_process_gets_the_file(holder: Holder, way: str) -> None:
    user = holder.user("a")
    holder.leases.take(holder.fd, "file", holder.stopped, user, keep_writers_out=False)
    assert holder.leases.renew(holder.fd, user)
    if way == "truncate":
        os.truncate(holder.path, 100)
    else:
        os.close(os.open(holder.path, os.O_RDONLY if way == "read" else os.O_RDWR))
    assert holder.happened == ["stopped", f"a: {WHY}", "goes on"]
    assert not holder.leases.renew(holder.fd, user)
    another = holder.user("b")
    leave = holder.leases.take(holder.fd, "file", holder.stopped, another, keep_writers_out=False)
    assert holder.leases.renew(holder.fd, another)
    assert not holder.leases.renew(holder.fd, user), "that the file is held again is not for who lost it"
    leave(False)


def test_no_user_joins_while_the_lease_is_broken(holder: Holder) -> None:
    """A user that came too late to be told would go on with blocks that now belong to another file."""
    asked, joined = threading.Event(), threading.Event()

    @contextmanager
    def stopped() -> Iterator[None]:
        asked.set()
        assert joined.wait(30)
        yield

    user = holder.user("a")
    holder.leases.take(holder.fd, "file", stopped, user, keep_writers_out=False)
    opener = threading.Thread(target=lambda: os.close(os.open(holder.path, os.O_RDONLY)))
    opener.start()
    try:
        assert asked.wait(30)
        with pytest.raises(NotMappable, match="another process is opening it"):
            holder.leases.take(holder.fd, "file", stopped, lambda why: False, keep_writers_out=False)
        assert not holder.leases.renew(holder.fd, user)
    finally:
        joined.set()
        opener.join()


def test_a_file_that_cannot_be_let_go_stays_held(holder: Holder, caplog: pytest.LogCaptureFixture) -> None:
    tries: list[str] = []
    tried = threading.Event()

    def given_up(why: str) -> bool:
        tries.append(why)
        if len(tries) == 1:
            tried.set()
            raise OSError(errno.EIO, "cannot stop")
        return False

    holder.leases.take(holder.fd, "file", holder.stopped, given_up, keep_writers_out=False)
    with pytest.raises(BlockingIOError):
        os.open(holder.path, os.O_RDONLY | os.O_NONBLOCK)
    assert tried.wait(30)
    with pytest.raises(BlockingIOError):
        os.open(holder.path, os.O_RDONLY | os.O_NONBLOCK)
    holder.leases.make_way(str(holder.path), here=True)
    assert len(tries) == 2
    os.close(os.open(holder.path, os.O_RDONLY | os.O_NONBLOCK))
    join_handlers()
    assert "cannot stop" in caplog.text


@pytest.mark.parametrize("wrote", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_the_files_time_tells_whether_it_was_written_to(holder: Holder, wrote: bool, asked: bool) -> None:
    os.utime(holder.path, (1, 1))
    leave = holder.leases.take(holder.fd, "file", holder.stopped, lambda why: wrote, keep_writers_out=True)
    if asked:
        os.close(os.open(holder.path, os.O_RDONLY))
    leave(not asked and wrote)
    assert (os.stat(holder.path).st_mtime > 1) == wrote


def test_a_file_that_is_open_elsewhere_is_not_held(holder: Holder) -> None:
    with holder.path.open("rb"), pytest.raises(NotMappable, match="it is open elsewhere"):
        holder.leases.take(holder.fd, "file", holder.stopped, lambda why: False, keep_writers_out=False)
    join_handlers()
    holder.leases.take(holder.fd, "file", holder.stopped, lambda why: False, keep_writers_out=False)(False)


def test_the_one_who_makes_way_need_not_wait_for_the_break_handler(holder: Holder) -> None:
    threads: list[threading.Thread] = []

    def given_up(why: str) -> bool:
        threads.append(threading.current_thread())
        return False

    for path, here in ((str(holder.path), True), ("elsewhere", False), ("/no/such/place", False)):
        holder.leases.take(holder.fd, "file", holder.stopped, given_up, keep_writers_out=False)
        holder.leases.make_way(path, here=here)
        assert threads.pop() is threading.current_thread()
        os.close(os.open(holder.path, os.O_RDWR | os.O_NONBLOCK))
    leave = holder.leases.take(holder.fd, "file", holder.stopped, given_up, keep_writers_out=False)
    holder.leases.make_way(str(holder.path.parent), here=True)
    holder.leases.make_way("/no/such/place", here=True)
    holder.leases.make_way("a null byte: \0", here=True)
    assert not threads
    leave(False)


def test_the_programs_own_signals_are_left_alone(holder: Holder) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGIO, signal.SIGRTMIN + 5)}
    leave = holder.leases.take(holder.fd, "file", holder.stopped, lambda why: False, keep_writers_out=False)
    os.close(os.open(holder.path, os.O_RDONLY))
    leave(False)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_the_break_handler_ends_with_the_last_lease(holder: Holder) -> None:
    leave = holder.leases.take(holder.fd, "file", holder.stopped, lambda why: False, keep_writers_out=False)
    (handler,) = handlers()
    leave(False)
    handler.join(30)
    assert not handler.is_alive()
