"""Reaching a supervisor, and starting one where there is none.

A supervisor is believed if it is this user's or root's, and its run directory nobody else's (`open_private`).
Whoever starts it holds `start.lock` and looks again first, so that two commands start one supervisor.
It is detached (a session of its own) and says it is ready over a pipe.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import sys
from typing import Final

from blkloom.control.rundir import RunDir
from blkloom.control.trusted_path import open_private
from blkloom.errors import NoSupervisor, UsageError
from blkloom.peer import peer_of

_READY_SECONDS: Final = 30.0
IDLE_SECONDS: Final = 60.0
"""A supervisor that a command started ends when it has had neither devices nor clients for so long."""


def connect(run_dir: RunDir, *, start: bool, idle: float = IDLE_SECONDS) -> socket.socket:
    """A connection to the supervisor. start: start one if there is none. idle: seconds after which that one
    ends if it has neither devices nor clients. Raises NoSupervisor, UsageError, OSError.
    """
    if (connected := _try(run_dir)) is not None:
        return connected
    if not start:
        raise NoSupervisor(f"no supervisor answers at {run_dir.control}", cure="start one: blkloom supervisor")
    run_dir.make()
    with open(run_dir.start_lock, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (connected := _try(run_dir)) is None:
            _start(run_dir, idle)
            connected = _try(run_dir)
    if connected is None:
        raise NoSupervisor(f"the supervisor of {run_dir.path} ended at once", cure=f"see {run_dir.log}")
    return connected


def _try(run_dir: RunDir) -> socket.socket | None:
    """None where nobody listens."""
    try:
        directory = open_private(run_dir.path)
    except FileNotFoundError:
        return None
    connecting = socket.socket(socket.AF_UNIX)
    try:
        connecting.connect(f"/proc/self/fd/{directory}/{run_dir.control.name}")
        if not (peer := peer_of(connecting)).may_command:
            raise UsageError(
                f"the supervisor at {run_dir.control} is of user {peer.uid}, you are user {os.geteuid()}",
                cure="choose another run directory with --run-dir or BLKLOOM_RUN_DIR",
                errno=errno.EPERM,
            )
    except (FileNotFoundError, ConnectionRefusedError):
        connecting.close()
        return None
    except BaseException:
        connecting.close()
        raise
    finally:
        os.close(directory)
    return connecting


def _start(run_dir: RunDir, idle: float) -> None:
    """Returns once it accepts clients. Raises NoSupervisor."""
    import subprocess  # most commands find a supervisor

    reading, writing = os.pipe2(os.O_CLOEXEC)
    command = [sys.executable, "-m", "blkloom.supervisor", "--run-dir", str(run_dir.path)]
    command += ["--idle-timeout", str(idle), "--ready-fd", str(writing)]
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
        waiting = select.poll()  # select(2) knows no descriptors above 1023
        waiting.register(ready, select.POLLIN)
        seen = waiting.poll(_READY_SECONDS * 1000)
        if seen and ready.read(1):
            return
    ended = "it ended" if seen else f"it is not ready after {_READY_SECONDS:g} s"
    raise NoSupervisor(f"a supervisor of {run_dir.path} cannot be started: {ended}", cure=f"see {run_dir.log}")
