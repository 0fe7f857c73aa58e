"""File systems on nodes of a booted kernel: they go on while workers are killed and replaced, tables swapped and the
device grows (`node_survival.py`). test_ublk.py and test_nbd_nodes.py do so a few times in every run.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from guest import Guest

from long_runs import only_long

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(0), only_long]
PROGRAM = Path(__file__).with_name("node_survival.py")
SECONDS = 3 * 3600.0
KILLS, UPGRADES, SWAPS = 50, 20, 20
PACKAGES = {"ext4": ("mkfs.ext4", "e2fsprogs"), "xfs": ("mkfs.xfs", "xfsprogs"), "btrfs": ("mkfs.btrfs", "btrfs-progs")}
MODULES = {"ublk": ["ublk_drv"], "nbd": ["nbd"], "loop": ["fuse", "loop"]}

SCRIPT = """
export BLKLOOM_RUN_DIR=/run/b
for system in ext4 xfs btrfs; do
    {python} {program} --via {via} --system $system --kills {kills} --upgrades {upgrades} --swaps {swaps} --grow
done
kernel_is_content 'I/O error'
"""


@pytest.mark.parametrize("via", sorted(MODULES))
def test_file_systems_go_on_while_workers_and_tables_are_replaced(
    guest: Guest, program: Callable[[str, str], str], via: str
) -> None:
    for name, package in PACKAGES.values():
        program(name, package)
    (guest.directory / PROGRAM.name).write_bytes(PROGRAM.read_bytes())
    script = SCRIPT.format(
        via=via, python=sys.executable, program=PROGRAM.name, kills=KILLS, upgrades=UPGRADES, swaps=SWAPS
    )
    newer = dataclasses.replace(guest, series="7.3")  # Linux 6.16 can tell a ublk device another size
    printed = newer.run(script, modules=[*MODULES[via], *PACKAGES], timeout=SECONDS)
    done: dict[str, dict[str, float]] = {system: {} for system in PACKAGES}
    for line in printed.splitlines():
        if line.startswith("{"):
            part = json.loads(line)
            done[part.pop("system")] |= part
    print(json.dumps(done))
    for system, parts in done.items():
        assert (parts["via"], parts["kills"], parts["swaps"]) == (via, KILLS, SWAPS), system
        assert parts["files"] > 0, "files were written, and found again after the check"
        assert parts["grown"] > 0
