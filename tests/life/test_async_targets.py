"""A target with coroutines in a supervised worker: upgrade, suspend and reload while handlers are unfinished."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from blkloom.control.client import Client
from conformance.asking_target import Asked, asking_target
from conformance.nbd_client import READ, WRITE, NbdClient

from .conftest import Life, a_life, is_answered, read

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    with asking_target(tmp_path, monkeypatch) as asked:
        yield asked


@pytest.fixture
def life(asked: Asked) -> Iterator[Life]:
    with a_life() as life:
        yield life


@pytest.fixture
def nbd(client: Client, asked: Asked, connect: Callable[[str], NbdClient]) -> NbdClient:
    client.create("disk", table=f"0 64 asking {asked.path}")
    return connect("disk")


def test_reads_that_are_unfinished_outlive_an_upgrade(client: Client, nbd: NbdClient, asked: Asked) -> None:
    cookies = {nbd.send(READ, number * 512, 512) for number in range(16)}
    before = [asked.next() for _ in cookies]
    client.upgrade()
    assert all(question.is_cancelled() for question in before)
    after = [asked.next() for _ in cookies]
    assert {question.pid for question in after}.isdisjoint(question.pid for question in before)
    for question in after:
        question.answer()
    replies = dict(nbd.receive() for _ in cookies)
    assert set(replies) == cookies
    assert {(reply.error, reply.data) for reply in replies.values()} == {(0, b"a" * 512)}


def test_an_upgrade_waits_for_a_write(nbd: NbdClient, asked: Asked, beside: Callable[..., Future[Any]]) -> None:
    nbd.send(WRITE, 0, payload=b"w" * 512)
    nbd.send(READ, 512, 512)
    questions = {question.operation: question for question in (asked.next(), asked.next())}
    upgrade = beside("upgrade")
    assert questions["read"].is_cancelled()
    assert not upgrade.done()
    questions["write"].answer()
    upgrade.result(60)
    again = asked.next()
    assert (again.operation, again.pid != questions["write"].pid) == ("read", True)
    again.answer()
    assert [nbd.receive()[1].error for _ in range(2)] == [0, 0]
    assert asked.nothing_waits(), "the write was made once"


def test_a_read_waits_while_its_device_is_suspended(client: Client, nbd: NbdClient, asked: Asked) -> None:
    nbd.send(READ, 0, 512)
    before = asked.next()
    client.suspend("disk")
    assert before.is_cancelled()
    assert not is_answered(nbd)
    client.resume("disk")
    asked.next().answer()
    assert nbd.receive()[1].data == b"a" * 512


def test_a_read_is_answered_by_the_table_that_was_swapped_in(client: Client, nbd: NbdClient, asked: Asked) -> None:
    nbd.send(READ, 0, 512)
    before = asked.next()
    client.load("disk", "0 64 zero")
    client.resume("disk")
    assert before.is_cancelled()
    assert nbd.receive()[1].data == bytes(512)
    assert read(nbd) == bytes(512)
    assert asked.nothing_waits()
