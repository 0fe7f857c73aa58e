"""A FUSE file on other kernels than this machine's: its file system survives the death of the server if the kernel
allows it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from guest import Guest

from long_runs import only_long

pytestmark = pytest.mark.kernel
TESTS = Path(__file__).parents[1]

KILLED_WHILE_WRITTEN = """
import subprocess
from pathlib import Path
from fuse_served import FuseProcess

def run(*words):
    subprocess.run(words, check=True)

disk = Path("/run/disk.img")
disk.write_bytes(bytes(64 << 20))
with FuseProcess(Path("/run/node"), f"0 131072 loop {disk}", clones=1) as served:
    run("mkfs.ext4", "-q", "-F", served.path)
    loop = subprocess.check_output(["losetup", "-f", "--show", "--direct-io=on", served.path], text=True).strip()
    run("mount", "-t", "ext4", loop, "/run/mounted")
    for number in range(2):
        writing = subprocess.Popen(["cp", "/run/data", f"/run/mounted/{number}"])
        served.kill()
        syncing = subprocess.Popen(["sync", "-f", "/run/mounted"])
        served.start()
        assert (writing.wait(), syncing.wait()) == (0, 0)
    run("umount", "/run/mounted")
    run("losetup", "-d", loop)
    run("e2fsck", "-f", "-n", served.path)
"""


def test_a_file_system_outlives_its_server(guest: Guest, program: Callable[[str, str], str]) -> None:
    program("mkfs.ext4", "e2fsprogs")
    (guest.directory / "killed.py").write_text(KILLED_WHILE_WRITTEN)
    printed = guest.run(
        f"""
        mkdir /run/mounted
        head -c 8000000 /dev/urandom > /run/data
        PYTHONPATH={TESTS} {sys.executable} killed.py
        mount -t ext4 -o loop,ro /run/disk.img /run/mounted
        cmp /run/data /run/mounted/0
        cmp /run/data /run/mounted/1
        echo whole
        """,
        modules=["fuse", "ext4", "loop"],
    )
    assert printed.endswith("whole\n")


IO_FLUSHER = 0x00180000
"""What PR_SET_IO_FLUSHER sets in a thread's flags: PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE. Source: linux/sched.h."""

NO_RESEND = r"""
export BLKLOOM_RUN_DIR=/run/b
truncate -s 32M /run/disk.img
blkloom create disk --table '0 65536 loop /run/disk.img'
file=$(blkloom export disk --fuse 2>warned)
for worker in $(pgrep -f blkloom.worker); do
    [ -n "$(find "/proc/$worker/fd" -lname /dev/fuse)" ] || continue
    for stat in /proc/"$worker"/task/*/stat; do sed 's/.*) //' "$stat" | cut -d' ' -f7; done > flags
    sed -n 's/^VmLck:[[:space:]]*\([0-9]*\) kB/\1/p' "/proc/$worker/status" > locked
done
mkfs.ext4 -q -F "$file"
mkdir /run/mounted
mount -t ext4 -o loop "$file" /run/mounted
head -c 4000000 /dev/urandom > /run/data
cp /run/data /run/mounted/1
blkloom upgrade
cp /run/data /run/mounted/2
sync -f /run/mounted
exec 9<"$file"
pkill -9 -f blkloom.worker
! cat <&9 2>refused >/run/read
exec 9<&-
until head -c 512 "$file" >/run/read 2>/run/refused; do blkloom ls >/run/listed; done
umount -l /run/mounted
e2fsck -fp "$file" || [ $? = 1 ]
mount -t ext4 -o loop,ro "$file" /run/mounted
cmp /run/data /run/mounted/1
cmp /run/data /run/mounted/2
echo whole
"""

NODE_WITHOUT_RESEND = """
umount /run/mounted
blkloom stop
unset BLKLOOM_RUN_DIR
blkloom create disk --table '0 65536 ram' --attach > first 2> node_warned
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


@only_long
@pytest.mark.timeout(600)
def test_without_resend_an_upgrade_goes_on_and_after_a_kill_there_is_a_new_file_or_node(
    guest: Guest, program: Callable[[str, str], str]
) -> None:
    program("mkfs.ext4", "e2fsprogs")
    older = dataclasses.replace(guest, series="6.1")
    printed = older.run(NO_RESEND + NODE_WITHOUT_RESEND, modules=["fuse", "ext4", "loop"], timeout=500)
    assert [line for line in printed.splitlines() if line in ("whole", "again", "gone")] == ["whole", "again", "gone"]
    flags, locked, warned, refused = (
        (guest.directory / name).read_text() for name in ("flags", "locked", "warned", "refused")
    )
    assert flags
    assert all(int(of_thread) & IO_FLUSHER == IO_FLUSHER for of_thread in flags.split())
    assert int(locked) > 0
    assert "users of the file get errors if its worker dies (before Linux 6.9)" in warned
    assert "WARNING: users of the file get errors if its worker dies" in (guest.directory / "node_warned").read_text()
    assert "Software caused connection abort" in refused or "Transport endpoint is not connected" in refused
