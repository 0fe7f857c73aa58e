"""Nodes in a booted kernel, with root's own run directory: names in /dev/blkloom, with udev and without; what udev
activates; partitions; ext4 that grows while it is mounted.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from pathlib import Path

import pytest
from guest import Guest

from long_runs import only_long

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(400)]
RULE = Path(__file__).parents[2] / "udev" / "60-blkloom.rules"
MODULES = ["fuse", "loop", "ext4"]

NAMES = """
linked() { readlink -f "/dev/blkloom/$1"; }
settle() { [ ! -e /run/udev/control ] || udevadm settle; }
truncate -s 64M disk.img
printf 'label: gpt\\nstart=2048, size=65536\\n' | sfdisk --quiet disk.img
node=$(blkloom create disk --table '0 131072 loop disk.img' && blkloom attach disk --partscan)
settle
[ "$(linked disk)" = "$node" ] && echo named
[ -b "${node}p1" ] && echo partition
[ ! -e /run/udev/control ] || { [ "$(linked disk-part1)" = "${node}p1" ] && echo "named partition"; }
blkloom rename disk other
settle
[ "$(linked other)" = "$node" ] && [ ! -L /dev/blkloom/disk ] && echo renamed
mkfs.ext4 -q "${node}p1"
mkdir -p m
mount "${node}p1" m
{ blkloom detach other 2>&1 || true; } | grep -o "mounted at .*/m"
umount m
blkloom remove other
settle
[ ! -e /dev/blkloom/other ] && [ -z "$(losetup --all)" ] && echo gone
"""

ACTIVATED = """
property() { udevadm settle; udevadm info -q property -n "$1" | sed -n "s/^$2=//p"; }
blkloom create disk --table '0 8192 loop volume.img'
node=$(blkloom attach disk)
property "$node" ID_FS_TYPE
[ -e /run/activated ] && echo activated
blkloom remove disk
udevadm settle
rm -f /run/activated
node=$(blkloom create disk --table '0 8192 loop volume.img' --mode 640 --gid 34 --attach --no-scan)
property "$node" ID_FS_TYPE
property "$node" UDISKS_IGNORE
[ "$(linked disk)" = "$node" ] && echo named
udevadm trigger --settle "$node"
stat -c '%a %u %g' "$node"
[ ! -e /run/activated ] && echo "not activated"
blkloom remove disk
"""
LVM = """
ENV{DM_UDEV_DISABLE_OTHER_RULES_FLAG}=="1", GOTO="lvm_end"
ENV{ID_FS_TYPE}!="LVM2_member", GOTO="lvm_end"
RUN+="/usr/bin/touch /run/activated"
LABEL="lvm_end"
"""
"""The conditions of LVM's own rule."""


def physical_volume() -> bytes:
    """4 MiB with the label of an LVM physical volume in sector 1. Source: blkid's prober of lvm2."""
    body = struct.pack("<I8s32s", 32, b"LVM2 001", b"A" * 32).ljust(512 - 20, b"\0")
    checksum = zlib.crc32(body, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    return (bytes(512) + struct.pack("<8sQI", b"LABELONE", 1, checksum) + body).ljust(4 << 20, b"\0")


GROWTH = """
truncate -s 32M disk.img
blkloom loop -f --show --name disk disk.img > node
mkfs.ext4 -q /dev/blkloom/disk
mkdir -p m
mount /dev/blkloom/disk m
truncate -s 256M disk.img
blkloom loop -c disk
resize2fs /dev/blkloom/disk > resized 2>&1
[ "$(df --output=size m | tail -1)" -gt 200000 ] && echo grown
umount m
blkloom stop
[ ! -e /dev/blkloom/disk ] && [ -z "$(losetup --all)" ] && echo gone
"""


@only_long
def test_the_names_of_a_device_and_of_its_partition(guest: Guest) -> None:
    assert guest.run(NAMES, modules=MODULES, timeout=300).splitlines() == names_in(guest)


def test_udev_names_devices_and_activates_nothing_of_a_node_that_is_not_scanned(guest: Guest) -> None:
    (guest.directory / RULE.name).write_bytes(RULE.read_bytes())
    (guest.directory / "69-lvm.rules").write_text(LVM)
    (guest.directory / "volume.img").write_bytes(physical_volume())
    install = "mkdir -p /run/udev/rules.d && cp *.rules /run/udev/rules.d/ && udevadm control --reload\n"
    said = dataclasses.replace(guest, udev=True).run(install + NAMES + ACTIVATED, modules=MODULES, timeout=300)
    of_volume = ["LVM2_member", "activated", "1", "named", "640 0 34", "not activated"]
    assert said.splitlines() == [*names_in(guest, "named partition"), *of_volume]


def names_in(guest: Guest, *of_udev: str) -> list[str]:
    """What the script NAMES prints."""
    return ["named", "partition", *of_udev, "renamed", f"mounted at {guest.directory}/m", "gone"]


@only_long
def test_a_mounted_ext4_grows_with_its_device(guest: Guest) -> None:
    assert guest.run(GROWTH, modules=MODULES, timeout=300).splitlines() == ["grown", "gone"]
