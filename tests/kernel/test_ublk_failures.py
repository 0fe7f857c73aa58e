"""ublk devices whose worker is killed or upgraded: what requests get."""

from __future__ import annotations

import dataclasses
import sys

import pytest
from guest import Guest
from node_writes import NODE_WRITES

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(900)]
SECONDS = 800.0

PRELUDE = f"""
export BLKLOOM_RUN_DIR=/run/b
mkfifo /run/ready
supervise() {{
    {sys.executable} -m blkloom.supervisor "$@" --ready-fd 9 9>/run/ready 2>>supervisor.log &
    read -rn1 </run/ready
}}
head -c 4096000 /dev/urandom > /run/data
truncate -s 64M /run/disk.img
"""

DIES = """
echo 0 > /sys/devices/system/cpu/cpu1/online
supervise
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
echo "a request that a killed worker had begun fails"

blkloom stop
! dmesg | grep -E 'WARNING|BUG|hung_task'
"""


def test_a_request_that_a_killed_worker_had_begun_may_fail(guest: Guest) -> None:
    printed = guest.run(PRELUDE + NODE_WRITES + DIES, modules=["ublk_drv"], timeout=SECONDS)
    assert "a request that a killed worker had begun fails" in printed.splitlines()
    assert "one queue, scheduler [none] mq-deadline , 0" in printed.splitlines()
    assert "cannot grow" in (guest.directory / "told").read_text()
    assert (guest.directory / "failed").read_text().count("Input/output error") == 1


NEWER = """
printf 'label: gpt\\nstart=2048, size=65536\\n' | sfdisk --quiet /run/disk.img
supervise
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
! dmesg | grep -E 'WARNING|BUG|hung_task'
"""


def test_partitions_and_upgrade_with_a_newer_driver(guest: Guest) -> None:
    """Linux 6.16 can quiesce a device, 7.0 start it without a partition scan."""
    printed = dataclasses.replace(guest, series="7.3").run(
        PRELUDE + NODE_WRITES + NEWER, modules=["ublk_drv"], timeout=SECONDS
    )
    for line in ("partitions only if they are wanted", "an upgrade fails no request"):
        assert line in printed.splitlines()
