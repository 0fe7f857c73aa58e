"""Reaching a supervisor, and starting one where there is none.

Whoever starts it holds `start.lock` and looks again first, so that two commands start one supervisor.
It is detached (a session of its own) and says it is ready over a pipe.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import subprocess
import sys
from typing import Final

from blkloom.control.rundir import RunDir
from blkloom.errors import NoSupervisor

_READY_SECONDS: Final = 30.0


def connect(run_dir: RunDir, *, start: bool) -> socket.socket:
    """A connection to the supervisor. Raises NoSupervisor, UsageError, OSError."""
    if (connected := _try(run_dir)) is not None:
        return connected
    if not start:
        raise NoSupervisor(f"no supervisor answers at {run_dir.control}", cure="start one: blkloom supervisor")
    run_dir.make()
    with open(run_dir.start_lock, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (connected := _try(run_dir)) is None:
            _start(run_dir)
            connected = _try(run_dir)
    if connected is None:
        raise NoSupervisor(f"the supervisor of {run_dir.path} ended at once", cure=f"see {run_dir.log}")
    return connected


def _try(run_dir: RunDir) -> socket.socket | None:
    connecting = socket.socket(socket.AF_UNIX)
    try:
        connecting.connect(str(run_dir.control))
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        connecting.close()
        return None
    except BaseException:
        connecting.close()
        raise
    return connecting


def _start(run_dir: RunDir) -> None:
    """Returns once it accepts clients. Raises NoSupervisor."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    command = [sys.executable, "-m", "blkloom.supervisor", "--run-dir", str(run_dir.path), "--ready-fd", str(writing)]
    with open(reading, "rb") as ready:
        try:
            with open(run_dir.log, "ab") as log:
                # By way of a shell that ends at once: the supervisor shall be nobody's child here.
                subprocess.run(
                    ["/bin/sh", "-c", '"$@" &', "sh", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[writing],
                    start_new_session=True,
                    cwd="/",
                    check=True,
                )
        finally:
            os.close(writing)
        seen, _, _ = select.select([ready], [], [], _READY_SECONDS)
        if seen and ready.read(1):
            return
    ended = "it ended" if seen else f"it is not ready after {_READY_SECONDS:g} s"
    raise NoSupervisor(f"a supervisor of {run_dir.path} cannot be started: {ended}", cure=f"see {run_dir.log}")
