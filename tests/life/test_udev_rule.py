"""The udev rule for nodes, by `udevadm test`: names, permissions, and nodes that are not scanned."""

from __future__ import annotations

import os
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.control.states import NodeOptions

from .attached import life
from .conftest import Life

__all__ = ["life"]
pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).parents[2]
UDEV = ROOT / ".cache" / "kernel" / "udev"

TEST = """
number=$(cat /sys/block/$1/dev)
mount -t tmpfs tmpfs /dev
mknod /dev/$1 b ${number%:*} ${number#*:}
mknod /dev/null c 1 3
mount -t tmpfs tmpfs /run
mkdir -p /run/udev/rules.d
cp "$2"/*.rules /run/udev/rules.d
exec "$3" test /sys/block/$1
"""
"""With its own /dev and /run, so that udev changes nothing of this machine."""


def physical_volume() -> bytes:
    """4 MiB with the label of an LVM physical volume in sector 1. Source: blkid's prober of lvm2."""
    body = struct.pack("<I8s32s", 32, b"LVM2 001", b"A" * 32).ljust(512 - 20, b"\0")
    checksum = zlib.crc32(body, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    return (bytes(512) + struct.pack("<8sQI", b"LABELONE", 1, checksum) + body).ljust(4 << 20, b"\0")


def udev_says(node: str, folder: Path, run_dir: Path) -> str:
    """What udev would do about a node, with the rule for this run directory."""
    if not (UDEV / "udevadm").exists():
        pytest.skip(f"no udev in {UDEV} (make test-tools)")
    rules = folder / "rules"
    rules.mkdir()
    rule = (ROOT / "udev" / "60-blkloom.rules").read_text().replace("/run/blkloom/", f"{run_dir}/")
    (rules / "60-blkloom.rules").write_text(rule)
    storage = "60-persistent-storage.rules"
    (rules / storage).write_text((UDEV / "rules.d" / storage).read_text())
    words = ["unshare", "--mount", "sh", "-ec", TEST, "sh", os.path.basename(node), rules, UDEV / "udevadm"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("scan", [True, False])
def test_udev_looks_what_is_on_a_node_unless_it_is_not_to(
    client: Client, life: Life, tmp_path: Path, scan: bool
) -> None:
    (tmp_path / "disk.img").write_bytes(physical_volume())
    options = NodeOptions(mode=0o640, gid=34, scan=scan)
    client.create("disk", table=f"0 8192 loop {tmp_path}/disk.img", node=options)
    node = client.attach("disk", via="loop").node.path
    said = udev_says(node, tmp_path, life.run_dir)
    assert "/dev/blkloom/disk" in said
    assert "uid=0, gid=34, mode=0640" in said
    assert ("ID_FS_TYPE=LVM2_member" in said) is scan
    assert ("DM_UDEV_DISABLE_OTHER_RULES_FLAG=1" in said) is not scan
    assert ("UDISKS_IGNORE=1" in said) is not scan
    client.remove("disk")


@pytest.mark.parametrize("scan", [True, False])
def test_the_same_of_a_node_of_serve(blkloom: str, life: Life, tmp_path: Path, scan: bool) -> None:
    (tmp_path / "disk.img").write_bytes(physical_volume())
    words = [blkloom, "serve", tmp_path / "disk.img", "--attach", *([] if scan else ["--no-scan"])]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            said = udev_says(server.stdout.readline().strip(), tmp_path, life.run_dir)
        finally:
            server.terminate()
    assert server.returncode == 0
    assert ("ID_FS_TYPE=LVM2_member" in said) is scan
    assert ("DM_UDEV_DISABLE_OTHER_RULES_FLAG=1" in said) is not scan
