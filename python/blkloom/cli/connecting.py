"""How the command reaches its supervisor."""

from __future__ import annotations

import os

from blkloom.control.absent import AbsentClient
from blkloom.control.client import Client
from blkloom.control.rundir import RunDir
from blkloom.errors import NoSupervisor


def connect(run_dir: str | None, *, start: bool = True) -> Client:
    """A client of the run directory's supervisor. start: start one if there is none."""
    return Client(run_dir, start=start)


def look(run_dir: str | None) -> Client:
    """The same for commands that make nothing: a supervisor is started only where one that has gone left devices."""
    where = directory(run_dir)
    try:
        return Client(where.path, start=False)
    except NoSupervisor:
        return Client(where.path) if where.has_devices() else AbsentClient(where)


def directory(run_dir: str | None) -> RunDir:
    """The run directory that is meant."""
    return RunDir.default(os.environ) if run_dir is None else RunDir.at(run_dir)
