"""File systems on the kernel's faulty disks have the verdicts that tests/life/test_file_systems_on_faulty_disks.py
finds with blkloom's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from guest import Guest

from file_systems_compared import MODULES, PACKAGES, said_of, verdicts, with_dmsetup
from long_runs import only_long


@pytest.mark.kernel
@pytest.mark.timeout(1200)
@only_long
@pytest.mark.parametrize("series", ["6.12", "7.3"])
def test_verdicts_with_the_kernels_targets(guest: Guest, program: Callable[[str, str], str], series: str) -> None:
    systems = ["ext4", "xfs", "btrfs"]
    for name in ("dmsetup", *(f"mkfs.{system}" for system in systems)):
        program(name, PACKAGES.get(name, name))
    machine = dataclasses.replace(guest, series=series, memory="1500M")
    printed = machine.run(f"export SYSTEMS='{' '.join(systems)}'\n{with_dmsetup()}", modules=MODULES, timeout=900)
    for system in systems:
        assert said_of(system, printed) == verdicts(system), printed
