"""Supervisor and workers are killed at critical moments: in a hand-over, around an upgrade, both at once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from blkloom.control.messages import Describe, Freeze, Reply, Thaw, WorkerRequest
from blkloom.control.states import DeviceState
from conformance.nbd_client import WRITE, NbdClient
from conformance.supervisor_by_hand import Store, Worker, zygote

from .conftest import Life, a_life, info, read

RAM = "0 2048 ram"
Connect = Callable[[str], NbdClient]


@pytest.fixture
def take_over(life: Life) -> Iterator[Callable[[], tuple[Worker, Store]]]:
    """`take_over()`: the only worker, spoken to by hand, once the supervisor is dead."""
    with ExitStack() as stack:

        def taken() -> tuple[Worker, Store]:
            life.kill()
            (path,) = (life.run_dir / "workers").iterdir()
            connected = socket.socket(socket.AF_UNIX)
            connected.connect(str(path))
            store = Store()
            worker = Worker(path.stem, connected, store)
            stack.callback(store.close)
            stack.callback(worker.close)
            return worker, store

        yield taken


def write(client: NbdClient, letter: bytes) -> None:
    assert client.ask(WRITE, 0, 512, payload=letter * 512).error == 0


def test_a_device_frozen_for_a_hand_over_that_fails_continues_with_its_clients(
    life: Life, connect: Connect, take_over: Callable[[], tuple[Worker, Store]]
) -> None:
    with life.client() as client:
        client.create("disk", table=RAM)
    nbd = connect("disk")
    write(nbd, b"a")
    worker, _ = take_over()
    worker.call(Freeze(timeout=30))
    worker.close()
    life.start()
    assert read(nbd) == b"a" * 512
    assert read(connect("disk")) == b"a" * 512


def test_a_frozen_device_that_was_suspended_stays_suspended(
    life: Life, take_over: Callable[[], tuple[Worker, Store]]
) -> None:
    with life.client() as client:
        client.create("disk", table=RAM)
        client.suspend("disk")
    worker, _ = take_over()
    worker.call(Freeze(timeout=30))
    worker.close()
    life.start()
    with life.client() as client:
        assert info(client, "disk").state == "SUSPENDED"
        client.resume("disk")
        assert info(client, "disk").state == "ACTIVE"


def test_a_thaw_that_comes_while_the_device_freezes_is_not_overtaken(
    life: Life, connect: Connect, take_over: Callable[[], tuple[Worker, Store]]
) -> None:
    with life.client() as client:
        client.create("disk", table=RAM)
    nbd = connect("disk")
    write(nbd, b"a")
    worker, _ = take_over()
    for call in (Freeze(timeout=30), Thaw()):
        worker.channel.send(WorkerRequest(id=next(worker.numbers), call=call))
    answered = []
    while len(answered) < 2:
        message, received = worker.channel.receive(60)
        if isinstance(message, Reply):
            answered.append(message.id)
        else:
            worker.take(message, received)
    assert answered == [1, 2]
    worker.close()
    assert read(nbd) == b"a" * 512
    life.start()


def test_a_successor_that_has_the_devices_keeps_them_and_their_clients(
    life: Life,
    connect: Connect,
    take_over: Callable[[], tuple[Worker, Store]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BLKLOOM_TEST_RUN_DIR", str(life.run_dir))
    with life.client() as client:
        client.create("disk", table=RAM, uuid="u")
        before = info(client, "disk")
    nbd = connect("disk")
    write(nbd, b"a")
    worker, store = take_over()
    worker.call(Describe())  # for what it has
    frozen = msgspec.convert(worker.call(Freeze(timeout=30))["devices"], list[DeviceState])
    with zygote(life.run_dir) as forking:
        successor = forking.fork("successor", store)
        successor.hold(frozen)
        pid = successor.pid
        successor.close()
    worker.close()
    life.start()
    with life.client() as client:
        after = info(client, "disk")
        assert (after.worker, after.uuid, after.state) == (pid, "u", "ACTIVE")
        assert before.worker not in life.processes()
        assert read(nbd) == b"a" * 512
        client.stop(force=True)


def test_memory_without_a_worker_outlives_an_upgrade() -> None:
    with a_life("--max-deaths=0") as life:
        with life.client() as client:
            client.create("disk", table=RAM)
            nbd = NbdClient.unix(life.socket("disk"))
            write(nbd, b"a")
            nbd.close()
            event = info(client, "disk").event
            os.kill(info(client, "disk").worker, 9)
            while info(client, "disk").state != "FAILED":
                event = client.wait("disk", event)
            client.upgrade()
        with life.client() as client:
            assert "killed" in info(client, "disk").reason
            client.resume("disk")
            nbd = NbdClient.unix(life.socket("disk"))
            assert read(nbd) == b"a" * 512
            nbd.close()


def test_a_suspended_device_that_failed_is_live_once_it_is_resumed(file: Path) -> None:
    with a_life("--max-deaths=0") as life, life.client() as client:
        client.create("disk", table=f"0 16 loop {file}")
        client.suspend("disk")
        event = info(client, "disk").event
        os.kill(info(client, "disk").worker, 9)
        while info(client, "disk").state != "FAILED":
            event = client.wait("disk", event)
        client.resume("disk")
        assert info(client, "disk").state == "ACTIVE"
        nbd = NbdClient.unix(life.socket("disk"))
        assert read(nbd) == b"f" * 512
        nbd.close()


def test_lost_memory_of_an_unused_table_does_not_fail_the_device(life: Life, connect: Connect, file: Path) -> None:
    with life.client() as client:
        client.create("disk", table=f"0 16 loop {file}")
        client.load("disk", "0 16 ram")
        worker = info(client, "disk").worker
    life.kill()
    os.kill(worker, 9)
    life.start()
    with life.client() as client:
        found = info(client, "disk")
        assert (found.state, found.inactive) == ("ACTIVE", False)
    assert read(connect("disk")) == b"f" * 512


def test_memory_that_was_used_is_missed_and_the_device_can_be_removed(life: Life) -> None:
    with life.client() as client:
        client.create("disk", table=RAM)
        worker = info(client, "disk").worker
    life.kill()
    os.kill(worker, 9)
    life.start()
    with life.client() as client:
        found = info(client, "disk")
        assert found.state == "FAILED"
        assert "memory of disk" in found.reason
        client.remove("disk")
        assert client.info() == []


def test_when_a_stop_is_answered_the_next_supervisor_can_begin(life: Life) -> None:
    with life.client() as client:
        client.create("disk", table=RAM)
        client.stop()
    life.process.wait(60)
    life.start()
    with life.client() as client:
        assert client.info() == []
