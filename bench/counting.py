"""Counts the system calls and context switches of a process with perf.

Counting slows down every system call of the machine, so it has a separate run, whose speed is not measured. Threads
that start or end during the run are counted, too. Source: perf-stat(1).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Final

_EVENTS: Final = {"raw_syscalls:sys_enter": "calls", "context-switches": "switches"}
_SECONDS: Final = 20.0


class CountError(Exception):
    """perf did not count; the text has its output."""


@dataclass
class Counts:
    """Counts of all threads of one process; available when the counting has ended."""

    calls: int = 0
    switches: int = 0


@cache
def lack() -> str:
    """The reason why perf cannot count here; "" if it can."""
    if not shutil.which("perf"):
        return "perf is not installed (Debian: apt install linux-perf)"
    tried = subprocess.run(
        ["perf", "stat", "-x,", "-e", ",".join(_EVENTS), "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode or "<not" in tried.stderr:
        return f"perf cannot count {' and '.join(_EVENTS)} here: {' '.join(tried.stderr.split())[:200]}"
    return ""


@contextmanager
def counted(pid: int) -> Iterator[Counts]:
    """Count the calls and switches of process `pid` in the block. Raises CountError, OSError."""
    found = Counts()
    orders, give = os.pipe()
    answers, answer = os.pipe()
    # Counting begins when perf has said so, not when it has been started.
    command = ["perf", "stat", "-x,", "--delay=-1", f"--control=fd:{orders},{answer}"]
    command += ["-e", ",".join(_EVENTS), "-p", str(pid)]
    with os.fdopen(give, "w") as order, os.fdopen(answers) as acknowledged:
        try:
            perf = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, pass_fds=(orders, answer)
            )
        finally:
            os.close(orders)
            os.close(answer)
        try:
            order.write("enable\n")
            order.flush()
            if acknowledged.readline().strip("\0\n") != "ack":
                raise CountError(f"perf does not begin to count: {_said(perf)}")
            yield found
            said = _said(perf)
        except BrokenPipeError as error:
            raise CountError(f"perf has ended: {_said(perf)}") from error
        finally:
            perf.kill()
            perf.wait()
    for line in said.splitlines():
        count, _, event, *_ = (line + ",,").split(",")
        if event in _EVENTS:
            if not count.isdecimal():
                raise CountError(f"perf counted nothing: {line}")
            setattr(found, _EVENTS[event], int(count))


def _said(perf: subprocess.Popen[str]) -> str:
    """End perf, and return the counts that it prints."""
    perf.send_signal(signal.SIGINT)
    try:
        return perf.communicate(timeout=_SECONDS)[1]
    except subprocess.TimeoutExpired as error:
        raise CountError("perf does not end") from error
