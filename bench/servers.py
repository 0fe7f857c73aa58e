"""Server processes: started, known to be ready, watched and stopped; never left behind.

Ready is an event, not a guess: qemu-nbd and nbdkit go to the background when their socket listens
and leave their pid in a file; blkloom stays in the foreground and prints its URI. The end of a
process is waited for through its pidfd. Source: proc_pid_stat(5), pidfd_open(2).
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 20.0


class ServerError(Exception):
    """A server that did not start, or did not end well; the text has what it said."""


class Server:
    """A running process, by pid."""

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
def background(command: list[str], *, pid_file: Path, log: Path) -> Iterator[Server]:
    """A server that returns to the prompt when it is ready. Raises ServerError."""
    pid_file.unlink(missing_ok=True)
    with log.open("wb") as sink:
        process = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=sink, timeout=_START_SECONDS
        )
    if process.returncode:
        raise ServerError(f"{command[0]} ended with {process.returncode}: {_tail(log)}")
    pid = int(pid_file.read_text())
    watch = os.pidfd_open(pid)
    try:
        yield Server(pid)
    finally:
        _end(pid, watch)
        os.close(watch)


@contextmanager
def foreground(command: list[str], *, ready: str, log: Path, text: str | None = None) -> Iterator[Server]:
    """A server that says it is ready in a line of standard output beginning with `ready`. text: its
    standard input. Raises ServerError when it says something else first, or ends other than with 0.
    """
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink)
    assert process.stdin
    assert process.stdout
    watch = os.pidfd_open(process.pid)
    try:
        process.stdin.write((text or "").encode())
        process.stdin.close()
        seen, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
        line = process.stdout.readline().decode() if seen else ""
        if not line.startswith(ready):
            raise ServerError(f"{command[0]} is not ready: {line.strip() or _tail(log) or 'it says nothing'}")
        yield Server(process.pid)
    finally:
        _end(process.pid, watch)
        os.close(watch)
        process.stdout.close()
        code = process.wait()
    if code:
        raise ServerError(f"{command[0]} ended with {code}: {_tail(log)}")


def _end(pid: int, watch: int) -> None:
    """SIGTERM, and SIGKILL to one that does not listen."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            signal.pidfd_send_signal(watch, number)
        except ProcessLookupError:
            return
        if select.select([watch], [], [], _STOP_SECONDS)[0]:
            return
    raise ServerError(f"process {pid} does not die")


def _tail(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").split())[-400:]
