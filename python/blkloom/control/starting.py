"""Connects to a supervisor, and starts one if none runs.

A supervisor is trusted if it runs as this user or root, and if no other user can change its run directory
(`RunDir.open_sockets`). The command that starts it holds `start.lock` and tries to connect again first, so that two
commands start only one supervisor. The supervisor has its own session and reports over a pipe that it is ready.
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
from blkloom.errors import NoSupervisor, UsageError
from blkloom.peer_credentials import peer_credentials

_READY_SECONDS: Final = 120.0
"""A start takes a quarter of a second, but thirty times that on an emulated processor, and more if that has other work.
That the supervisor has ended is seen at once.
"""
IDLE_SECONDS: Final = 60.0
"""Idle timeout in seconds of a supervisor that a command has started."""


def connect(run_dir: RunDir, *, start: bool, idle: float = IDLE_SECONDS) -> socket.socket:
    """Connects to the supervisor. start: start one if none runs. idle: seconds without devices and clients after which
    that supervisor ends. Raises NoSupervisor, UsageError, OSError.
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
    """Connects; returns None if no process listens."""
    try:
        directory = run_dir.open_sockets()
    except FileNotFoundError:
        return None
    connecting = socket.socket(socket.AF_UNIX)
    try:
        connecting.connect(f"/proc/self/fd/{directory}/{run_dir.control.name}")
        if not (peer := peer_credentials(connecting)).may_command:
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
    """Starts a supervisor and waits until it accepts clients. Raises NoSupervisor."""
    import subprocess  # imported here: most commands find a running supervisor

    reading, writing = os.pipe2(os.O_CLOEXEC)
    command = [sys.executable, "-m", "blkloom.supervisor", "--run-dir", str(run_dir.path)]
    command += ["--idle-timeout", str(idle), "--ready-fd", str(writing)]
    with open(reading, "rb") as ready:
        try:
            with open(run_dir.log, "ab") as log:
                # A shell starts it and ends at once: the supervisor must not be a child of this process.
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
        waiting = select.poll()  # select(2) does not support descriptors above 1023
        waiting.register(ready, select.POLLIN)
        seen = waiting.poll(_READY_SECONDS * 1000)
        if seen and ready.read(1):
            return
    ended = "it ended" if seen else f"it is not ready after {_READY_SECONDS:g} s"
    raise NoSupervisor(f"a supervisor of {run_dir.path} cannot be started: {ended}", cure=f"see {run_dir.log}")
