"""A device as the kernel's ublk block device: what it offers, and what a file system on it outlives."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from guest import Guest
from node_output import node_output
from node_writes import NODE_WRITES

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(1300)]
MiB = 1 << 20
SECONDS = 900.0
"""For a script, on a machine that does much else."""

EXPORT = """
import json, sys
from blkloom.control.client import Client
with Client("/run/b", start=False) as client:
    print(client.export(sys.argv[1], kind="ublk", **json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}")).path)
"""

PRELUDE = f"""
export BLKLOOM_RUN_DIR=/run/b
export_ublk() {{ {sys.executable} export.py "$@"; }}
truncate -s 64M /run/disk.img
blkloom create disk --table '0 131072 loop /run/disk.img'
"""

OFFERS_AND_OUTLIVES = """
node=$(export_ublk disk)
queue=/sys/block/${node#/dev/}/queue
for what in logical_block_size physical_block_size minimum_io_size discard_granularity rotational fua write_cache; do
    echo "$what $(cat $queue/$what)"
done > offered
mkfs.ext4 -q "$node"
mkdir /run/mounted
mount "$node" /run/mounted
head -c 8000000 /dev/urandom > /run/data

echo "busy: $(blkloom unexport disk e1 2>&1)"

for number in 1 2; do
    cp /run/data /run/mounted/$number & writing=$!
    pkill -9 -f blkloom.worker
    sync -f /run/mounted
    wait $writing
done
cp /run/data /run/mounted/3 & writing=$!
blkloom upgrade
wait $writing
sync -f /run/mounted
echo 3 > /proc/sys/vm/drop_caches
for number in 1 2 3; do cmp /run/data /run/mounted/$number; done

full=$(stat --format=%b /run/disk.img)
rm /run/mounted/[123]
sync -f /run/mounted
fstrim /run/mounted
echo "blocks $full $(stat --format=%b /run/disk.img)"

umount /run/mounted
e2fsck -fn "$node" > checked
blkloom unexport disk e1
[ ! -e "$node" ]
[ ! -e "${node/ublkb/ublkc}" ]
kernel_is_content 'I/O error'
echo clean
"""


WAITS = """
node=$(export_ublk disk)
head -c 4096000 /dev/urandom > /run/data

# A request waits at a suspended device; its worker is killed.
blkloom suspend disk
begin write 0 100
pkill -9 -f blkloom.worker
blkloom resume disk
wait $writing
compare 0 100

# The same, and the worker is replaced.
blkloom suspend disk
begin write 1000 100
blkloom upgrade
blkloom resume disk
wait $writing
compare 1000 100

# Supervisor and worker are killed together while data is written.
begin write 2000 1000
pkill -9 -f 'blkloom.(supervisor|worker)'
blkloom ls > listed
wait $writing
compare 2000 1000
kernel_is_content 'I/O error'
echo whole

# It is removed by force while a request waits.
blkloom suspend disk
begin write 0 1
blkloom unexport disk e1 --force
! wait $writing
[ ! -e "$node" ]
blkloom resume disk
echo removed

# What is not served any more is reaped.
node=$(export_ublk disk '{"read_only": true}')
[ "$(cat /sys/block/"${node#/dev/}"/ro)" = 1 ]
pkill -9 -f 'blkloom.(supervisor|worker)'
rm -r /run/b
blkloom reap
[ ! -e "$node" ]
[ ! -e "${node/ublkb/ublkc}" ]
echo reaped
"""


SUSPENDED = """
blkloom suspend disk
export_ublk disk || true
[ ! -e /dev/ublkb0 ]
[ ! -e /dev/ublkc0 ]
blkloom resume disk
export_ublk disk '{"options": {"unknown": 1}}' || true
echo ended
"""


DIES = """
echo 0 > /sys/devices/system/cpu/cpu1/online
blkloom create disk --table '0 131072 loop /run/disk.img'
node=$(blkloom attach disk --via ublk --on-failure fail 2> told)
echo "one queue, scheduler $(cat /sys/block/${node#/dev/}/queue/scheduler), $(ls /sys/block/${node#/dev/}/mq)"
blkloom suspend --nolockfs disk
begin write 0 1 2> failed
pkill -9 -f blkloom.worker
! wait $writing
blkloom resume disk
write 0 1
compare 0 1
blkloom detach disk
blkloom stop
kernel_is_content
echo "failed"
"""


def test_what_a_node_offers_and_what_its_users_outlive(guest: Guest, program: Callable[[str, str], str]) -> None:
    """A file system and requests outlive killed workers and an upgrade, or requests fail, as the user has chosen."""
    program("mkfs.ext4", "e2fsprogs")
    (guest.directory / "export.py").write_text(EXPORT)
    script = PRELUDE + NODE_WRITES + OFFERS_AND_OUTLIVES + SUSPENDED + WAITS + DIES
    printed = guest.run(script, modules=["ublk_drv", "ext4"], timeout=SECONDS)
    offered = dict(line.split(" ", 1) for line in (guest.directory / "offered").read_text().splitlines())
    assert offered == {
        "logical_block_size": "512",
        "physical_block_size": "4096",
        "minimum_io_size": "4096",
        "discard_granularity": "4096",
        "rotational": "0",
        "fua": "1",
        "write_cache": "write back",
    }
    busy, full, trimmed = node_output(printed)
    assert "is in use" in busy
    assert full - trimmed >= 3 * 8_000_000 // 512, "what was trimmed is still allocated"
    assert "a suspended device cannot become a block device" in printed
    assert "options of a ublk device" in printed
    said = ("clean", "ended", "whole", "removed", "reaped", "failed")
    assert [line for line in printed.splitlines() if line in said] == [*said]
    assert "one queue, scheduler [none] mq-deadline , 0" in printed.splitlines()
    assert "cannot grow" in (guest.directory / "told").read_text()
    assert (guest.directory / "failed").read_text().count("Input/output error") == 1
