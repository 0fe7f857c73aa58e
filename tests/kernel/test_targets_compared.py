"""The targets for tests: one script of tables, messages and I/O, with dmsetup on kernels and with blkloom."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from compared import by_blkloom, by_dmsetup
from guest import Guest

from long_runs import only_long

SCRIPT = Path(__file__).with_name("targets_compared.sh")
MODULES = ["dm-unstripe", "dm-delay", "dm-flakey", "dm-log-writes"]
ENTRIES = 'entries() { blkloom replay "$1" --list | sed "/mark .after/q"; }\n'


@pytest.mark.kernel
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("series", ["6.12", pytest.param("7.3", marks=only_long)])
def test_targets_for_tests_do_what_the_kernels_do(
    blkloom: str,
    guest: Guest,
    program: Callable[[str, str], str],
    tmp_path_factory: pytest.TempPathFactory,
    series: str,
) -> None:
    for name, package in (("nbdcopy", "libnbd-bin"), ("nbdsh", "libnbd-bin"), ("dmsetup", "dmsetup")):
        program(name, package)
    script = ENTRIES + SCRIPT.read_text()
    ours = by_blkloom(blkloom, script, tmp_path_factory.mktemp("blkloom"))
    theirs = by_dmsetup(dataclasses.replace(guest, series=series), script, MODULES)
    assert [step.command for step in ours] == [step.command for step in theirs]
    different = [
        f"## {mine.title}\n{other}\n--- with blkloom\n{mine}"
        for mine, other in zip(ours, theirs, strict=True)
        if mine.lines != other.lines
    ]
    assert not different, "\n\n".join(different)
