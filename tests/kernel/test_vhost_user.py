"""Linux in QEMU on a disk of blkloom over vhost-user: a file system, deaths and upgrades of the worker, growth.

Supervisor and worker run on the host. Host and guest tell each other by files in the shared directory how far they are.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from guest import Guest
from machine_disks import qemu_options

from blkloom import Client
from blkloom.control.states import DeviceInfo
from blkloom.testing.serving import supervised
from long_runs import LONG, only_long

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(900)]
MiB = 1 << 20
IMAGE, MORE = 128 * MiB, 64 * MiB
KILLS, UPGRADES = (20, 10) if LONG else (4, 2)
PATIENCE = 240.0

SCRIPT = """
hear() { until test -e "$1"; do sleep 0.2; done; }

test "$(cat /sys/block/vda/serial)" = disk
test "$(cat /sys/block/vda/queue/write_cache)" = "write back"
test "$(cat /sys/block/vda/queue/discard_granularity)" -gt 0
test "$(ls /sys/block/vda/mq | wc -l)" = 2
mkfs.ext4 -q /dev/vda
mkdir /run/mounted
mount -t ext4 /dev/vda /run/mounted
touch mounted
until test -e enough; do
    fio --name=load --directory=/run/mounted --size=8M --rw=randwrite --bs=4k-64k --ioengine=libaio --iodepth=16 \\
        --direct=1 --fsync=32 --verify=crc32c --verify_fatal=1 --serialize_overlap=1 --numjobs=2 > fio.log
    rm /run/mounted/load.*
    fstrim /run/mounted
done
hear grown
until test "$(blockdev --getsize64 /dev/vda)" = SIZE; do sleep 0.2; done
resize2fs /dev/vda 2> /dev/null
head -c 120000000 /dev/urandom > /run/mounted/random
sha256sum < /run/mounted/random > sum
umount /run/mounted
e2fsck -fn /dev/vda
"""


def until(client: Client, true: Callable[[DeviceInfo], bool], running: Future[str]) -> DeviceInfo:
    """Waits for a state of the device, as long as the guest runs."""
    deadline = time.monotonic() + PATIENCE
    while not true(found := client.info("disk")[0]):
        assert time.monotonic() < deadline, found
        if running.done():
            running.result()
        time.sleep(0.05)
    return found


def writes(client: Client) -> int:
    """Number of writes to the device."""
    count: int = client.stats("disk")["disk"]["device"]["write"]["count"]
    return count


IMAGES = {
    # Format, and options of qemu-img.
    "raw": ("raw", ""),
    "qcow2": ("qcow2", "lazy_refcounts=on"),
    "small clusters": ("qcow2", "cluster_size=4k,refcount_bits=1"),
    "subclusters": ("qcow2", "extended_l2=on,cluster_size=128k"),
    "data file": ("qcow2", "data_file=data.raw"),
}


@pytest.mark.parametrize("made", [pytest.param(name, marks=[] if name == "qcow2" else only_long) for name in IMAGES])
def test_a_file_system_goes_on_over_deaths_upgrades_and_growth(
    guest: Guest, program: Callable[[str, str], str], made: str
) -> None:
    qemu_img, e2fsck = program("qemu-img", "qemu-utils"), program("e2fsck", "e2fsprogs")
    debugfs = program("debugfs", "e2fsprogs")
    program("fio", "fio")
    folder = guest.directory
    (kind, options), image, sectors = IMAGES[made], folder / "disk.img", IMAGE // 512
    target = {"raw": "loop", "qcow2": "qcow2"}[kind]
    create = [qemu_img, "create", "-q", "-f", kind, *(["-o", options] if options else []), image, str(IMAGE)]
    subprocess.run(create, cwd=folder, check=True)
    (folder / "more.img").write_bytes(bytes(MORE))
    with supervised() as client, ThreadPoolExecutor(1) as pool:
        client.create("disk", table=f"0 {sectors} {target} {image}")
        path = client.export("disk", kind="vhost-user").path
        machine = dataclasses.replace(guest, options=qemu_options(guest.memory, path))
        script = SCRIPT.replace("SIZE", str(IMAGE + MORE))
        running = pool.submit(machine.run, script, modules=["virtio_blk", "ext4"], timeout=600)
        until(client, lambda _: (folder / "mounted").exists(), running)
        for step in range(KILLS + UPGRADES):
            wait_for_writes(client, running)
            if step < UPGRADES:
                client.upgrade()
                continue
            worker = until(client, lambda found: found.worker > 0, running).worker
            os.kill(worker, signal.SIGKILL)
            until(client, lambda found, worker=worker: found.worker not in {0, worker}, running)
        wait_for_writes(client, running)
        (folder / "enough").touch()
        table = f"0 {sectors} {target} {image}\n{sectors} {MORE // 512} loop {folder}/more.img"
        client.load("disk", table=table)
        client.resume("disk")
        (folder / "grown").touch()
        running.result()
        # On the host, from the same device.
        client.unexport("disk", path)
        file = client.export("disk", kind="fuse").path
        subprocess.run([e2fsck, "-fn", file], check=True, capture_output=True)
        dumped = folder / "dumped"
        subprocess.run([debugfs, "-R", f"dump /random {dumped}", file], check=True, capture_output=True)
    with dumped.open("rb") as random:
        found = subprocess.run(["sha256sum"], stdin=random, check=True, capture_output=True, text=True).stdout
    assert found == (folder / "sum").read_text()
    if kind == "qcow2":
        subprocess.run([qemu_img, "check", "-q", image], check=True)


def wait_for_writes(client: Client, running: Future[str]) -> None:
    """Waits until the device has executed some writes."""
    before = writes(client)
    until(client, lambda _: writes(client) > before + 200, running)
