"""Nodes of the ublk driver and of the kernel's NBD client: deaths of supervisor and workers at steps of attach and
detach leave nothing stale and no process that hangs (`node_deaths.py`); `save` and `restore` make them again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from guest import Guest

from long_runs import LONG

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(0 if LONG else 900)]
PROGRAM = Path(__file__).with_name("node_deaths.py")
KILL_POINTS = PROGRAM.parents[1] / "kill_points.py"
SECONDS = 3 * 3600.0 if LONG else 600.0

SCRIPT = """
export BLKLOOM_RUN_DIR=/run/deaths/run
mkdir /run/deaths
{python} {program} {options}
kernel_is_content
"""


def test_nothing_stale_after_deaths_and_the_same_nodes_after_save_and_restore(guest: Guest) -> None:
    for program in (PROGRAM, KILL_POINTS):
        (guest.directory / program.name).write_bytes(program.read_bytes())
    script = SCRIPT.format(python=sys.executable, program=PROGRAM.name, options="--thorough" if LONG else "")
    printed = guest.run(script, modules=["ublk_drv", "nbd"], timeout=SECONDS)
    print(printed)
    lines = printed.splitlines()
    ublk = {"via": "ublk", "read_only": True, "partscan": True, "shared": True, "on_failure": "fail"}
    nbd = {"via": "nbd", "read_only": False, "partscan": False, "shared": True, "timeout": 7, "connections": 1}
    assert lines[:2] == [str(ublk), str(nbd)]
    assert lines[-1].startswith("stop, attached by nbd: ")
