"""Fixtures: a separate supervisor for a test, and a command that uses it.

Run directories have short paths (a Unix socket's path has at most 107 bytes) and are removed after the test. If a
supervisor does not stop cleanly, or leaves a process behind, its test fails.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blkloom.control.client import Client
from blkloom.control.messages import DeviceKey
from blkloom.control.states import DeviceInfo
from blkloom.export.fuse.mount import Mount, unmount
from blkloom.export.fuse.mountinfo import mounted_at
from conformance.file_systems import needs_root
from conformance.nbd_client import READ, NbdClient

from .loop_commands import Loop

STOP_TIMEOUT = 60.0
LONGEST_END = 30.0
"""Seconds in which processes that were ended end, and the kernel lets go of what they had."""
PREFIX = f"blk{os.getpid()}_"
"""Of the directories that have a run directory, so that those of another test run are told apart."""
MARK = "BLKLOOM_TEST_SESSION"
"""Variable in the environment of all processes that these tests start."""


@dataclass
class Life:
    """A run directory with its supervisor."""

    run_dir: Path
    process: subprocess.Popen[bytes]

    def client(self) -> Client:
        """One more connection to the supervisor."""
        return Client(self.run_dir, start=False)

    def socket(self, name: str) -> Path:
        """The automatic NBD socket of a device."""
        return self.run_dir / "dev" / name

    def kill(self) -> None:
        """The supervisor, with no time to say good-bye."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(STOP_TIMEOUT)

    def start(self, *options: str) -> None:
        """A supervisor in this run directory, accepting when this returns."""
        self.process = start_supervisor(self.run_dir, *options)

    def stop(self) -> None:
        """The supervisor ends cleanly."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(STOP_TIMEOUT) == 0, (self.run_dir.parent / "supervisor.log").read_text()

    def processes(self) -> set[int]:
        """Everything that runs in this run directory: its path is in their command lines or sockets."""
        found = set()
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                line = Path(f"/proc/{pid}/environ").read_bytes()
            except OSError:
                continue
            if f"BLKLOOM_TEST_RUN_DIR={self.run_dir}".encode() in line:
                found.add(int(pid))
        return found


def start_supervisor(run_dir: Path, *options: str, open_files: int | None = None) -> subprocess.Popen[bytes]:
    """Started in the foreground; ready when it says so (sd_notify). open_files: the hard limit."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        path = os.path.join(folder, "notify")
        notify.bind(path)
        notify.settimeout(STOP_TIMEOUT)
        environment = os.environ | {"NOTIFY_SOCKET": path, "BLKLOOM_TEST_RUN_DIR": str(run_dir)}
        limited = [] if open_files is None else ["prlimit", f"--nofile={open_files}"]
        command = [
            *limited,
            sys.executable,
            "-m",
            "blkloom.supervisor",
            "--run-dir",
            str(run_dir),
            "--max-deaths=1000",
            *options,
        ]
        log = (run_dir.parent / "supervisor.log").open("ab")
        with log:
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=log)
        while b"READY=1" not in notify.recv(4096):
            assert process.poll() is None
    return process


@contextmanager
def a_life(*options: str, open_files: int | None = None, name: str = "run") -> Iterator[Life]:
    """A supervisor with nothing in it yet. Afterwards: stopped cleanly, nothing left. name: of its run directory."""
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        run_dir = Path(folder) / name
        run_dir.mkdir(mode=0o700, parents=True)
        life = Life(run_dir, start_supervisor(run_dir, *options, open_files=open_files))
        try:
            yield life
            if life.process.poll() is None:
                life.stop()
            left = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if not path.is_dir()}
            assert left <= {"lock", "start.lock", "supervisor.log"}, f"left behind: {sorted(left)}"
        finally:
            for pid in life.processes():
                os.kill(pid, signal.SIGKILL)
            for path in run_dir.glob("mounts/*"):
                if mounted_at(str(path)):
                    unmount(Mount(str(path)), lazy=True)


@pytest.fixture(scope="session", autouse=True)
def nothing_left_by_these_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """At the end no process, mount or loop device is left. Fails the last test with what is."""
    folders = (os.path.join(tempfile.gettempdir(), PREFIX), str(tmp_path_factory.getbasetemp()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, PREFIX)
        # File systems of other tests of this process, which may be taken down later.
        others = set(_kernel_left(folders))
        yield
    deadline = time.monotonic() + LONGEST_END
    while left := [*_processes_left(), *(one for one in _kernel_left(folders) if one not in others)]:
        assert time.monotonic() < deadline, f"left by tests in {Path(__file__).parent}: {left}"
        time.sleep(0.1)


def _processes_left() -> Iterator[str]:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            marked = f"{MARK}={PREFIX}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if marked and "multiprocessing" not in words:  # its helper processes end with this one
                yield f"process {pid}: {words}"


def _kernel_left(folders: tuple[str, ...]) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        if line.split()[4].startswith(folders):
            yield f"mount {line}"
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            if path.read_text(errors="surrogateescape").startswith(folders):
                yield f"loop device {path.parent.parent.name}"


@pytest.fixture(autouse=True)
def no_signal_to_the_test_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose worker is being replaced has process 0, and kill(2) of 0 would end all of the test run."""
    kill = os.kill

    def checked(pid: int, number: int) -> None:
        assert pid > 0, "the device has no worker just now"
        kill(pid, number)

    monkeypatch.setattr(os, "kill", checked)


@pytest.fixture
def life() -> Iterator[Life]:
    """One of the test's own."""
    with a_life() as life:
        yield life


@pytest.fixture(scope="module")
def lasting() -> Iterator[Life]:
    """One for all tests of a module that make it their `life`."""
    with a_life() as life:
        yield life


@pytest.fixture
def shared(lasting: Life) -> Iterator[Life]:
    """The module's, without devices; afterwards without devices again."""
    yield lasting
    with lasting.client() as client:
        names = [info.name for info in client.info()]
        for name in reversed(names):
            client.remove(name, deferred=True)  # the clients are leaving
        while client.info():
            pass
        assert list((lasting.run_dir / "dev").iterdir()) == []


@pytest.fixture
def client(life: Life) -> Iterator[Client]:
    """A connection to the supervisor."""
    with life.client() as client:
        yield client


@pytest.fixture
def connect(life: Life) -> Iterator[Callable[[str], NbdClient]]:
    """`connect(device)`: an NBD client of its automatic socket, closed after the test."""
    with ExitStack() as stack:

        def connected(device: str) -> NbdClient:
            client = NbdClient.unix(life.socket(device))
            stack.callback(client.close)
            return client

        yield connected


@pytest.fixture
def beside(life: Life) -> Iterator[Callable[..., Future[Any]]]:
    """`beside(verb, ...)`: calls the client's method on a connection and a thread of its own."""
    with ThreadPoolExecutor(8) as pool:

        def call(verb: str, *arguments: Any, **kinds: Any) -> Future[Any]:
            def work() -> Any:
                with life.client() as client:
                    return getattr(client, verb)(*arguments, **kinds)

            return pool.submit(work)

        yield call


@pytest.fixture
def loop(blkloom: str, life: Life) -> Loop:
    """`blkloom loop ...`."""
    return Loop(blkloom, life.run_dir)


@pytest.fixture
def losetup(program: Callable[[str, str], str]) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """The real one; devices of its making go after the test."""
    path = program("losetup", "mount")
    needs_root("losetup")
    made: list[str] = []

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["losetup", *map(str, words)],
            executable=path,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            check=False,
        )
        if "--show" in words and done.returncode == 0:
            made.append(done.stdout.strip())
        return done

    yield run
    for device in made:
        subprocess.run([path, "-d", device], check=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """8 KiB of the letter f."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"f" * 8192)
    return path


def info(client: Client, device: DeviceKey) -> DeviceInfo:
    """The device's."""
    (found,) = client.info(device)
    return found


def until(client: Client, device: str, true: Callable[[DeviceInfo], bool]) -> DeviceInfo:
    """The device's info, as soon as that is true of it."""
    while not true(found := info(client, device)):
        pass
    return found


def read(client: NbdClient, offset: int = 0, length: int = 512) -> bytes:
    """What is there; no error."""
    reply = client.ask(READ, offset, length)
    assert reply.error == 0
    return reply.data


def is_answered(client: NbdClient) -> bool:
    """Whether an answer comes within a moment."""
    readable, _, _ = select.select([client.socket], [], [], 0.05)
    return bool(readable)
