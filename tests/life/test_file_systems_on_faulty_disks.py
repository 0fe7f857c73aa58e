"""File systems on disks that drop writes, fail, are slow, or are recorded: the verdicts of xfstests' cases with the
kernel's targets (tests/kernel/test_file_systems_compared.py).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from file_systems_compared import PACKAGES, said_of, verdicts, with_blkloom

from .attached import Program, life
from .conftest import Life

__all__ = ["life"]


@pytest.mark.parametrize("system", ["ext4", "xfs", "btrfs"])
def test_verdicts_are_those_of_the_kernels_targets(
    life: Life, blkloom: str, program: Program, tmp_path: Path, system: str
) -> None:
    make = f"mkfs.{system}"
    program(make, PACKAGES[make])
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(blkloom).parent), os.environ["PATH"], "/usr/sbin", "/sbin"]),
        "BLKLOOM_RUN_DIR": str(life.run_dir),
        "SYSTEMS": system,
        "LC_ALL": "C",
    }
    done = subprocess.run(
        ["bash", "-c", with_blkloom(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert said_of(system, done.stdout) == verdicts(system)
