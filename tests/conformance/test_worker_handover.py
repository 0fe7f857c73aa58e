"""Hand-over of devices between workers while clients use them: no data is lost, no client is disconnected."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from blkloom.control.messages import (
    Describe,
    Freeze,
    Hold,
    Leave,
    Release,
    Thaw,
    WorkerLoad,
    WorkerResume,
    WorkerStats,
    WorkerSuspend,
)
from blkloom.control.states import DeviceState, Loaded
from blkloom.errors import BusyError, DrainError, UsageError
from blkloom.targets.claim import Claim

from .nbd_client import BLOCK_STATUS, FLUSH, READ, WRITE, NbdClient, Style
from .supervisor_by_hand import Store, Worker, Zygote, zygote

SIZE = 1 << 20
SECTORS = SIZE // 512
BLOCK = 4096

STUCK = """
import threading
from blkloom import Extent, LoadedTarget, TargetSpec

class Stuck(TargetSpec):
    name = "stuck"

    def load(self, context, start, length):
        return LoadedStuck(self, [(0, length, Extent.fault())])

class LoadedStuck(LoadedTarget):
    def read(self, offset, length):
        threading.Event().wait()
        return bytes(length)
"""


def move(nursery: Zygote, olds: Sequence[Worker], id: str) -> Worker:
    """All devices of `olds` into one new worker."""
    new = nursery.fork(id, olds[0].store)
    devices = [
        device for old in olds for device in msgspec.convert(old.call(Freeze(timeout=20))["devices"], list[DeviceState])
    ]
    new.hold(devices)
    for old in olds:
        old.store.drop([label for label in old.store.kept if not label.load and label.role in ("connection", "memory")])
        old.call(Leave(flush=False))
        old.wait()
        assert nursery.status(old.id) == 0
    return new


class Verifier:
    """Writes blocks of its part of the device and reads them back, many at a time, until told to stop."""

    def __init__(self, path: Path, start: int, blocks: int, style: Style, seed: int) -> None:
        self._client = NbdClient.unix(path, style=style)
        self._start = start
        self._random = random.Random(seed)
        self._model = {number: bytes(BLOCK) for number in range(blocks)}
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self.rounds = 0
        self.progress = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._round()
                self.rounds += 1
                self.progress.release()
        except BaseException as error:
            self._error = error
            self.progress.release(1000)

    def _round(self) -> None:
        chosen = self._random.sample(sorted(self._model), 8)
        sent: dict[int, bytes | None] = {}
        for number in chosen:
            if self._random.random() < 0.5:
                data = self._random.randbytes(BLOCK)
                self._model[number] = data
                sent[self._client.send(WRITE, self._start + number * BLOCK, payload=data)] = None
            else:
                sent[self._client.send(READ, self._start + number * BLOCK, BLOCK)] = self._model[number]
        while sent:
            cookie, reply = self._client.receive()
            expected = sent.pop(cookie)
            assert reply.error == 0
            assert expected is None or reply.data == expected

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        if self._error:
            raise self._error
        for number, data in self._model.items():
            assert self._client.ask(READ, self._start + number * BLOCK, BLOCK).data == data
        assert self._client.ask(FLUSH).error == 0
        self._client.close()


def test_clients_of_every_style_do_not_notice_that_worker_follows_worker(
    nursery: Zygote, store: Store, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(SIZE))
    worker = nursery.fork("w0", store)
    worker.create(1, "ram", f"0 {SECTORS} ram", load=1)
    worker.create(2, "file", f"0 {SECTORS} loop {disk}", load=2)
    paths = [tmp_path / "ram.sock", tmp_path / "file.sock"]
    for minor, path in enumerate(paths, 1):
        worker.serve(minor, path)
    share = SIZE // 3
    verifiers = [
        Verifier(path, share // BLOCK * BLOCK * part, share // BLOCK, style, seed=part)
        for path in paths
        for part, style in enumerate(Style)
    ]
    try:
        for number in range(1, 9):
            for verifier in verifiers:
                verifier.progress.acquire()
            worker = move(nursery, [worker], f"w{number}")
    finally:
        for verifier in verifiers:
            verifier.stop()
    assert all(verifier.rounds for verifier in verifiers)
    (first, second) = msgspec.convert(worker.call(Describe())["devices"], list[DeviceState])
    assert (first.connections, second.connections) == ([], [])
    worker.kill()


@pytest.mark.parametrize("style", list(Style))
def test_what_a_client_has_not_taken_of_its_replies_moves_along_and_it_is_not_waited_for(
    nursery: Zygote, store: Store, tmp_path: Path, style: Style
) -> None:
    worker = nursery.fork("w0", store)
    worker.create(1, "ram", "0 65536 ram", load=1)
    worker.serve(1, tmp_path / "s")
    other, slow = (NbdClient.unix(tmp_path / "s", style=style) for _ in range(2))
    data = random.Random(13).randbytes(8 << 20)
    assert other.ask(WRITE, payload=data).error == 0
    asked = [slow.send(READ, 0, len(data)) for _ in range(4)]
    while worker.call(WorkerStats())["1"]["device"]["read"]["count"] == 0:
        pass
    for number in range(2):
        worker.call(Freeze())  # and one that is taken back loses nothing either
        worker.call(Thaw())
        assert other.ask(READ, 0, 512).data == data[:512]
        worker = move(nursery, [worker], f"w{number + 1}")
        assert other.ask(READ, 0, 512).data == data[:512]
    while asked:
        cookie, reply = slow.receive()
        asked.remove(cookie)
        assert reply.data == data
    for client in (other, slow):
        client.close()
    worker.kill()


def test_half_a_refused_payload_holds_up_no_hand_over_and_is_refused_by_the_next_worker(
    nursery: Zygote, store: Store, tmp_path: Path
) -> None:
    worker = nursery.fork("w0", store)
    worker.create(1, "ram", f"0 {SECTORS} ram", load=1)
    worker.serve(1, tmp_path / "s")
    client = NbdClient.unix(tmp_path / "s")
    payload = bytes(SIZE)
    client.send(WRITE, SIZE, payload=payload, later=SIZE // 4)
    worker = move(nursery, [worker], "w1")
    client.socket.sendall(payload[-SIZE // 4 :])
    cookie, reply = client.receive()
    assert (cookie, reply.error) == (1, 28)
    assert client.ask(FLUSH).error == 0
    client.close()
    worker.kill()


def test_requests_that_wait_at_a_suspended_device_move_along_and_are_answered_there(
    nursery: Zygote, store: Store, tmp_path: Path
) -> None:
    worker = nursery.fork("w0", store)
    worker.create(1, "ram", f"0 {SECTORS} ram", load=1)
    worker.serve(1, tmp_path / "s")
    client = NbdClient.unix(tmp_path / "s")
    assert client.ask(READ, 0, 512).error == 0
    worker.call(WorkerSuspend(minor=1))
    data = os.urandom(256 << 10)
    waiting = [client.send(WRITE, at * len(data), payload=data) for at in range(3)]
    frozen = msgspec.convert(worker.call(Freeze())["devices"], list[DeviceState])
    assert frozen[0].suspended
    new = nursery.fork("w1", store)
    new.hold(frozen)
    worker.call(Leave(flush=False))
    worker.wait()
    new.call(WorkerResume(minor=1))
    answered = [client.receive() for _ in waiting]
    assert sorted(cookie for cookie, _ in answered) == waiting
    assert not any(reply.error for _, reply in answered)
    assert client.ask(READ, len(data), len(data)).data == data
    client.close()
    new.kill()


@pytest.mark.parametrize("style", [Style.STRUCTURED, Style.EXTENDED])
def test_clients_keep_all_their_metadata_contexts(
    nursery: Zygote, store: Store, tmp_path: Path, style: Style, program: Callable[[str, str], str]
) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img = program("qemu-img", "qemu-utils")
    subprocess.run([qemu_img, "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
    for name in ("b0", "b1"):
        subprocess.run([qemu_img, "bitmap", "--add", "-g", "64k", image, name], check=True)
    worker = nursery.fork("w0", store)
    worker.create(1, "d", f"0 {SECTORS} qcow2 {image} 2 preallocate=0 cache=1M", load=1)
    worker.serve(1, tmp_path / "s")
    depth, first, second = "qemu:allocation-depth", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"
    clients = [
        NbdClient.unix(tmp_path / "s", style=style, contexts=contexts)
        for contexts in ([depth, "base:allocation", second], [first], ["base:allocation"])
    ]
    for number in range(3):
        at = number * 2 << 16
        assert clients[0].ask(WRITE, at, payload=b"x" * 4096).error == 0
        worker = move(nursery, [worker], f"w{number + 1}")
        told = [client.ask(BLOCK_STATUS, at, 2 << 16).statuses for client in clients]
        assert told[0].keys() == {depth, "base:allocation", second}
        assert told[0][depth] == told[0][second] == told[1][first] == [(1 << 16, 1), (1 << 16, 0)]
        assert told[2] == {"base:allocation": told[0]["base:allocation"]}
        new = NbdClient.unix(tmp_path / "s", style=style, contexts=[first, second])
        assert new.ask(BLOCK_STATUS, at, 1 << 16).statuses == {first: [(1 << 16, 1)], second: [(1 << 16, 1)]}
        new.close()
    for client in clients:
        client.close()
    worker.call(Leave(flush=True))
    worker.wait()


def test_a_hand_over_that_fails_is_taken_back(nursery: Zygote, store: Store, tmp_path: Path) -> None:
    worker = nursery.fork("w0", store)
    worker.create(1, "ram", f"0 {SECTORS} ram", load=1)
    worker.serve(1, tmp_path / "s")
    worker.call(WorkerLoad(minor=1, loaded=Loaded(load=2, table="0 8 zero")))
    client = NbdClient.unix(tmp_path / "s")
    assert client.ask(WRITE, 0, payload=b"here").error == 0
    before = worker.call(Describe())["devices"]
    for _ in range(3):
        (state,) = msgspec.convert(worker.call(Freeze())["devices"], list[DeviceState])
        assert not state.suspended
        assert len(state.connections) == 1
        cookie = client.send(READ, 0, 4)
        worker.call(Thaw())
        answered, reply = client.receive()
        assert (answered, reply.data) == (cookie, b"here")
    assert worker.call(Describe())["devices"] == before
    assert {label.role for label in store.kept} == {"memory", "listen"}
    other = NbdClient.unix(tmp_path / "s")
    assert other.ask(READ, 0, 4).data == b"here"
    other.close()
    client.close()
    worker.kill()


def test_two_workers_devices_are_merged_into_one_and_stacked_there(
    nursery: Zygote, store: Store, tmp_path: Path
) -> None:
    olds = []
    clients = []
    for minor, name in ((1, "lower"), (2, "upper")):
        worker = nursery.fork(f"old{minor}", store)
        worker.create(minor, name, "0 8 ram", load=minor)
        worker.serve(minor, tmp_path / name)
        clients.append(NbdClient.unix(tmp_path / name))
        assert clients[-1].ask(WRITE, 0, payload=name.encode()).error == 0
        olds.append(worker)
    new = move(nursery, olds, "new")
    new.call(WorkerLoad(minor=2, loaded=Loaded(load=9, table="0 8 linear blkloom:lower 0")))
    new.call(WorkerResume(minor=2))
    assert [client.ask(READ, 0, 5).data for client in clients] == [b"lower", b"lower"]
    for client in clients:
        client.close()
    new.kill()


def test_a_claim_moves_without_a_moment_in_which_another_could_have_it(
    nursery: Zygote, store: Store, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(SIZE))
    fd = os.open(disk, os.O_RDWR)
    worker = nursery.fork("w0", store)
    worker.create(1, "d", f"0 {SECTORS} loop {disk}", load=1)
    (state,) = msgspec.convert(worker.call(Freeze())["devices"], list[DeviceState])
    with pytest.raises(BusyError):
        Claim(fd, str(disk), writable=False)
    new = nursery.fork("w1", store)
    new.hold([state])
    worker.call(Leave(flush=False))
    worker.wait()
    with pytest.raises(BusyError):
        Claim(fd, str(disk), writable=False)
    new.call(Release(minor=1))
    Claim(fd, str(disk), writable=True).release()
    os.close(fd)
    new.kill()


def test_a_new_worker_that_cannot_hold_a_device_leaves_the_old_one_its_clients_and_claims(
    nursery: Zygote, store: Store, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(SIZE))
    worker = nursery.fork("w0", store)
    worker.create(1, "d", f"0 {SECTORS} loop {disk}", load=1)
    worker.serve(1, tmp_path / "s")
    client = NbdClient.unix(tmp_path / "s")
    assert client.ask(WRITE, 0, payload=b"mine").error == 0
    (state,) = msgspec.convert(worker.call(Freeze())["devices"], list[DeviceState])
    new = nursery.fork("w1", store)
    broken = DeviceState(name="broken", minor=2, active=Loaded(load=5, table="0 8 linear blkloom:nothing 0"))
    with pytest.raises(ValueError, match="no such blkloom device"):
        new.hold([state, broken])
    new.kill()
    worker.call(Thaw())
    assert client.ask(READ, 0, 4).data == b"mine"
    fd = os.open(disk, os.O_RDWR)
    with pytest.raises(BusyError):
        Claim(fd, str(disk), writable=False)
    os.close(fd)
    client.close()
    worker.kill()


def freeze_until_it_fails(worker: Worker) -> None:
    """A request that has not reached the engine yet moves with its bytes; sooner or later it has."""
    while True:
        worker.call(Freeze(timeout=0.2))
        worker.call(Thaw())


def test_a_target_that_does_not_answer_fails_the_hand_over_in_time_and_the_device_goes_on(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site"
    (package / "stuck-1.dist-info").mkdir(parents=True)
    (package / "stuck.py").write_text(STUCK)
    (package / "stuck-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: stuck\nVersion: 1\n")
    (package / "stuck-1.dist-info" / "entry_points.txt").write_text("[blkloom.targets]\nstuck = stuck:Stuck\n")
    monkeypatch.setenv("PYTHONPATH", str(package))
    with zygote(tmp_path / "run") as nursery:
        worker = nursery.fork("w0", store)
        worker.create(1, "d", "0 8 ram", load=1)
        worker.serve(1, tmp_path / "s1")
        healthy = NbdClient.unix(tmp_path / "s1")
        worker.create(2, "bad", "0 8 zero\n8 8 stuck\n", load=2)
        worker.create(3, "worse", "0 8 stuck", load=3)
        worker.serve(3, tmp_path / "s3")
        waiting = NbdClient.unix(tmp_path / "s3")
        waiting.send(READ, 0, 512)
        waiting.socket.settimeout(60)
        with pytest.raises(DrainError, match=r"'worse': requests of clients had not ended after 0\.2 s"):
            freeze_until_it_fails(worker)
        with pytest.raises(DrainError, match=r"'worse': requests in flight had not ended after 0\.2 s"):
            worker.call(WorkerSuspend(minor=3, timeout=0.2))
        assert healthy.ask(READ, 0, 512).data == bytes(512)
        worker.call(Release(minor=3, fail=True))
        assert healthy.ask(READ, 0, 512).data == bytes(512)
        with pytest.raises(UsageError, match="already"):
            worker.call(Hold(devices=[DeviceState(name="d", minor=1)]))
        healthy.close()
        waiting.close()
        worker.kill()
