"""Files under load while workers are killed and replaced and tables are swapped: no request fails, no data is lost.

The time that requests wait for another worker is printed (`pytest -s`) as fio's longest latency.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blkloom.control.client import Client
from conformance.file_systems import MiB, loop_device, mounted, needs_root, run
from faulty_fs import needs_fuse

from .conftest import Life, a_life, info, until

Program = Callable[[str, str], str]
KILLS = int(os.environ.get("BLKLOOM_KILLS", "50"))
UPGRADES = int(os.environ.get("BLKLOOM_UPGRADES", "20"))
SWAPS = 50
FILES = 20
SIZE = 32 * MiB
SECTORS = SIZE // 512
pytestmark = pytest.mark.timeout(280)


@pytest.fixture
def life() -> Iterator[Life]:
    """A supervisor of the test's own."""
    needs_fuse()
    with a_life() as life:
        yield life


@pytest.fixture
def disk(client: Client, tmp_path: Path) -> Path:
    """A device on a file, and in memory behind that, as a file."""
    (tmp_path / "disk.img").write_bytes(bytes(SIZE // 2))
    client.create("disk", table=table(tmp_path))
    return Path(client.export("disk", kind="fuse").path)


def table(folder: Path) -> str:
    half = SECTORS // 2
    return f"0 {half} loop {folder}/disk.img\n{half} {half} loop {folder}/disk.img.2\n"


@pytest.fixture(autouse=True)
def second_file(tmp_path: Path) -> None:
    (tmp_path / "disk.img.2").write_bytes(bytes(SIZE // 2))


class Load:
    """fio on a file: it writes with checksums, and reads everything back, until `finish`."""

    def __init__(self, program: Program, path: Path, folder: Path) -> None:
        self._result = folder / "fio.json"
        command = [
            program("fio", "fio"),
            "--name=load",
            f"--filename={path}",
            "--ioengine=libaio",
            "--direct=1",
            "--rw=randwrite",
            "--bs=4k-64k",
            "--iodepth=16",
            f"--size={SIZE}",
            "--loops=100000",
            "--verify=crc32c",
            "--verify_backlog=128",
            "--verify_fatal=1",
            "--serialize_overlap=1",  # of two writes to one block that are under way together either may win
            "--fsync=64",
            "--allow_file_create=0",
            "--output-format=json",
            f"--output={self._result}",
        ]
        self._process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL)

    def wait_for_progress(self, client: Client) -> None:
        """Until the device has had requests since: of a worker that came meanwhile, too."""
        before = self._requests(client)
        while (now := self._requests(client)) == before or not now:
            assert self._process.poll() is None, self._result.read_text()

    def _requests(self, client: Client) -> int:
        """0: another worker is on its way up."""
        exports = client.stats("disk").get("disk", {"exports": {}})["exports"]
        return sum(exports.get("auto-fuse", {}).get(name, {"count": 0})["count"] for name in ("read", "write"))

    def finish(self) -> float:
        """Ends it. Seconds that the slowest request took."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(120)
        text = self._result.read_text()
        (job,) = json.loads(text[text.index("{") :])["jobs"]
        assert job["error"] == 0, text
        assert "verify:" not in text, text
        return float(max(job[kind]["clat_ns"]["max"] for kind in ("read", "write", "trim"))) / 1e9


def test_a_load_goes_on_while_the_worker_is_killed(
    client: Client, disk: Path, program: Program, tmp_path: Path
) -> None:
    load = Load(program, disk, tmp_path)
    for _ in range(KILLS):
        load.wait_for_progress(client)
        before = info(client, "disk").worker
        os.kill(before, signal.SIGKILL)
        until(client, "disk", lambda found, before=before: found.worker not in (0, before))  # type: ignore[misc]
    load.wait_for_progress(client)
    slowest = load.finish()
    assert info(client, "disk").restarts == KILLS
    print(f"worker killed {KILLS} times: the slowest request took {slowest * 1000:.0f} ms")


def test_a_load_goes_on_while_the_program_is_upgraded(
    client: Client, disk: Path, program: Program, tmp_path: Path
) -> None:
    load = Load(program, disk, tmp_path)
    for _ in range(UPGRADES):
        load.wait_for_progress(client)
        assert client.upgrade() == 1
    load.wait_for_progress(client)
    slowest = load.finish()
    print(f"upgraded {UPGRADES} times: the slowest request took {slowest * 1000:.0f} ms")


def test_a_load_goes_on_while_tables_are_swapped(client: Client, disk: Path, program: Program, tmp_path: Path) -> None:
    load = Load(program, disk, tmp_path)
    for turn in range(SWAPS):
        load.wait_for_progress(client)
        client.load("disk", table(tmp_path))
        if turn % 2:
            client.suspend("disk")
        client.resume("disk")
    load.wait_for_progress(client)
    slowest = load.finish()
    print(f"{SWAPS} tables swapped: the slowest request took {slowest * 1000:.0f} ms")


def test_a_mounted_file_system_outlives_its_workers(
    client: Client, disk: Path, program: Program, tmp_path: Path
) -> None:
    needs_root("a file system on a loop device")
    run(program("mkfs.ext4", "e2fsprogs"), "-q", disk)
    contents = random.Random(1).randbytes(64 << 10)
    with (
        loop_device(program, disk) as device,
        mounted(program, "ext4", device, tmp_path / "mounted", "errors=remount-ro") as folder,
    ):
        for turn in range(FILES):
            os.kill(until(client, "disk", lambda found: found.worker != 0).worker, signal.SIGKILL)
            with (folder / f"{turn}").open("wb") as file:
                file.write(contents[turn:])
                file.flush()
                os.fsync(file.fileno())
            if turn % 5 == 4:
                assert client.upgrade() == 1
        assert all((folder / f"{turn}").read_bytes() == contents[turn:] for turn in range(FILES))
    run(program("e2fsck", "e2fsprogs"), "-f", "-n", disk)
    with (
        loop_device(program, disk, read_only=True) as device,
        mounted(program, "ext4", device, tmp_path / "mounted", "ro") as folder,
    ):
        assert all((folder / f"{turn}").read_bytes() == contents[turn:] for turn in range(FILES))
