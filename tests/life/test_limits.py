"""Limits, failed devices, other users and stale files: each gives an error, and none is fatal."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from blkloom.control import client as clients
from blkloom.control import messages as m
from blkloom.control.channel import Channel
from blkloom.control.client import Client
from blkloom.control.framing import ChannelClosed
from blkloom.control.states import DeviceInfo
from blkloom.errors import BackingError, DeviceFailed, ResourceError, UsageError
from conformance.nbd_client import WRITE, NbdClient

from .conftest import Life, a_life, info, read, until

DATA = bytes(range(256)) * 2
pytestmark = pytest.mark.timeout(120)
CONNECT_AS_NOBODY = """
import os, sys
from blkloom.control.client import Client
from blkloom.errors import UsageError
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
try:
    Client(sys.argv[1], start=False)
except UsageError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def lasting() -> Iterator[Life]:
    """With little of everything."""
    with a_life("--max-devices=3", "--max-ram=1M", "--max-deaths=2") as life:
        yield life


@pytest.fixture
def life(shared: Life) -> Life:
    """The module's."""
    return shared


# limits


def test_more_devices_than_the_limit_are_refused_with_the_limit(client: Client) -> None:
    for name in "abc":
        client.create(name)
    with pytest.raises(ResourceError, match=r"there are 3 devices, the most this supervisor takes; .*--max-devices"):
        client.create("d")
    client.remove("b")
    assert client.create("d").minor == 1


def test_more_memory_than_the_limit_is_refused_with_what_there_is(client: Client) -> None:
    client.create("a", table="0 1024 ram")
    with pytest.raises(
        ResourceError, match="memory for 'b' are too much: RAM devices have 512 KiB of the 1 MiB they may have"
    ):
        client.create("b", table="0 1025 ram")
    client.create("b", table="0 1024 ram")
    with pytest.raises(ResourceError):
        client.load("b", "0 8 ram")
    client.remove("a")
    client.load("b", "0 8 ram")
    assert [found.name for found in client.info()] == ["b"]


def test_memory_asked_for_at_once_is_not_given_twice(client: Client, beside: Callable[..., Future[Any]]) -> None:
    attempts = [beside("create", f"d{number}", table="0 1200 ram") for number in range(3)]
    errors = [attempt.exception() for attempt in attempts]
    assert sorted(type(error).__name__ for error in errors) == ["NoneType", "ResourceError", "ResourceError"]
    assert len(client.info()) == 1


def test_a_load_that_failed_gives_its_memory_back(client: Client) -> None:
    client.create("a")
    for _ in range(3):
        with pytest.raises(ResourceError):
            client.load("a", "0 2049 ram")
    client.load("a", "0 2048 ram")
    client.clear("a")
    client.create("b", table="0 2048 ram")


# devices that fail


def fail(client: Client, device: str) -> DeviceInfo:
    """Kills the device's workers until there is none any more."""
    former = 0
    while (found := info(client, device)).state != "FAILED":
        if found.worker not in (0, former):
            former = found.worker
            with suppress(ConnectionError):  # one that died when it had just been started is another story
                NbdClient.unix(client.run_dir.device(device)).close()
            os.kill(former, signal.SIGKILL)
    return found


def test_a_device_whose_worker_dies_too_often_fails_and_says_why(life: Life, client: Client, file: Path) -> None:
    client.create("disk", table=f"0 16 linear {file} 0")
    found = fail(client, "disk")
    assert found.reason == "its worker was killed by SIGKILL, 3 times within 60 s"
    assert (found.worker, found.restarts) == (0, 2)
    assert client.status("disk") == [(0, 16, "failed", found.reason)]
    assert client.table("disk") == f"0 16 linear {file} 0"
    assert not life.socket("disk").exists(), "clients would wait for ever"
    refused: list[Callable[[], Any]] = [
        lambda: client.load("disk", "0 8 zero"),
        lambda: client.clear("disk"),
        lambda: client.suspend("disk"),
        lambda: client.rename("disk", name="other"),
        lambda: client.message("disk", 0, "hello"),
        lambda: client.export("disk", host="127.0.0.1"),
    ]
    for call in refused:
        with pytest.raises(DeviceFailed, match=r"killed by SIGKILL.*; blkloom resume disk tries again"):
            call()


def test_a_failed_device_is_revived_by_resume_with_all_it_had(life: Life, client: Client) -> None:
    client.create("memory", table="0 16 ram", uuid="u-1")
    with closing(NbdClient.unix(life.socket("memory"))) as nbd:
        assert nbd.ask(WRITE, 0, payload=DATA).error == 0
    before = fail(client, "memory")
    client.resume("memory")
    after = info(client, "memory")
    assert (after.state, after.reason, after.uuid, after.exports) == ("ACTIVE", "", "u-1", before.exports)
    with closing(NbdClient.unix(life.socket("memory"))) as nbd:
        assert read(nbd) == DATA
    os.kill(after.worker, signal.SIGKILL)
    assert until(client, "memory", lambda found: found.worker not in (0, after.worker)).state == "ACTIVE"


def test_a_failed_device_is_removed_and_one_on_it_cannot_be_made(client: Client) -> None:
    client.create("disk", table="0 16 zero")
    fail(client, "disk")
    with pytest.raises(UsageError, match=r"device 'disk' has failed: .*; blkloom resume disk"):
        client.create("upper", table="0 16 linear blkloom:disk 0")
    client.remove("disk")
    assert client.info() == []


def test_a_waiting_client_is_told_of_a_failure(client: Client, beside: Callable[..., Future[Any]]) -> None:
    client.create("disk", table="0 16 zero")
    waiting = beside("wait", "disk", 2)  # two restarts, and the failure
    assert fail(client, "disk").event == 3
    assert waiting.result(60) == 3


def test_where_no_death_is_allowed_a_device_is_revived_all_the_same() -> None:
    with a_life("--max-deaths=0") as life, life.client() as client:
        client.create("disk", table="0 16 zero")
        fail(client, "disk")
        client.resume("disk")
        assert info(client, "disk").state == "ACTIVE"


# files that cannot be had


def test_a_file_that_does_not_open_in_time_is_named(
    client: Client, file: Path, monkeypatch: pytest.MonkeyPatch, life: Life
) -> None:
    answers = threading.Event()
    opened = threading.Event()
    open_file = clients.open_file

    def slowly(*arguments: Any, **kinds: Any) -> int:
        answers.wait(60)
        try:
            return open_file(*arguments, **kinds)
        finally:
            opened.set()

    monkeypatch.setattr(clients, "open_file", slowly)
    monkeypatch.setattr(clients, "OPEN_SECONDS", 0.05)
    with pytest.raises(BackingError) as caught:
        client.create("disk", table=f"0 16 linear {file} 0")
    assert (caught.value.path, caught.value.errno) == (str(file), errno.ETIMEDOUT)
    with life.client() as other:
        assert other.info() == []
    answers.set()
    assert opened.wait(60)


def order(life: Life, table: str) -> tuple[Channel, m.OpenFile]:
    """A client of one's own that ordered a device and is asked for its file."""
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(str(life.run_dir / "control.sock"))
    channel = Channel(connected, m.ToClient)
    channel.send(m.Hello())
    channel.receive(60)
    channel.send(m.ClientRequest(id=1, call=m.Create(name="disk", table=table)))
    asked, _ = channel.receive(60)
    assert isinstance(asked, m.OpenFile)
    return channel, asked


def test_a_client_that_goes_away_takes_its_order_along(life: Life, client: Client, file: Path) -> None:
    channel, asked = order(life, f"0 16 linear {file} 0")
    assert asked.path == str(file)
    channel.close()
    while client.version()["devices"]:
        pass
    client.create("disk", table=f"0 16 linear {file} 0")


def test_a_clients_refusal_is_the_error_of_the_table(life: Life, file: Path) -> None:
    channel, asked = order(life, f"0 16 linear {file} 0")
    channel.send(m.OpenRefused(id=asked.id, errno=errno.EACCES))
    failure, _ = channel.receive(60)
    assert (failure.id, failure.type, failure.errno, failure.path) == (1, "BackingError", errno.EACCES, str(file))
    channel.close()


# strangers, and clients of another version


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its user")
def test_another_users_client_is_refused_and_told_why() -> None:
    with a_life() as life:
        life.run_dir.parent.chmod(0o755)
        command = [sys.executable, "-c", CONNECT_AS_NOBODY, str(life.run_dir)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert found.stdout.startswith(f"{life.run_dir} belongs to user 0, not to you (user 65534); choose another")


@pytest.mark.parametrize("said", [b'{"kind":"song"}\n', b"GET / HTTP/1.1\n"])
def test_who_is_not_understood_is_told_so_and_dropped(life: Life, client: Client, said: bytes) -> None:
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(str(life.run_dir / "control.sock"))
    connected.sendall(said)
    channel = Channel(connected, m.ToClient)
    assert isinstance(channel.receive(60)[0], m.Hello)
    failure, _ = channel.receive(60)
    assert (failure.id, failure.type) == (0, "UsageError")
    assert "did not understand a request" in failure.what
    with pytest.raises(ChannelClosed):
        channel.receive(60)
    channel.close()
    assert client.info() == []


def test_a_call_that_was_given_up_does_not_disturb_the_next(life: Life) -> None:
    with Client(life.run_dir, start=False, timeout=30) as client:
        client.create("disk", table="0 16 zero")
        nbd = NbdClient.unix(life.socket("disk"))
        until(client, "disk", lambda found: found.connections == 1)
        client._timeout = 0.05
        with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
            client.remove("disk", retry=True)
        client._timeout = 30
        assert read(nbd) == bytes(512)
        nbd.close()
        while client.info():
            pass


# what is left lying about


def test_stale_files_are_reaped_and_the_rest_stays(life: Life, client: Client) -> None:
    client.create("disk", table="0 16 zero")
    before = {path for path in life.run_dir.rglob("*") if not path.is_dir()}
    for stale in ("dev/stale", "workers/0123.sock"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(life.run_dir / stale))
            left.listen()
    for stray in ("devices/77.json", "devices/nonsense.new", "devices/².json"):
        (life.run_dir / stray).write_text("{}")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(life.run_dir / "dev" / "leftover"))
        listening.listen()
        assert sorted(client.reap()) == [
            f"socket {life.run_dir}/dev/stale",
            f"state file {life.run_dir}/devices/77.json",
            f"state file {life.run_dir}/devices/nonsense.new",
            f"state file {life.run_dir}/devices/².json",
            f"worker's socket {life.run_dir}/workers/0123.sock",
        ]
        assert (life.run_dir / "dev" / "leftover").is_socket()
    assert client.reap() == [f"socket {life.run_dir}/dev/leftover"]
    assert client.reap() == []
    assert {path for path in life.run_dir.rglob("*") if not path.is_dir()} == before
    with closing(NbdClient.unix(life.socket("disk"))) as nbd:
        assert read(nbd) == bytes(512)
