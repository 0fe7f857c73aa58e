"""The supervisor as a service of systemd: devices stay in use while it is restarted, and while supervisor and workers
are killed together. A service manager of this test stores descriptors as systemd does (`service_manager`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blkloom.control.client import Client
from blkloom.control.messages import ClientCall
from blkloom.export.fuse.mount import Mount, unmount
from conformance.file_systems import EXT4, needs_root
from faulty_fs import needs_fuse

from .attached import Program, loop_devices, make_disk
from .conftest import info
from .service_manager import Service, a_service
from .test_attach_survival import loaded

pytestmark = pytest.mark.timeout(240)


class Reconnecting(Client):
    """A client that connects for each call, to the supervisor that runs then."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def call(self, call: ClientCall, *, bounded: bool = True) -> Any:
        """As `Client.call`."""
        with self._service.client() as client:
            return client.call(call, bounded=bounded)


@pytest.fixture
def service() -> Iterator[Service]:
    """As the unit starts it."""
    needs_fuse()
    needs_root("a block device")
    with a_service() as started:
        yield started
    assert loop_devices(started) == []


def test_a_mounted_file_system_goes_on_over_restarts_of_the_service(
    service: Service, program: Program, tmp_path: Path
) -> None:
    client = Reconnecting(service)
    disk = make_disk(client, tmp_path, EXT4.size)
    with loaded(client, program, EXT4, disk, tmp_path / "m") as (load, _):
        before = info(client, disk)
        for _ in range(3):
            load.wait_for_rounds()
            service.restart()
        load.wait_for_rounds()
        after = info(client, disk)
        assert (after.worker, after.restarts, after.node) == (before.worker, 0, before.node)


def test_a_mounted_file_system_goes_on_when_supervisor_and_worker_are_killed(
    service: Service, program: Program, tmp_path: Path
) -> None:
    client = Reconnecting(service)
    disk = make_disk(client, tmp_path, EXT4.size)
    with loaded(client, program, EXT4, disk, tmp_path / "m") as (load, _):
        before = info(client, disk)
        for _ in range(3):
            load.wait_for_rounds()
            service.kill_all()
            service.start()
        load.wait_for_rounds()
        assert info(client, disk).node == before.node


def test_memory_keeps_its_bytes_when_supervisor_and_worker_are_killed(service: Service) -> None:
    with service.client() as client:
        client.create("memory", table="0 2048 ram")
        path = Path(client.export("memory", kind="fuse").path)
        with path.open("r+b") as file:
            file.write(b"kept")
    service.kill_all()
    service.start()
    with service.client() as client:
        assert client.read("memory", 0, 4) == b"kept"
    assert path.read_bytes()[:4] == b"kept"


def test_what_has_ended_is_stored_no_longer(service: Service) -> None:
    with service.client() as client:
        client.create("memory", table="0 2048 ram")
        client.export("memory", kind="fuse")
        export, load = "export.0.0.auto-fuse", service.manager.names[0]
        assert load.startswith("memory.0.")
        service.manager.wait_for(load, f"{export}/device", f"{export}/record")
        service.restart()
    service.manager.wait_for(load, f"{export}/device", f"{export}/record")
    with service.client() as client:
        client.unexport("memory", "auto-fuse")
        service.manager.wait_for(load)
        client.remove("memory")
    service.manager.wait_for()


def test_a_connection_that_ended_while_nothing_ran_is_made_again(service: Service) -> None:
    with service.client() as client:
        client.create("zeros", table="0 8 zero")
        path = Path(client.export("zeros", kind="fuse").path)
    service.kill_all()
    unmount(Mount(os.readlink(path)), lazy=True)
    service.manager.wait_for("export.0.0.auto-fuse/record")
    service.start()
    assert path.read_bytes() == bytes(4096)
