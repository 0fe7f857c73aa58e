"""A device as a block device of the kernel's NBD client: what it offers, and what a file system on it outlives.

Requests that a killed worker has not answered are sent again when their time-outs expire, so the tests use short ones.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import pytest
from guest import Guest
from node_output import node_output
from node_writes import NODE_WRITES

from long_runs import only_long

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(900)]
SECONDS = 600.0
"""For a script, on a machine that does much else."""
MODULES = ["nbd", "ext4"]

ATTACH = """
import json, sys
from blkloom.control.client import Client
with Client("/run/b", start=False) as client:
    options = json.loads(sys.argv[2])
    print(client.attach(sys.argv[1], via="nbd", options={"timeout": 6}, **options).node.path)
"""

PRELUDE = f"""
export BLKLOOM_RUN_DIR=/run/b
supervise() {{
    exec 3< <(exec {sys.executable} -m blkloom.supervisor --max-deaths=1000 --ready-fd=4 4>&1 >/dev/null)
    read -r -N 1 -u 3
}}
attach() {{ {sys.executable} attach.py "$1" "${{2:-{{}}}}"; }}
supervise
truncate -s 64M /run/disk.img
head -c 8000000 /dev/urandom > /run/data
blkloom create disk --table '0 131072 loop /run/disk.img'
node=$(attach disk)
"""

OFFERS_AND_OUTLIVES = """
queue=/sys/block/${node#/dev/}/queue
for what in logical_block_size fua write_cache rotational; do
    echo "$what $(cat $queue/$what)"
done > offered
[ "$(ls $queue/../mq | wc -l)" = 2 ]  # one for each CPU
mkfs.ext4 -q "$node"
mkdir /run/mounted
mount /run/b/nodes/disk /run/mounted

echo "busy: $(blkloom detach disk 2>&1)"

cp /run/data /run/mounted/1 & writing=$!
pkill -9 -f blkloom.worker
sync -f /run/mounted
wait $writing
cp /run/data /run/mounted/2 & writing=$!
blkloom upgrade
wait $writing

# A suspend that is longer than the time-out of a request.
blkloom suspend --nolockfs disk
copy_and_sync() { cp /run/data /run/mounted/s; sync -f /run/mounted; }
begin copy_and_sync
sleep 14
blkloom resume disk
wait $writing
cmp /run/data /run/mounted/s
rm /run/mounted/s

truncate -s 128M /run/disk.img
blkloom load disk --table '0 262144 loop /run/disk.img'
blkloom resume disk
until [ "$(blockdev --getsize64 "$node")" = 134217728 ]; do :; done
resize2fs "$node" 2> resized
for number in 3 4 5; do cp /run/data /run/mounted/$number; done
sync -f /run/mounted
echo 3 > /proc/sys/vm/drop_caches
for number in 1 2 3 4 5; do cmp /run/data /run/mounted/$number; done

full=$(stat --format=%b /run/disk.img)
rm /run/mounted/[1-3]
sync -f /run/mounted
fstrim /run/mounted
echo "blocks $full $(stat --format=%b /run/disk.img)"

blkloom detach disk --lazy
umount /run/mounted
until [ ! -e "${queue%/queue}/backend" ]; do :; done
blkloom info -c --noheadings -o node disk
e2fsck -fn /run/disk.img > checked
kernel_is_content 'I/O error|EXT4-fs error'
echo clean
"""


def test_a_file_system_outlives_killed_workers_an_upgrade_a_long_suspend_and_growth(
    guest: Guest, program: Callable[[str, str], str]
) -> None:
    program("resize2fs", "e2fsprogs")
    (guest.directory / "attach.py").write_text(ATTACH)
    printed = guest.run(PRELUDE + NODE_WRITES + OFFERS_AND_OUTLIVES, modules=MODULES, timeout=SECONDS)
    offered = dict(line.split(" ", 1) for line in (guest.directory / "offered").read_text().splitlines())
    assert offered == {
        "logical_block_size": "512",
        "rotational": "0",
        "fua": "1",
        "write_cache": "write back",
    }
    busy, full, trimmed = node_output(printed)
    assert "mounted at /run/mounted" in busy
    assert full - trimmed >= 3 * 8_000_000 // 512, "what was trimmed is still allocated"
    assert printed.endswith("clean\n")


WAITS = """
# A suspend that is longer than the time-out of a request, and an upgrade meanwhile.
blkloom suspend disk
begin write 0 100
sleep 8
blkloom upgrade
sleep 8
blkloom resume disk
wait $writing
compare 0 100
echo waited

# A worker is killed while a request waits at a suspended device.
blkloom suspend disk
begin write 200 100
pkill -9 -f blkloom.worker
blkloom resume disk
wait $writing
compare 200 100

# Supervisor and worker are killed together while data is written.
begin write 400 1000
pkill -9 -f 'blkloom.(supervisor|worker)'
supervise
wait $writing
compare 400 1000
kernel_is_content 'I/O error|EXT4-fs error'
echo whole
"""


@only_long
def test_requests_wait_for_a_resume_and_for_the_next_worker(guest: Guest) -> None:
    (guest.directory / "attach.py").write_text(ATTACH)
    newer = dataclasses.replace(guest, series="7.3")
    printed = newer.run(PRELUDE + NODE_WRITES + WAITS, modules=["nbd"], timeout=SECONDS)
    assert [line for line in printed.splitlines() if line in ("waited", "whole")] == ["waited", "whole"]
