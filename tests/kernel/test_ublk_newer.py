"""ublk with a newer kernel: growth of a node, removal after its last use, partitions by choice, planned upgrades."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from guest import Guest
from node_writes import NODE_WRITES

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(1300)]
SECONDS = 900.0
"""On a machine that does much else."""

GROWS = """
export BLKLOOM_RUN_DIR=/run/b
truncate -s 64M /run/disk.img
blkloom create disk --table '0 131072 loop /run/disk.img'
node=$(blkloom attach disk --via ublk)
mkfs.ext4 -q "$node"
mkdir /run/mounted
mount /run/b/nodes/disk /run/mounted
head -c 8000000 /dev/urandom > /run/data
cp /run/data /run/mounted/1

truncate -s 128M /run/disk.img
blkloom load disk --table '0 262144 loop /run/disk.img'
blkloom resume disk
until [ "$(blockdev --getsize64 "$node")" = 134217728 ]; do :; done
resize2fs "$node" 2> resized
for number in 2 3 4 5 6 7 8; do cp /run/data /run/mounted/$number; done
pkill -9 -f blkloom.worker
sync -f /run/mounted
echo 3 > /proc/sys/vm/drop_caches
for number in 1 2 3 4 5 6 7 8; do cmp /run/data /run/mounted/$number; done
[ "$(blockdev --getsize64 "$node")" = 134217728 ]

echo "busy: $(blkloom detach disk 2>&1)"
blkloom detach disk --lazy
umount /run/mounted
until [ ! -e "$node" ]; do :; done
blkloom remove disk
kernel_is_content 'I/O error'
echo grown
"""

NEWER = """
rm /run/disk.img
truncate -s 64M /run/disk.img
printf 'label: gpt\\nstart=2048, size=65536\\n' | sfdisk --quiet /run/disk.img
blkloom create disk --table '0 131072 loop /run/disk.img'
node=$(blkloom attach disk --via ublk --partscan)
[ -b ${node}p1 ]
blkloom detach disk
node=$(blkloom attach disk --via ublk)
[ ! -e ${node}p1 ]
blkloom detach disk
echo "partitions only if they are wanted"

node=$(blkloom attach disk --via ublk --on-failure fail)
begin write 0 1000
blkloom upgrade
wait $writing
compare 0 1000
blkloom detach disk
echo "an upgrade fails no request"
blkloom stop
kernel_is_content 'I/O error'
"""


def test_growth_partitions_and_upgrade_with_a_newer_driver(guest: Guest, program: Callable[[str, str], str]) -> None:
    """Linux 6.16 can tell a ublk device another size and quiesce it, 7.0 start it without a partition scan."""
    program("resize2fs", "e2fsprogs")
    newer = dataclasses.replace(guest, series="7.3")
    printed = newer.run(GROWS + NODE_WRITES + NEWER, modules=["ublk_drv", "ext4"], timeout=SECONDS)
    assert "/run/mounted" in printed.partition("busy: ")[2]
    said = ("grown", "partitions only if they are wanted", "an upgrade fails no request")
    assert [line for line in printed.splitlines() if line in said] == [*said]
