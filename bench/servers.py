"""Starts server processes, waits until they are ready, monitors them, and always stops them.

A server is ready after an event: qemu-nbd and nbdkit get a listening socket and are ready when they send the greeting;
blkloom prints its URI. All are child processes in the foreground. Source: sd_listen_fds(3), proc_pid_stat(5).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_BACKLOG: Final = 1024
_HAND_OVER: Final = 'exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 20.0


class ServerError(Exception):
    """A server did not start, or did not end correctly; the text has its output."""


class Server:
    """A running process, identified by its pid."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def cpu_seconds(self) -> float:
        """User and system time (utime + stime) of all its threads so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def status(self, name: str) -> int:
        """A number of /proc/PID/status: `VmRSS` in KiB, `Threads`."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return int(value.split()[0])
        raise ServerError(f"/proc/{self.pid}/status has no {name}")


@contextmanager
def activated(command: list[str], *, path: Path, log: Path, status: int = 0) -> Iterator[Server]:
    """Start a server with a listening Unix socket at `path`, as systemd does (sd_listen_fds(3)); it is ready when it
    sends the greeting. status: its expected exit status. Raises ServerError.
    """
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener, log.open("wb") as sink:
        listener.bind(str(path))
        listener.listen(_BACKLOG)
        process = subprocess.Popen(
            ["sh", "-c", _HAND_OVER, "sh", *command], stdin=listener.fileno(), stdout=subprocess.DEVNULL, stderr=sink
        )
    with _ending(process, log, status):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_START_SECONDS)
            try:
                client.connect(str(path))
                greeting = client.recv(8)
            except OSError as error:
                raise ServerError(f"{command[0]} is not ready: {error}: {_tail(log)}") from error
        if greeting != b"NBDMAGIC":
            raise ServerError(f"{command[0]} is not ready: {_tail(log) or greeting!r}")
        yield Server(process.pid)


@contextmanager
def announcing(command: list[str], *, ready: str, log: Path, text: str = "") -> Iterator[Server]:
    """Start a server that prints a line beginning with `ready` when it is ready. text: its standard input. Raises
    ServerError.
    """
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink)
    assert process.stdin
    assert process.stdout
    with _ending(process, log), process.stdout:
        try:
            with process.stdin:
                process.stdin.write(text.encode())
        except BrokenPipeError as error:
            raise ServerError(f"{command[0]} does not read its input: {_tail(log)}") from error
        seen, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
        line = process.stdout.readline().decode() if seen else ""
        if not line.startswith(ready):
            raise ServerError(f"{command[0]} is not ready: {line.strip() or _tail(log) or 'it says nothing'}")
        yield Server(process.pid)


@contextmanager
def daemonized(command: list[str], *, pid: Path) -> Iterator[Server]:
    """Start a server that goes to the background when it is ready, and writes its process id to `pid` (QEMU's storage
    daemon). Raises ServerError.
    """
    command = [*command, "--daemonize", "--pidfile", str(pid)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerError(f"{command[0]} is not ready: {done.stderr.strip()}")
    number = int(pid.read_text())
    process = os.pidfd_open(number)
    try:
        yield Server(number)
    finally:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        ended, _, _ = select.select([process], [], [], _STOP_SECONDS)
        os.close(process)
    if not ended:
        raise ServerError(f"{command[0]} (process {number}) does not end")


@contextmanager
def _ending(process: subprocess.Popen[bytes], log: Path, status: int = 0) -> Iterator[None]:
    """Send SIGTERM at the end, then SIGKILL if there is no effect. Raises ServerError if a server that was used without
    errors does not end with `status`.
    """
    try:
        yield
    except BaseException:
        _stop(process)
        raise
    if (code := _stop(process)) != status:
        raise ServerError(f"{process.args!r} ended with {code}: {_tail(log)}")


def _stop(process: subprocess.Popen[bytes]) -> int:
    process.terminate()
    try:
        return process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _tail(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").split())[-400:]
