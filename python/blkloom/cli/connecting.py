"""How the command reaches its supervisor."""

from __future__ import annotations

import os

from blkloom.control.client import Client
from blkloom.control.rundir import RunDir


def connect(run_dir: str | None, *, start: bool = True) -> Client:
    """A client of the run directory's supervisor. start: start one if there is none."""
    return Client(run_dir, start=start)


def directory(run_dir: str | None) -> RunDir:
    """The run directory that is meant."""
    return RunDir.default(os.environ) if run_dir is None else RunDir.at(run_dir)
