"""Table swaps, suspend, resume and new workers while fio writes and verifies."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Life
from .verifying import Verifying

CHANGES = int(os.environ.get("BLKLOOM_CHANGES", "1000"))
JOBS, SIZE = 3, 4 << 20
SECTORS = JOBS * SIZE // 512
pytestmark = pytest.mark.timeout(290)


def same_bytes(path: Path, chance: random.Random) -> str:
    """A table that maps the whole device to the file byte for byte, cut differently every time."""
    cuts = sorted(chance.sample(range(1, SECTORS), chance.randrange(6)))
    lines = []
    for start, end in zip([0, *cuts], [*cuts, SECTORS], strict=True):
        way = chance.choice([f"linear {path} {start}", f"loop {path} {start * 512}"])
        lines.append(f"{start} {end - start} {way}")
    return "\n".join(lines)


@pytest.fixture
def device(life: Life, tmp_path: Path) -> Path:
    """A device `disk` on a file; the file."""
    backing = tmp_path / "disk.img"
    backing.write_bytes(bytes(SECTORS * 512))
    with life.client() as client:
        client.create("disk", table=f"0 {SECTORS} loop {backing}")
    return backing


def start(program: Callable[[str, str], str], life: Life, folder: Path) -> Verifying:
    return Verifying(program("fio", "fio"), life.socket("disk"), jobs=JOBS, size=SIZE, loops=4, folder=folder)


def test_tables_swapped_by_the_thousand_lose_nothing(
    life: Life, device: Path, program: Callable[[str, str], str], tmp_path: Path
) -> None:
    chance, changes = random.Random(3), 0
    with life.client() as client:
        fio = start(program, life, tmp_path)
        while changes < CHANGES or fio.running():
            if not fio.running():
                fio.finish()
                fio = start(program, life, tmp_path)
            client.load("disk", same_bytes(device, chance))
            client.resume("disk")
            changes += 1
        fio.finish()
        (info,) = client.info("disk")
        assert info.restarts == 0


def test_suspends_and_resumes_by_the_thousand_lose_nothing(
    life: Life, device: Path, program: Callable[[str, str], str], tmp_path: Path
) -> None:
    changes = 0
    with life.client() as client:
        fio = start(program, life, tmp_path)
        while changes < CHANGES or fio.running():
            if not fio.running():
                fio.finish()
                fio = start(program, life, tmp_path)
            client.suspend("disk", flush=changes % 2 == 0)
            client.resume("disk")
            changes += 1
        fio.finish()


def test_a_worker_replaced_under_load_is_not_noticed(
    life: Life, device: Path, program: Callable[[str, str], str], tmp_path: Path
) -> None:
    with life.client() as client:
        workers = {client.info("disk")[0].worker}
        fio = start(program, life, tmp_path)
        upgrades = 0
        while upgrades < 5 or fio.running():
            if not fio.running():
                fio.finish()
                fio = start(program, life, tmp_path)
            with life.client() as asking:
                asking.upgrade()
            upgrades += 1
            with life.client() as asking:
                (info,) = asking.info("disk")
            assert info.state == "ACTIVE"
            workers.add(info.worker)
        fio.finish()
        assert len(workers) == upgrades + 1, "a worker was not replaced"
