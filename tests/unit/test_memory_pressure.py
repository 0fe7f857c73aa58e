"""What a process that serves a block device does before memory runs out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from blkloom.export import memory_pressure

PROGRAM = """
from blkloom.export.memory_pressure import CAP_SYS_RESOURCE, avoid_oom_killer, is_capable

assert avoid_oom_killer() is is_capable(CAP_SYS_RESOURCE)
print(open("/proc/self/oom_score_adj").read().strip() if is_capable(CAP_SYS_RESOURCE) else -900)
"""


def test_a_process_avoids_the_oom_killer_if_it_is_permitted_to() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == "-900\n"


@pytest.mark.parametrize(("before", "after"), [("0", "-900"), ("200", "-900"), ("-1000", "-1000")])
def test_a_process_that_avoids_it_more_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    file = tmp_path / "oom_score_adj"
    file.write_text(before)
    monkeypatch.setattr(memory_pressure, "_OOM_FILE", str(file))
    assert memory_pressure.avoid_oom_killer()
    assert file.read_text() == after
