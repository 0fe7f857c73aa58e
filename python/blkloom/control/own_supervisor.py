"""A private supervisor of this program in a temporary run directory. It always ends with the program.

A guard, which is this module run as a program, starts the supervisor and waits for the end of the program: a byte in a
pipe, the end of the pipe, or the end of the program's process (a fork of the program may also have the pipe open). Then
it stops all processes that serve devices in the run directory, also a successor of the supervisor and workers without a
supervisor, and removes the directory. It has its own session, so that a signal to the program's session does not end
it. If a process cannot be stopped, the directory stays, and its `guard.log` has the reason.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from blkloom.control.client import Client
from blkloom.control.framing import ChannelClosed
from blkloom.control.rundir import RunDir
from blkloom.errors import BlkloomError, NoSupervisor
from blkloom.printing import described

_LONGEST_FOLDER: Final = 40
"""Bytes of the directory for temporary files: paths of sockets below it must fit 107."""
_READY: Final = b"1"
_ATTEMPTS: Final = 3
"""Number of supervisors that may be killed during a stop before that is an error."""


@contextmanager
def own_supervisor() -> Iterator[RunDir]:
    """Context manager: the run directory of a new supervisor. At the end its devices are removed, even with connected
    clients, and all its processes have ended. Raises NoSupervisor if it cannot be started or stopped.
    """
    temporary = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="blk", dir="/tmp" if len(os.fsencode(temporary)) > _LONGEST_FOLDER else temporary)
    with subprocess.Popen(
        [sys.executable, "-m", "blkloom.control.own_supervisor", folder, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    ) as guard:
        assert guard.stdin is not None
        assert guard.stdout is not None
        try:
            if guard.stdout.read(1) == _READY:
                yield RunDir.at(_run_dir(folder))
        finally:
            with suppress(BrokenPipeError):  # it could not start one, and has ended
                os.write(
                    guard.stdin.fileno(), b"\n"
                )  # closing is not enough: a fork of the program may have the pipe open
            status = guard.wait()
    if status:
        said = Path(folder, "guard.log").read_text(errors="replace").splitlines()
        why = said[-1] if said else f"its guard ended with status {status}"
        raise NoSupervisor(f"a supervisor of {folder} cannot be started or stopped: {why}", cure=f"see {folder}")


def _run_dir(folder: str) -> str:
    return os.path.join(folder, "run")


def _guard(folder: str, parent: int) -> None:
    """Waits for the end of the program, then stops all processes of the run directory. Raises BlkloomError, OSError."""
    run_dir = RunDir.at(_run_dir(folder))
    try:
        Client(run_dir.path).close()
        with suppress(BrokenPipeError):  # the program has ended already
            os.write(sys.stdout.fileno(), _READY)
        _wait_for_end_of(parent)
    finally:
        _stop_all(run_dir)


def _wait_for_end_of(parent: int) -> None:
    """Waits for the end of the parent process, or for a byte or the end of file in the pipe."""
    waiting = select.poll()
    waiting.register(sys.stdin.fileno(), select.POLLIN)
    process = os.pidfd_open(parent) if os.getppid() == parent else None
    try:
        if process is not None:
            waiting.register(process, select.POLLIN)
        if os.getppid() == parent:  # otherwise the number may belong to another process by now
            waiting.poll()
    finally:
        if process is not None:
            os.close(process)


def _stop_all(run_dir: RunDir) -> None:
    """Stops all supervisors and workers of the run directory. Raises BlkloomError, OSError."""
    for attempts_left in reversed(range(_ATTEMPTS)):
        try:
            _stop(run_dir)
        except ChannelClosed:  # it was just killed; its successor gets the remaining devices
            if not attempts_left:
                raise
            _wait_for_supervisor(run_dir)
        else:
            _wait_for_supervisor(run_dir)
            return


def _stop(run_dir: RunDir) -> None:
    """Stops the supervisor; if there is none but devices are left, starts one and stops it."""
    try:
        client = Client(run_dir.path, start=run_dir.has_devices())
    except NoSupervisor:
        if run_dir.has_devices():
            raise
        return
    with client:
        client.stop(force=True)


def _wait_for_supervisor(run_dir: RunDir) -> None:
    """Waits until the process that holds the lock has ended, if there is one."""
    with suppress(FileNotFoundError), open(run_dir.lock, "rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


def main(folder: str, parent: str) -> int:
    """`python -m blkloom.control.own_supervisor FOLDER PARENT`. Returns the exit status."""
    with open(os.path.join(folder, "guard.log"), "ab") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    try:
        _guard(folder, int(parent))
    except (BlkloomError, OSError) as error:
        print(f"blkloom: {described(error)}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
