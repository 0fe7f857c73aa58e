"""`stop` names the clients that it would disconnect, and devices are selected only by their names."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress

import msgspec
import pytest

from blkloom.control import messages as m
from blkloom.control.client import Client
from blkloom.control.messages import Selector
from blkloom.errors import DeviceBusy
from conformance.nbd_client import NbdClient

from .conftest import STOP_TIMEOUT, Life, info, read, until

pytestmark = pytest.mark.timeout(120)
Connect = Callable[[str], NbdClient]


def test_a_supervisor_that_never_had_a_worker_ends_all_that_it_started_by_itself(life: Life) -> None:
    life.stop()
    assert "is killed" not in (life.run_dir.parent / "supervisor.log").read_text()


def test_stop_leaves_devices_with_clients_alone_and_says_which(
    life: Life, client: Client, connect: Connect, blkloom: str
) -> None:
    client.create("disk", table="0 2048 ram")
    client.create("idle", table="0 2048 ram")
    nbd = connect("disk")
    until(client, "disk", lambda found: found.connections == 1)
    with pytest.raises(DeviceBusy, match=r"a device is in use: 'disk' \(1 client\); .* with --force"):
        client.stop()
    done = subprocess.run([blkloom, "--run-dir", life.run_dir, "stop"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "'disk' (1 client)" in done.stderr
    assert read(nbd) == bytes(512)
    assert [found.name for found in client.info()] == ["disk", "idle"]


def test_stop_with_force_cuts_clients_off(life: Life, client: Client, connect: Connect, blkloom: str) -> None:
    client.create("disk", table="0 2048 ram")
    connect("disk")
    until(client, "disk", lambda found: found.connections == 1)
    subprocess.run([blkloom, "--run-dir", life.run_dir, "stop", "--force"], check=True, timeout=STOP_TIMEOUT)
    assert life.process.wait(STOP_TIMEOUT) == 0


def test_devices_that_stand_on_each_other_are_stopped_without_force(life: Life, client: Client) -> None:
    client.create("low", table="0 2048 ram")
    client.create("high", table="0 1024 linear blkloom:low 0")
    client.stop()
    assert life.process.wait(STOP_TIMEOUT) == 0


def test_a_device_named_like_a_selector_captures_none(life: Life, client: Client, blkloom: str) -> None:
    client.create("plain", table="0 8 zero", uuid="x", minor=5)
    for name in ("uuid:x", "minor:5"):
        client.create(name, table="0 16 zero")
        assert info(client, name).name == name
    assert info(client, Selector(uuid="x")).name == info(client, Selector(minor=5)).name == "plain"
    for selector in (["-u", "x"], ["-j", "0", "-m", "5"]):
        command = [blkloom, "--run-dir", str(life.run_dir), "table", *selector]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "0 8 zero \n"


def test_thousands_of_requests_of_one_client_do_not_keep_anothers_stop_waiting(life: Life, client: Client) -> None:
    client.create("disk", table="0 2048 ram")
    asked = 20_000
    flooding = socket.socket(socket.AF_UNIX)
    flooding.connect(str(life.run_dir / "control.sock"))
    request = msgspec.json.encode(m.ClientRequest(id=1, call=m.GetStatus(device="disk"))) + b"\n"

    def flood() -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the supervisor ends before it has read all
            flooding.sendall(request * asked)

    writer = threading.Thread(target=flood)
    writer.start()
    try:
        with flooding.makefile("rb") as answers:
            assert b"hello" in answers.readline()
            assert b"reply" in answers.readline()
            client.stop()
            with suppress(ConnectionResetError):
                assert sum(1 for _ in answers) < asked - 1
    finally:
        flooding.close()
        writer.join()
    assert life.process.wait(STOP_TIMEOUT) == 0
