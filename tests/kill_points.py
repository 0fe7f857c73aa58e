"""Kill points: processes of blkloom are killed just before a certain step of one of them.

A step is an audit event of Python (PEP 578) that changes something outside of the process: a file made, renamed or
removed, an ioctl, a message or descriptors sent, a process started, commands to a driver of the kernel that follow. So
no code of blkloom knows of kill points. Python imports this module in every process with `KillPoints.environment`. A
test arms a `Plan`: from then on the steps of the processes with its role are counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

VARIABLE = "BLKLOOM_TEST_KILL_PLAN"
"""Path of the plan."""
STEPS = frozenset({"os.rename", "os.remove", "os.symlink", "fcntl.ioctl", "subprocess.Popen", "socket.sendmsg"})
AFTER_A_STEP = frozenset({"/proc/self/mountinfo"})
"""Files that are read after a mount was made."""
_ITSELF = 0


class Plan(NamedTuple):
    """role: what the process runs, such as "blkloom.supervisor". step: 1 for the first after it was armed. victims:
    pids; 0 for the process itself, which is killed last. number: of the plan.
    """

    number: int
    role: str
    step: int
    victims: list[int]


class KillPoints:
    """The test's end. environment: for the processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._plan = folder / "plan"
        self._reached = folder / "plan.reached"
        self._number = 0
        (folder / "sitecustomize.py").write_text("import kill_points\nkill_points.begin()\n")
        here = os.path.dirname(os.path.abspath(__file__))
        self.environment = {"PYTHONPATH": f"{folder}:{here}", VARIABLE: str(self._plan)}

    def arm(self, role: str, step: int, *victims: int) -> None:
        """Processes count their steps from now on. victims: see `Plan`."""
        self._reached.unlink(missing_ok=True)
        aside = self.folder / "plan.new"
        self._number += 1
        aside.write_text(json.dumps(Plan(self._number, role, step, list(victims))))
        aside.rename(self._plan)

    @property
    def is_reached(self) -> bool:
        """Whether the victims are killed."""
        return self._reached.exists()

    def disarm(self) -> str:
        """The step at which the victims were killed; "" if it was not reached."""
        self._plan.unlink(missing_ok=True)
        return self._reached.read_text() if self._reached.exists() else ""


def begin() -> None:
    """Called in every process."""
    if plan := os.environ.get(VARIABLE):
        sys.addaudithook(_hook(plan, _role(sys.orig_argv), os.getpid()))


def _role(words: list[str]) -> str:
    """The module that was run, and the task of a task process; "blkloom" and the verb of a command. The hook calls a
    worker "fork of" its module.
    """
    if len(words) > 2 and os.path.basename(words[1]) == "blkloom":
        return f"blkloom {words[2]}"
    module = words[words.index("-m") + 1] if "-m" in words else ""
    return f"{module} {words[-1]}" if module == "blkloom.attach.tasks" else module


def _hook(path: str, role: str, process: int) -> Callable[[str, tuple[Any, ...]], None]:
    seen, number = 0, 0
    busy = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen, number, busy
        if busy or not _is_step(event, arguments):
            return
        mine = role if os.getpid() == process else f"fork of {role}"
        busy = True
        try:
            with contextlib.suppress(FileNotFoundError):
                plan = Plan(*json.loads(_read(path)))
                if plan.role == mine:
                    seen, number = seen + 1 if number == plan.number else 1, plan.number
                    if seen == plan.step and _write(f"{path}.reached", f"{event} {arguments}"):
                        _kill(plan.victims)
        finally:
            busy = False

    return hook


def _is_step(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether something outside of the process changes, or has just changed by a call that is no event."""
    if event == "socket.__new__":
        return bool(arguments[1] == socket.AF_NETLINK)
    if event != "open":
        return event in STEPS
    path, _, flags = arguments
    changes = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_PATH | os.O_CREAT))
    return path in AFTER_A_STEP or (
        changes and isinstance(path, str) and path.startswith(("/dev/loop", "/dev/ublk", "/tmp/"))
    )


def _kill(victims: list[int]) -> None:
    for victim in victims:
        if victim != _ITSELF:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
    if _ITSELF in victims:
        os.kill(os.getpid(), signal.SIGKILL)


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 1 << 16)
    finally:
        os.close(descriptor)


def _write(path: str, text: str) -> bool:
    """Makes a file. False: there is one, of another process that has reached the step before."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    os.write(descriptor, text.encode())
    os.close(descriptor)
    return True
