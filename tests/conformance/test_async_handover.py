"""Hand-over of devices to another worker while coroutines of handlers and of backends are unfinished."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkloom.control.messages import Freeze, Thaw, WorkerLoad, WorkerResume, WorkerSuspend
from blkloom.control.states import Loaded
from blkloom.errors import DrainError

from .asking_target import Asked, Question, asking_target
from .nbd_client import FLUSH, READ, WRITE, NbdClient
from .supervisor_by_hand import Store, Worker, Zygote
from .test_worker_handover import move


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    with asking_target(tmp_path, monkeypatch) as asked:
        yield asked


@pytest.fixture
def nursery(asked: Asked, nursery: Zygote) -> Zygote:
    """Started when its targets could be found."""
    return nursery


@pytest.fixture(params=["asking", "asking-backend"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def worker(nursery: Zygote, store: Store, asked: Asked, tmp_path: Path, kind: str) -> Worker:
    worker = nursery.fork("w0", store)
    worker.create(1, "below", f"0 64 {kind} {asked.path}", load=1)
    worker.create(2, "d", "0 64 linear blkloom:below 0", load=2)
    worker.serve(2, tmp_path / "s")
    return worker


@pytest.fixture
def client(worker: Worker, tmp_path: Path) -> Iterator[NbdClient]:
    client = NbdClient.unix(tmp_path / "s")
    client.socket.settimeout(60)
    yield client
    client.close()


def test_a_read_that_is_unfinished_is_cancelled_and_asked_again_by_the_next_worker(
    nursery: Zygote, worker: Worker, client: NbdClient, asked: Asked
) -> None:
    cookies = [client.send(READ, number * 512, 512) for number in range(8)]
    before = [asked.next() for _ in cookies]
    assert {question.operation for question in before} == {"read"}
    new = move(nursery, [worker], "w1")
    assert all(question.is_cancelled() for question in before)
    for _ in cookies:
        question = asked.next()
        assert question.operation == "read"
        assert question.pid == new.pid
        question.answer()
    replies = dict(client.receive() for _ in cookies)
    for cookie in cookies:
        assert (replies[cookie].error, replies[cookie].data) == (0, b"a" * 512)
    new.kill()


def freeze_in_vain(worker: Worker, read: Question) -> None:
    """Freezes that a write holds up, until one has had enough time to cancel the read."""
    for seconds in (0.2, 2, 20):
        with pytest.raises(DrainError):
            worker.call(Freeze(timeout=seconds))
        cancelled = read.is_cancelled(within=seconds)
        worker.call(Thaw())
        if cancelled:
            return
    pytest.fail("no freeze cancels the read")


def test_a_hand_over_waits_for_a_write_and_it_is_made_once(
    nursery: Zygote, worker: Worker, client: NbdClient, asked: Asked
) -> None:
    write, read = client.send(WRITE, 0, payload=b"w" * 512), client.send(READ, 512, 512)
    questions = {question.operation: question for question in (asked.next(), asked.next())}
    freeze_in_vain(worker, questions["read"])
    questions["write"].answer()
    again = asked.next()
    assert (again.operation, again.pid) == ("read", worker.pid), "it goes on where it was"
    again.answer()
    replies = dict(client.receive() for _ in range(2))
    assert replies[write].error == 0
    assert (replies[read].error, replies[read].data) == (0, b"a" * 512)
    new = move(nursery, [worker], "w1")
    assert not client.ask(FLUSH).error
    assert asked.nothing_waits(), "nothing else was asked"
    new.kill()


@pytest.mark.parametrize("minor", [1, 2])
def test_a_read_waits_through_a_suspend_of_its_device_or_of_one_below(
    worker: Worker, client: NbdClient, asked: Asked, minor: int
) -> None:
    client.send(READ, 0, 512)
    before = asked.next()
    worker.call(WorkerSuspend(minor=minor))
    assert before.is_cancelled()
    assert asked.nothing_waits()
    worker.call(WorkerResume(minor=minor))
    asked.next().answer()
    assert client.receive()[1].data == b"a" * 512
    worker.kill()


def test_a_client_that_leaves_does_not_disturb_the_others(
    worker: Worker, client: NbdClient, asked: Asked, tmp_path: Path, kind: str
) -> None:
    leaving = NbdClient.unix(tmp_path / "s")
    leaving.send(READ, 0, 512)
    first = asked.next()
    client.send(READ, 512, 512)
    second = asked.next()
    leaving.socket.shutdown(socket.SHUT_RDWR)
    leaving.close()
    second.answer()
    assert client.receive()[1].data == b"a" * 512
    if kind == "asking-backend":
        assert first.is_cancelled(), "its request has ended"
    else:
        first.answer()
    worker.kill()


def test_what_waits_for_an_instant_waits_on_with_the_next_worker(
    nursery: Zygote, store: Store, tmp_path: Path, asked: Asked
) -> None:
    worker = nursery.fork("w0", store)
    worker.create(1, "d", "0 64 never", load=1)
    worker.serve(1, tmp_path / "s")
    client = NbdClient.unix(tmp_path / "s")
    client.socket.settimeout(60)
    cookies = {client.send(READ, 0, 512), client.send(WRITE, 512, payload=b"w" * 512)}
    new = move(nursery, [worker], "w1")
    new.call(WorkerLoad(minor=1, loaded=Loaded(load=2, table="0 64 zero")))
    new.call(WorkerResume(minor=1))
    replies = dict(client.receive() for _ in cookies)
    assert {(reply.error, reply.data) for reply in replies.values()} == {(0, bytes(512)), (0, b"")}
    assert set(replies) == cookies
    client.close()
    new.kill()
