"""Nodes in a booted kernel, with root's own run directory: names in /dev/blkloom, with udev and without; partitions;
ext4 that grows while it is mounted.
"""

from __future__ import annotations

import dataclasses
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


@pytest.mark.parametrize("udev", [False, True], ids=["without udev", "with udev"])
def test_the_names_of_a_device_and_of_its_partition(guest: Guest, udev: bool) -> None:
    (guest.directory / RULE.name).write_bytes(RULE.read_bytes())
    install = f"mkdir -p /run/udev/rules.d && cp {RULE.name} /run/udev/rules.d/ && udevadm control --reload\n"
    said = dataclasses.replace(guest, udev=udev).run((install if udev else "") + NAMES, modules=MODULES, timeout=300)
    assert said.splitlines() == [
        "named",
        "partition",
        *(["named partition"] if udev else []),
        "renamed",
        f"mounted at {guest.directory}/m",
        "gone",
    ]


@only_long
def test_a_mounted_ext4_grows_with_its_device(guest: Guest) -> None:
    assert guest.run(GROWTH, modules=MODULES, timeout=300).splitlines() == ["grown", "gone"]


NO_RESEND = """
blkloom create disk --table '0 65536 ram' --attach > first 2> warned
mkfs.ext4 -q /dev/blkloom/disk
mkdir -p m
mount /dev/blkloom/disk m
pkill -9 -f blkloom.worker
until [ "$(readlink /dev/blkloom/disk)" != "$(cat first)" ] && [ -b /dev/blkloom/disk ]; do blkloom ls > listed; done
umount m
e2fsck -fp /dev/blkloom/disk > checked || [ $? = 1 ]
mount /dev/blkloom/disk m && echo again
umount m
blkloom stop
[ ! -e /dev/blkloom/disk ] && [ -z "$(losetup --all)" ] && echo gone
"""


def test_a_kernel_that_sends_nothing_again_gives_another_node_after_a_kill(guest: Guest) -> None:
    older = dataclasses.replace(guest, series="6.1")
    assert older.run(NO_RESEND, modules=MODULES, timeout=300).splitlines() == ["again", "gone"]
    assert "WARNING: users of the file get errors if its worker dies" in (guest.directory / "warned").read_text()
