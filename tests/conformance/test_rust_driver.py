"""Many requests at once on several queues of a disk over vhost-user, from the driver of libblkio, against its model."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from blkloom import Client
from blkloom.testing.serving import supervised
from long_runs import LONG, only_long
from rust_driver import rust_driver

MiB = 1 << 20
SECTORS = 16 * MiB // 512
QUEUES = 4
REQUESTS, UPGRADES = (40_000, 10) if LONG else (6_000, 2)
TABLES = {
    "file": f"0 {SECTORS} loop {{folder}}/a.img\n",
    "memory": f"0 {SECTORS} ram\n",
    "striped": f"0 {SECTORS} striped 2 16 {{folder}}/a.img 0 {{folder}}/b.img 0\n",
    "image": f"0 {SECTORS} qcow2 {{folder}}/image.qcow2\n",
}

pytestmark = pytest.mark.timeout(200)


@pytest.mark.parametrize(
    "kind", ["image", *(pytest.param(kind, marks=only_long) for kind in TABLES if kind != "image")]
)
def test_its_reads_find_what_it_has_written_also_over_upgrades(
    program: Callable[[str, str], str], tmp_path: Path, kind: str
) -> None:
    for name in ("a", "b"):
        with (tmp_path / f"{name}.img").open("wb") as file:
            file.truncate(SECTORS * 512)
    qemu_img, image = program("qemu-img", "qemu-utils"), tmp_path / "image.qcow2"
    subprocess.run([qemu_img, "create", "-q", "-f", "qcow2", image, str(SECTORS * 512)], check=True)
    with supervised() as client:
        client.create("disk", table=TABLES[kind].format(folder=tmp_path))
        path = client.export("disk", kind="vhost-user").path
        command = [rust_driver(), "model", path, str(QUEUES), str(REQUESTS), "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as driver:
            for _ in range(UPGRADES):
                before = requests(client)
                while requests(client) < before + REQUESTS // (2 * UPGRADES) and driver.poll() is None:
                    pass
                client.upgrade()
            printed, errors = driver.communicate(timeout=150)
        assert (printed, errors) == (f"{REQUESTS}\n", "")
        client.remove("disk", retry=True)
    if kind == "image":
        subprocess.run([qemu_img, "check", "-q", image], check=True)


def requests(client: Client) -> int:
    """Number of reads and writes."""
    counted = client.stats("disk")["disk"]["device"]
    reads, writes = counted["read"]["count"], counted["write"]["count"]
    assert isinstance(reads, int)
    assert isinstance(writes, int)
    return reads + writes
