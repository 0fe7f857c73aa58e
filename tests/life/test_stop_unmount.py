"""`blkloom stop --unmount` at shutdown: file systems on nodes are unmounted and devices removed, whatever their files
are on; what is in use stays and works.
"""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.export.fuse.mountinfo import mounted_at
from conformance.file_systems import MiB, run

from .attached import Program, ext4, life, make_disk, said, write_and_sync
from .conftest import Life

__all__ = ["life"]
pytestmark = pytest.mark.timeout(120)


def test_a_device_on_the_file_system_of_another_one_is_removed_first(
    blkloom: str, life: Life, client: Client, program: Program, tmp_path: Path
) -> None:
    def mount(device: str) -> Path:
        node, place = client.attach(device).node.path, tmp_path / device
        place.mkdir()
        run(program("mkfs.ext4", "e2fsprogs"), "-q", node)
        run("mount", node, str(place))
        return place

    make_disk(client, tmp_path)
    lower = mount("disk")
    (lower / "upper.img").touch()
    os.truncate(lower / "upper.img", 16 * MiB)
    client.create("upper", table=f"0 {16 * MiB // 512} loop {lower}/upper.img")
    upper = mount("upper")
    write_and_sync(upper / "file")
    assert said(blkloom, life, "stop", "--unmount") == ""
    assert life.process.wait(60) == 0
    assert mounted_at(str(lower)) is mounted_at(str(upper)) is None
    subprocess.run(["e2fsck", "-fn", str(tmp_path / "disk.img")], check=True, capture_output=True)


def test_what_is_in_use_stays_and_works(
    blkloom: str, life: Life, client: Client, program: Program, tmp_path: Path
) -> None:
    make_disk(client, tmp_path)
    client.create("other", table="0 8 zero")
    with ext4(program, client.attach("disk").node.path, tmp_path / "m") as place:
        with (place / "used").open("wb"):
            environment = os.environ | {"BLKLOOM_RUN_DIR": str(life.run_dir)}
            done = subprocess.run(
                [blkloom, "stop", "--unmount"], capture_output=True, text=True, check=False, env=environment
            )
        assert done.returncode == 1
        assert f"{place} (device 'disk') stays mounted: cannot be unmounted: Device or resource busy" in done.stderr
        assert [info.name for info in client.info()] == ["disk"]
        write_and_sync(place / "file")


def test_nothing_connects_where_there_is_no_supervisor(blkloom: str, tmp_path: Path) -> None:
    """A socket that systemd listens on at shutdown is not served."""
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(run_dir / "control.sock"))
        control.listen()
        done = subprocess.run([blkloom, "--run-dir", str(run_dir), "stop", "--unmount"], check=False, timeout=30)
        assert done.returncode == 0
        control.setblocking(False)
        with pytest.raises(BlockingIOError):
            control.accept()
