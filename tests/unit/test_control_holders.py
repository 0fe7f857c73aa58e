"""The error for a file in use names the devices that use it, and the commands that release it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from blkloom.control.failures import to_exception, to_failure
from blkloom.control.holders import name_holders
from blkloom.control.states import DeviceInfo, LoopNotes
from blkloom.errors import BusyError

SUPERVISOR = 10


def busy(path: Path | str, *holders: int) -> BusyError:
    return BusyError(
        "already in use by process 11", path=str(path), errno=errno.EBUSY, cure="close it", holders=holders
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "disk").write_bytes(bytes(512))
    return tmp_path / "disk"


def test_the_device_that_has_the_file_is_named_and_not_its_processes(path: Path) -> None:
    path.with_name("link").symlink_to(path)
    devices = [
        DeviceInfo(name="disk", minor=0, worker=11, deps=[str(path)]),
        DeviceInfo(name="above", minor=1, worker=11, deps=["blkloom:disk"]),
        DeviceInfo(name="other", minor=2, worker=12, deps=["/elsewhere"]),
    ]
    for name in (path, path.with_name("link")):
        text = str(name_holders(busy(name, SUPERVISOR, 11), devices, SUPERVISOR))
        assert f"{name}: already in use by device 'disk'; blkloom remove disk ends that" in text


def test_a_loop_device_is_ended_by_its_own_verb(path: Path) -> None:
    device = DeviceInfo(name="loop0", minor=0, worker=11, deps=[str(path)], loop=LoopNotes())
    assert "blkloom loop -d loop0 ends" in str(name_holders(busy(path, SUPERVISOR, 11), [device], SUPERVISOR))


def test_a_file_that_no_table_names_is_a_worker_s(path: Path) -> None:
    devices = [DeviceInfo(name=name, minor=at, worker=11) for at, name in enumerate(("a", "b c"))]
    error = name_holders(busy(path, 11), devices, SUPERVISOR)
    assert str(error).startswith(f"{path}: already in use by devices 'a', 'b c'; blkloom remove a and ")
    assert "blkloom remove 'b c' ends" in str(error)


def test_other_programs_stay_processes(path: Path) -> None:
    error = busy(path, 99)
    assert name_holders(error, [DeviceInfo(name="disk", minor=0, worker=11, deps=[str(path)])], SUPERVISOR) is error
    reader = DeviceInfo(name="disk", minor=0, worker=11, deps=[str(path)], read_only=True)
    assert "device 'disk' and process 99;" in str(name_holders(busy(path, 11, 99), [reader], SUPERVISOR))


def test_a_claim_of_a_block_device_that_readers_do_not_have_is_not_put_down_to_them(path: Path) -> None:
    error = busy(path)  # O_EXCL tells no process
    reader = DeviceInfo(name="disk", minor=0, worker=11, deps=[str(path)], read_only=True)
    assert name_holders(error, [reader], SUPERVISOR) is error
    writer = DeviceInfo(name="disk", minor=0, worker=11, deps=[str(path)])
    assert "device 'disk'" in str(name_holders(error, [writer], SUPERVISOR))


def test_holders_travel_with_the_error() -> None:
    error = to_exception(to_failure(1, busy("/disk", os.getpid(), 11)))
    assert isinstance(error, BusyError)
    assert error.holders == (os.getpid(), 11)
    assert error.errno == errno.EBUSY
