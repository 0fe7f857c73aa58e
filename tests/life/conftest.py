"""A supervisor of the test's own, and a command that talks to it.

Run directories are short (a Unix socket's path fits 107 bytes) and gone after the test; a supervisor
that does not stop cleanly, or leaves a process behind, fails its test.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from blkloom.control.client import Client

STOP_TIMEOUT = 60.0


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

    def start(self) -> None:
        """A supervisor in this run directory, accepting when this returns."""
        self.process = start_supervisor(self.run_dir)

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


def start_supervisor(run_dir: Path) -> subprocess.Popen[bytes]:
    """Started in the foreground; ready when it says so (sd_notify)."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        path = os.path.join(folder, "notify")
        notify.bind(path)
        notify.settimeout(STOP_TIMEOUT)
        environment = os.environ | {"NOTIFY_SOCKET": path, "BLKLOOM_TEST_RUN_DIR": str(run_dir)}
        command = [sys.executable, "-m", "blkloom.supervisor", "--run-dir", str(run_dir), "--max-deaths=1000"]
        log = (run_dir.parent / "supervisor.log").open("ab")
        with log:
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=log)
        while b"READY=1" not in notify.recv(4096):
            assert process.poll() is None
    return process


@pytest.fixture
def life() -> Iterator[Life]:
    """A supervisor with nothing in it yet. Afterwards: stopped cleanly, nothing left."""
    with tempfile.TemporaryDirectory(prefix="blk") as folder:
        run_dir = Path(folder) / "run"
        run_dir.mkdir(mode=0o700)
        life = Life(run_dir, start_supervisor(run_dir))
        try:
            yield life
            if life.process.poll() is None:
                life.process.send_signal(signal.SIGTERM)
                assert life.process.wait(STOP_TIMEOUT) == 0, (run_dir.parent / "supervisor.log").read_text()
            left = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if not path.is_dir()}
            assert left <= {"lock", "start.lock", "supervisor.log"}, f"left behind: {sorted(left)}"
        finally:
            for pid in life.processes():
                os.kill(pid, signal.SIGKILL)
