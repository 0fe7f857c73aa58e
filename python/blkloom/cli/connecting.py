"""Connects the command to the supervisor of the run directory."""

from __future__ import annotations

import os

from blkloom.control.absent import AbsentClient
from blkloom.control.client import Client
from blkloom.control.rundir import RunDir
from blkloom.errors import BlkloomError, BusyError, NoSupervisor


def connect(run_dir: str | None, *, start: bool = True) -> Client:
    """Connects to the supervisor of the run directory. start: start a supervisor if none runs."""
    return Client(run_dir, start=start)


def look(run_dir: str | None) -> Client:
    """The same for commands that make no device: starts a supervisor only if a former one has left devices."""
    where = directory(run_dir)
    try:
        return Client(where.path, start=False)
    except NoSupervisor:
        return Client(where.path) if where.has_devices() else AbsentClient(where)


def with_holders(error: BusyError, run_dir: str | None) -> BusyError:
    """Adds device names to the error about a file in use, if a supervisor runs and answers."""
    try:
        with Client(directory(run_dir).path, start=False) as client:
            return client.with_holders(error)
    except (BlkloomError, OSError):
        return error


def directory(run_dir: str | None) -> RunDir:
    """The run directory of this command."""
    return RunDir.default(os.environ) if run_dir is None else RunDir.at(run_dir)
