"""Disks of virtual machines: deaths and upgrades of workers under load, suspend, resize, rename. The virtual machine
is a front-end and driver of these tests (`vhost_user_driver`).
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.errors import UsageError
from conformance.file_systems import run
from long_runs import LONG, only_long
from vhost_user_driver import SECTOR, WRITE, Machine

from .conftest import Life, info, until
from .machine_load import BLOCK, SECTORS, Load

KILLS = int(os.environ.get("BLKLOOM_KILLS", "8"))
UPGRADES = int(os.environ.get("BLKLOOM_UPGRADES", "5"))
pytestmark = pytest.mark.timeout(280)


@pytest.fixture
def disk(client: Client, tmp_path: Path) -> Path:
    """The socket of a device on a file and memory."""
    (tmp_path / "disk.img").write_bytes(bytes(SECTORS * SECTOR // 2))
    client.create("memory", table=f"0 {SECTORS} ram")
    half = SECTORS // 2
    table = f"0 {half} loop {tmp_path}/disk.img\n{half} {half} linear blkloom:memory 0\n"
    client.create("disk", table=table)
    return Path(client.export("disk", kind="vhost-user").path)


def test_a_device_is_exported_as_a_socket_for_one_virtual_machine(client: Client, life: Life, disk: Path) -> None:
    assert disk == life.run_dir / "vhost" / "disk"
    assert stat.S_IMODE(disk.stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="is exported at"):
        client.export("disk", kind="vhost-user")
    with pytest.raises(UsageError, match="absolute"):
        client.export("disk", kind="vhost-user", path="disk.sock")
    with pytest.raises(UsageError, match="options"):
        client.export("disk", kind="vhost-user", options={"mode": 0o600})
    with Machine.connected(disk) as machine:
        assert machine.capacity == SECTORS * SECTOR
        machine.write(0, b"m" * BLOCK)
        assert until(client, "disk", lambda found: found.connections == 1).open_count == 1
    until(client, "disk", lambda found: found.connections == 0)
    with Machine.connected(disk) as machine:
        assert machine.read(0, BLOCK) == b"m" * BLOCK
    client.unexport("disk", "auto-vhost-user")
    assert not disk.exists()


def test_no_request_is_lost_when_workers_are_killed(client: Client, disk: Path) -> None:
    load = Load(disk)
    for _ in range(KILLS):
        load.wait_for(300)
        worker = until(client, "disk", lambda found: found.worker > 0).worker
        os.kill(worker, signal.SIGKILL)
        until(client, "disk", lambda found, former=worker: found.worker not in {0, former})
    load.wait_for(300)
    load.finish()
    assert load.hang_ups >= KILLS


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=4k,lazy_refcounts=on",
        pytest.param("cluster_size=4k,refcount_bits=1", marks=only_long),
        pytest.param("extended_l2=on", marks=only_long),
    ],
)
def test_writes_to_an_image_survive_killed_workers_without_a_flush(
    client: Client, program: Callable[[str, str], str], tmp_path: Path, options: str
) -> None:
    qemu_img, image = program("qemu-img", "qemu-utils"), tmp_path / "disk.qcow2"
    run(qemu_img, "create", "-q", "-f", "qcow2", "-o", options, image, str(SECTORS * SECTOR))
    client.create("disk", table=f"0 {SECTORS} qcow2 {image} 1 preallocate=0")
    load = Load(Path(client.export("disk", kind="vhost-user").path))
    for step in range(KILLS if LONG else 3):
        load.wait_for(200)
        worker = until(client, "disk", lambda found: found.worker > 0).worker
        os.kill(worker, signal.SIGKILL)
        until(client, "disk", lambda found, former=worker: found.worker not in {0, former})
        if step % 2:
            client.upgrade()
    load.wait_for(300)
    load.finish()
    client.remove("disk", retry=True)
    run(qemu_img, "check", "-q", image)


def test_an_upgrade_does_not_disconnect_a_virtual_machine(client: Client, disk: Path) -> None:
    load = Load(disk)
    for _ in range(UPGRADES):
        load.wait_for(300)
        client.upgrade()
    load.wait_for(300)
    load.finish()
    assert load.hang_ups == 0


def test_requests_wait_while_the_device_is_suspended_also_during_an_upgrade(client: Client, disk: Path) -> None:
    with Machine.connected(disk) as machine:
        client.suspend("disk")
        slots = {machine.queues[0].submit(WRITE, 8 * at, 0, b"s" * BLOCK) for at in range(4)}
        with pytest.raises(TimeoutError):
            machine.queues[0].wait(0.2)
        client.upgrade()
        with pytest.raises(TimeoutError):
            machine.queues[0].wait(0.2)
        client.resume("disk")
        assert {machine.queues[0].wait()[:2] for _ in slots} == {(slot, 0) for slot in slots}
        assert machine.read(0, 4 * BLOCK) == b"s" * 4 * BLOCK


def test_a_virtual_machine_learns_of_a_new_size(client: Client, disk: Path) -> None:
    with Machine.connected(disk) as machine:
        machine.write(0, b"k" * BLOCK)
        client.load("disk", table=f"0 {SECTORS} linear blkloom:memory 0\n{SECTORS} {SECTORS} zero\n")
        client.resume("disk")
        assert machine.backend is not None
        assert machine.backend.recv(100) == bytes([2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
        assert machine.capacity == 2 * SECTORS * SECTOR
        assert machine.read(2 * SECTORS * SECTOR - BLOCK, BLOCK) == bytes(BLOCK)


def test_a_write_cache_that_is_off_stays_off_whoever_dies(client: Client, life: Life, disk: Path) -> None:
    with Machine.connected(disk) as machine:
        machine.set_write_cache(on=False)
        for _ in range(2):
            worker = until(client, "disk", lambda found: found.worker > 0).worker
            os.kill(worker, signal.SIGKILL)
            assert machine.control.socket.recv(1) == b""
            machine.hang_up()
            machine.connect(disk)
            assert machine.configuration(32, 1) == b"\0"
        client.upgrade()
        assert machine.configuration(32, 1) == b"\0"
        life.kill()
        life.start()
        with life.client() as again:
            again.upgrade()
            assert machine.configuration(32, 1) == b"\0"
            machine.set_write_cache(on=True)
            again.upgrade()
            assert machine.configuration(32, 1) == b"\1"
            machine.write(0, b"w" * BLOCK)


def test_the_socket_is_renamed_with_its_device(client: Client, life: Life, disk: Path) -> None:
    with Machine.connected(disk) as machine:
        client.rename("disk", name="other")
        assert [export.path for export in info(client, "other").exports][1] == str(life.run_dir / "vhost" / "other")
        machine.write(0, b"r" * BLOCK)
    with Machine.connected(life.run_dir / "vhost" / "other") as machine:
        assert machine.read(0, BLOCK) == b"r" * BLOCK


def test_workers_serve_on_while_there_is_no_supervisor(client: Client, life: Life, disk: Path) -> None:
    with Machine.connected(disk) as machine:
        machine.write(0, b"1" * BLOCK)
        life.kill()
        machine.write(BLOCK, b"2" * BLOCK)
        life.start()
        with life.client() as again:
            again.upgrade()
            assert machine.read(0, 2 * BLOCK) == b"1" * BLOCK + b"2" * BLOCK
            machine.write(0, b"3" * BLOCK)
            assert until(again, "disk", lambda found: found.connections == 1).state == "ACTIVE"


def test_a_removed_export_hangs_up_after_the_answers(client: Client, disk: Path) -> None:
    with Machine.connected(disk) as machine:
        queue = machine.queues[0]
        slots = [queue.submit(WRITE, 8 * at, 0, b"u" * BLOCK) for at in range(4)]
        answers = [queue.wait()]
        client.unexport("disk", str(disk))
        assert machine.control.socket.recv(1) == b""
        with suppress(TimeoutError):  # those that were not taken from the ring
            while len(answers) < len(slots):
                answers.append(queue.wait(0))
    assert all(status == 0 for _, status, _ in answers)
    client.remove("disk")
