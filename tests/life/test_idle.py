"""Queries start no supervisor, and a supervisor without devices and clients ends."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from blkloom.control import messages as m
from blkloom.control.channel import Channel
from blkloom.control.client import Client
from blkloom.control.rundir import RunDir
from blkloom.control.starting import connect as reach
from conformance.nbd_client import NbdClient

from .conftest import STOP_TIMEOUT, Life, a_life

pytestmark = pytest.mark.timeout(120)
AT_ONCE = "--idle-timeout=0.01"

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """The path of a run directory that is not there yet."""
    with tempfile.TemporaryDirectory(prefix="blk") as folder:
        yield Path(folder) / "run"


@pytest.fixture
def command(blkloom: str, run_dir: Path) -> Command:
    """`blkloom ...` for it."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"BLKLOOM_RUN_DIR": str(run_dir)}
        done = subprocess.run([blkloom, *words], env=environment, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("ls", "No devices found\n"),
        ("ls --tree", "No devices found\n"),
        ("info", "No devices found\n"),
        ("info -c", "No devices found\n"),
        ("info --json", "[]\n"),
        ("table", "No devices found\n"),
        ("status", "No devices found\n"),
        ("deps", "No devices found\n"),
        ("stats", "No devices found\n"),
        ("export --list", "No devices found\n"),
        ("mangle", "No devices found\n"),
        ("loop -a", ""),
        ("loop -l", ""),
        ("loop -f", "loop0\n"),
        ("remove_all", ""),
        ("upgrade", "0 workers replaced\n"),
        ("stop", ""),
    ],
)  # fmt: skip
def test_a_command_that_only_looks_makes_no_directory_and_starts_no_supervisor(
    command: Command, run_dir: Path, words: str, says: str
) -> None:
    done = command(*words.split())
    assert (done.returncode, done.stdout, done.stderr) == (0, says, "")
    assert not run_dir.exists()


@pytest.mark.parametrize("words", ["info a", "remove a", "suspend a", "wait a", "export a --list", "loop -d loop0"])
def test_a_device_that_cannot_be_there_is_looked_for_without_a_supervisor(
    command: Command, run_dir: Path, words: str
) -> None:
    assert command(*words.split()).returncode == 1
    assert not run_dir.exists()


def test_devices_that_a_killed_supervisor_left_are_found_by_a_command_that_looks(life: Life, blkloom: str) -> None:
    with life.client() as client:
        client.create("a", table="0 8 zero")
    life.kill()
    done = subprocess.run([blkloom, "--run-dir", life.run_dir, "ls"], capture_output=True, text=True, check=True)
    assert done.stdout == "a\t(0:0)\n"
    with life.client() as client:
        client.remove("a")
        client.stop()


def test_a_command_that_makes_a_device_starts_a_supervisor_that_ends_when_it_is_idle(
    command: Command, run_dir: Path
) -> None:
    assert command("create", "a", "--table", "0 8 zero").returncode == 0
    with Client(run_dir, start=False) as client:
        assert client.version()["limits"]["idle"] > 0
        client.remove("a")
        client.stop()


def test_without_devices_and_clients_it_ends_and_takes_its_socket_along() -> None:
    with a_life(AT_ONCE) as life:
        assert life.process.wait(STOP_TIMEOUT) == 0
        assert not (life.run_dir / "control.sock").exists()


def test_it_stays_for_a_device_and_ends_when_that_goes_with_its_last_client() -> None:
    with a_life("--idle-timeout=2") as life:
        with life.client() as client:
            client.create("a", table="0 8 zero", autoclear=True)
        with closing(NbdClient.unix(life.socket("a"))):
            assert life.process.poll() is None
        assert life.process.wait(STOP_TIMEOUT) == 0


def test_a_client_that_comes_while_one_ends_gets_another(run_dir: Path) -> None:
    for _ in range(6):
        with closing(Channel(reach(RunDir.at(run_dir), start=True, idle=0.001), m.ToClient)) as channel:
            hello, _ = channel.receive(STOP_TIMEOUT)
            assert isinstance(hello, m.Hello)
            channel.send(m.ClientRequest(id=1, call=m.GetInfo()))
            reply, _ = channel.receive(STOP_TIMEOUT)
            assert reply == m.Reply(id=1, result=[])
    with closing(Channel(reach(RunDir.at(run_dir), start=True), m.ToClient)) as channel:
        channel.send(m.ClientRequest(id=1, call=m.Stop()))
        while True:
            try:
                channel.receive(STOP_TIMEOUT)
            except ConnectionError:
                return


def test_one_that_systemd_started_ends_and_leaves_its_socket(run_dir: Path, program: Callable[..., str]) -> None:
    run_dir.mkdir(mode=0o700)
    socket = run_dir / "control.sock"
    activate = program("systemd-socket-activate", "systemd")
    supervisor = [sys.executable, "-m", "blkloom.supervisor", "--run-dir", str(run_dir), AT_ONCE]
    with subprocess.Popen([activate, f"--listen={socket}", *supervisor], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "Listening" in process.stderr.readline()
        with Client(run_dir, start=False) as client:
            assert client.info() == []
        assert process.wait(STOP_TIMEOUT) == 0
    assert socket.is_socket()
