"""Two thousand devices are created and removed, and leave nothing behind."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from .conftest import Life

DEVICES = int(os.environ.get("BLKLOOM_DEVICES", "2000"))
_, LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)
FILES = 4 * DEVICES  # what the supervisor holds for them, and some to spare
pytestmark = [
    pytest.mark.timeout(290),
    pytest.mark.skipif(LIMIT < FILES, reason=f"{DEVICES} devices need {FILES} open files; the hard limit is {LIMIT}"),
]


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def private(pid: int) -> int:
    """KiB of private memory."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def test_two_thousand_devices_are_made_listed_and_removed(life: Life) -> None:
    with life.client() as client:
        client.create("first", table="0 8 zero")  # what is made once is not counted
        client.remove("first")
        before = descriptors(life.process.pid), life.processes()
        memory = private(life.process.pid)
        for number in range(DEVICES):
            client.create(f"d{number}", table="0 2048 zero", uuid=f"uuid-{number}")
        infos = client.info()
        assert [info.name for info in infos] == [f"d{number}" for number in range(DEVICES)]
        assert len({info.worker for info in infos}) == DEVICES
        assert all((life.run_dir / "dev" / info.name).is_socket() for info in infos)
        for info in infos:
            client.remove(info.name)
        assert client.info() == []
        assert (descriptors(life.process.pid), life.processes()) == before
        assert private(life.process.pid) < 2 * memory + DEVICES * 8, "the supervisor keeps what was removed"
