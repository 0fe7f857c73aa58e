"""Limits of open files: clients cannot use up the descriptors of a supervisor, and errors name a limit that is too
low.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.errors import ResourceError
from conformance.nbd_client import WRITE, NbdClient, Style

from .conftest import Life, a_life, info, read

DATA = b"what must not be lost" + bytes(491)
ADVICE = "raise the hard limit of open files"


@pytest.fixture
def life() -> Iterator[Life]:
    """With few descriptors for everybody."""
    with a_life(open_files=160) as life:
        yield life


def log(life: Life) -> str:
    return (life.run_dir.parent / "supervisor.log").read_text()


def as_many_clients_as_are_taken(life: Life, device: str, stack: ExitStack) -> tuple[list[NbdClient], socket.socket]:
    """They, and the connection that is left waiting."""
    taken: list[NbdClient] = []
    while True:
        connected = stack.enter_context(socket.socket(socket.AF_UNIX))
        connected.settimeout(60)
        connected.connect(str(life.socket(device)))
        while not select.select([connected], [], [], 0.01)[0]:
            if "clients wait" in log(life):
                return taken, connected
        taken.append(NbdClient(connected, "", Style.SIMPLE))
        stack.callback(taken[-1].close)


def test_clients_do_not_use_up_what_the_next_supervisor_and_an_upgrade_need(life: Life) -> None:
    with ExitStack() as stack:
        with life.client() as client:
            client.create("ram", table="0 2048 ram")
            clients, waiting = as_many_clients_as_are_taken(life, "ram", stack)
            assert len(clients) > 60
            assert ADVICE in log(life)
            assert clients[0].ask(WRITE, payload=DATA).error == 0
            clients.pop().socket.shutdown(socket.SHUT_RDWR)
            clients.append(NbdClient(waiting, "", Style.SIMPLE))  # one left, one is let in
            stack.callback(clients[-1].close)
        life.kill()
        life.start()
        with life.client() as client:
            found = info(client, "ram")
            assert (found.state, found.connections, found.restarts) == ("ACTIVE", len(clients), 0)
            assert client.upgrade() == 1
            assert all(read(client) == DATA for client in clients)


def test_an_upgrade_that_could_not_reach_a_worker_afterwards_changes_nothing_and_names_it(
    life: Life, blkloom: str
) -> None:
    with life.client() as client:
        client.create("good", table="0 2048 ram")
        client.create("lost", table="0 2048 ram")
        before = [(found.name, found.worker) for found in client.info()]
        connected = NbdClient.unix(life.socket("lost"))
        assert connected.ask(WRITE, payload=DATA).error == 0
        for path in (life.run_dir / "workers").iterdir():
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(path))
                pid = int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
            if pid == info(client, "lost").worker:
                aside = path.rename(path.with_suffix(".aside"))
        command = [blkloom, "--run-dir", str(life.run_dir), "upgrade"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert f"lost (process {info(client, 'lost').worker}): it cannot be connected to" in done.stderr
        assert [(found.name, found.worker) for found in client.info()] == before
        assert read(connected) == DATA
        aside.rename(aside.with_suffix(".sock"))
        assert client.upgrade() == 2
        assert read(connected) == DATA
        connected.close()


def test_a_worker_whose_clients_the_supervisor_has_no_descriptors_for_goes_on_as_it_was(life: Life) -> None:
    with life.client() as client, ExitStack() as stack:
        client.create("ram", table="0 2048 ram")
        clients = [NbdClient.unix(life.socket("ram")) for _ in range(40)]
        for connected in clients:
            stack.callback(connected.close)
        assert clients[0].ask(WRITE, payload=DATA).error == 0
        used = len(os.listdir(f"/proc/{life.process.pid}/fd"))
        resource.prlimit(life.process.pid, resource.RLIMIT_NOFILE, (used + 25, used + 25))
        worker = info(client, "ram").worker
        with pytest.raises(ResourceError, match=rf"of 40 clients of device 'ram' \d+ could be taken over; {ADVICE}"):
            client.upgrade()
        assert info(client, "ram").worker == worker
        assert all(read(connected) == DATA for connected in clients)


def test_devices_are_refused_before_their_supervisor_cannot_take_commands_any_more(life: Life) -> None:
    with life.client() as client:
        with pytest.raises(ResourceError, match=f"free descriptors left.*{ADVICE}"):
            fill(client)
        with life.client() as another:
            names = [found.name for found in another.info()]
            assert len(names) > 10
            for name in names:
                another.remove(name)
            assert another.info() == []


def fill(client: Client) -> None:
    for number in range(160):
        client.create(f"d{number}", table="0 8 zero")


def chain(folder: Path, length: int) -> Path:
    """Images that stand on each other; the last."""
    first, other = folder / "0000.qcow2", folder / "other.qcow2"
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    subprocess.run([*create, first, "64k"], check=True)
    subprocess.run([*create, "-F", "qcow2", "-b", first.name, other], check=True)
    image = other.read_bytes()
    for number in range(1, length):
        named = image.replace(first.name.encode(), b"%04d.qcow2" % (number - 1))
        (folder / f"{number:04}.qcow2").write_bytes(named)
    return folder / f"{length - 1:04}.qcow2"


@pytest.mark.usefixtures("qemu_tools")
def test_serve_raises_the_soft_limit_and_says_so_where_the_hard_one_is_too_low(blkloom: str, tmp_path: Path) -> None:
    last = chain(tmp_path, 60)
    serve = [blkloom, "serve", str(last), "--allow-backing", str(tmp_path), "--socket", str(tmp_path / "s")]
    for limit in range(98, 104):  # an image needs more than one: any of them may be the one too many
        limited = ["prlimit", f"--nofile={limit}", *serve]
        done = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == ResourceError.exit_code
        assert "needs more open files than there may be" in done.stderr
        assert f"{ADVICE}, which is {limit} here" in done.stderr
    with subprocess.Popen(["prlimit", "--nofile=100:1000", *serve], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline().startswith("nbd+unix:")
        process.terminate()
        assert process.wait(60) == 0


@pytest.mark.usefixtures("qemu_tools")
def test_a_chain_too_long_for_a_worker_is_refused_and_the_worker_goes_on(life: Life, tmp_path: Path) -> None:
    last = chain(tmp_path, 160)
    with life.client() as client:
        client.create("disk", table="0 128 ram")
        connected = NbdClient.unix(life.socket("disk"))
        assert connected.ask(WRITE, payload=DATA).error == 0
        with pytest.raises(OSError, match=ADVICE):
            client.load("disk", f"0 128 qcow2 {last} 2 allow_backing={tmp_path} preallocate=0")
        assert read(connected) == DATA
        assert client.upgrade() == 1
        assert read(connected) == DATA
        connected.close()
