"""One script, run with dmsetup on a kernel and with blkloom: output, exit status and contents of devices are compared.

`dmsetup_compared.sh` is the script, and `dmsetup_nodes_compared.sh` its part about options for nodes, for which blkloom
must be able to make block devices. `dmsetup_transcript.py` removes expected differences, and `dmsetup_differences.py`
lists the steps with intended differences. All other steps must be equal.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from compared import by_blkloom, by_dmsetup
from dmsetup_differences import DIFFERENCES
from guest import Guest

from blkloom.attach import registry as ways
from long_runs import only_long

HERE = Path(__file__).parent
SCRIPT = HERE / "dmsetup_compared.sh"
NODES = HERE / "dmsetup_nodes_compared.sh"
DOCUMENT = HERE.parents[1] / "docs" / "dmsetup.md"


@pytest.mark.kernel
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("udev", [False, pytest.param(True, marks=only_long)], ids=["without udev", "with udev"])
def test_a_script_of_dmsetups_does_the_same_with_blkloom(
    blkloom: str, guest: Guest, program: Callable[[str, str], str], tmp_path_factory: pytest.TempPathFactory, udev: bool
) -> None:
    for name, package in (("nbdcopy", "libnbd-bin"), ("nbdsh", "libnbd-bin"), ("dmsetup", "dmsetup")):
        program(name, package)
    script = SCRIPT.read_text() + (NODES.read_text() if not ways.way("loop").lacks() else "")
    ours_ = by_blkloom(blkloom, script, tmp_path_factory.mktemp("blkloom"))
    theirs_ = by_dmsetup(dataclasses.replace(guest, udev=udev), script, ["dm-zero"])
    assert [step.command for step in ours_] == [step.command for step in theirs_]
    expected = {difference.command for difference in DIFFERENCES}
    different = [(ours, theirs) for ours, theirs in zip(ours_, theirs_, strict=True) if ours.lines != theirs.lines]
    unexpected = [
        f"## {ours.title}\n{theirs}\n--- with blkloom\n{ours}"
        for ours, theirs in different
        if ours.command not in expected
    ]
    assert not unexpected, "\n\n".join(unexpected)
    assert {ours.command for ours, _ in different} == expected, "differences that are none any more"


def test_the_document_shows_the_differences_there_are() -> None:
    shown = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `dm ")]
    assert shown == [difference.row() for difference in DIFFERENCES]


@pytest.mark.parametrize("script", ["dmsetup_compared.sh", "dmsetup_nodes_compared.sh", "targets_compared.sh"])
def test_the_scripts_are_ones_a_shell_can_read(script: str) -> None:
    bash = shutil.which("bash")
    assert bash, "the shell of these tests"
    subprocess.run([bash, "-n", HERE / script], check=True)
