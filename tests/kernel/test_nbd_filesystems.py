"""The kernel's own NBD client and file systems on devices that blkloom serves."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
from guest import Guest

from long_runs import only_long

pytestmark = pytest.mark.kernel
MiB = 1 << 20

FILL_AND_CHECK = """
mount -t $fs /dev/nbd0 /run/mounted
mkdir /run/mounted/folder
for size in 1 511 4096 70000 5000000; do
    head -c $size /dev/urandom > /run/mounted/folder/$size
done
(cd /run/mounted && find . -type f -print0 | sort -z | xargs -0 sha256sum) > sums
sync -f /run/mounted
umount /run/mounted
"""


def test_ext4_across_two_segments_is_whole(guest: Guest, program: Callable[[str, str], str]) -> None:
    e2fsck = program("e2fsck", "e2fsprogs")
    program("nbd-client", "nbd-client")
    first, second = guest.directory / "first.img", guest.directory / "second.img"
    first.write_bytes(bytes(24 * MiB))
    before, after = b"\xaa" * MiB, b"\xbb" * MiB
    second.write_bytes(before + bytes(40 * MiB) + after)
    table = f"0 {24 * 2048} loop {first}\n{24 * 2048} {40 * 2048} loop {second} {MiB}"

    guest.run(
        f"""
        fs=ext4
        mkdir /run/mounted
        serve uri --table '{table}' --socket /run/nbd.sock
        nbd-client -unix /run/nbd.sock /dev/nbd0
        mkfs.ext4 -q /dev/nbd0
        {FILL_AND_CHECK}
        nbd-client -d /dev/nbd0
        stop

        # Without blkloom: the same bytes, put together by hand.
        cat first.img > /run/whole.img
        dd if=second.img bs=1M skip=1 count=40 status=none >> /run/whole.img
        mount -t ext4 -o loop,ro /run/whole.img /run/mounted
        (cd /run/mounted && sha256sum --check --quiet) < sums
        """,
        modules=["nbd", "ext4", "loop"],
    )

    held = second.read_bytes()
    assert (held[:MiB], held[41 * MiB :]) == (before, after), "bytes outside the segment were touched"
    whole = guest.directory / "whole.img"
    whole.write_bytes(first.read_bytes() + held[MiB : 41 * MiB])
    checked = subprocess.run([e2fsck, "-f", "-n", whole], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@only_long
def test_xfs_over_two_connections_is_whole_and_gives_back_what_it_trims(
    guest: Guest, program: Callable[[str, str], str]
) -> None:
    xfs_repair = program("xfs_repair", "xfsprogs")
    program("nbd-client", "nbd-client")

    printed = guest.run(
        f"""
        fs=xfs
        mkdir /run/mounted
        # In the guest's memory: the file system that shares host files cannot punch holes.
        truncate --size=320M /run/disk.img
        serve uri /run/disk.img --socket /run/nbd.sock
        nbd-client -unix /run/nbd.sock /dev/nbd0 -connections 2
        mkfs.xfs -q /dev/nbd0
        {FILL_AND_CHECK}

        mount -t xfs /dev/nbd0 /run/mounted
        head -c 60000000 /dev/urandom > /run/mounted/large
        sync -f /run/mounted
        full=$(stat --format=%b /run/disk.img)
        rm /run/mounted/large
        sync -f /run/mounted
        fstrim /run/mounted
        trimmed=$(stat --format=%b /run/disk.img)
        umount /run/mounted
        nbd-client -d /dev/nbd0
        stop
        cp --sparse=always /run/disk.img .

        mount -t xfs -o loop,ro,norecovery /run/disk.img /run/mounted
        (cd /run/mounted && sha256sum --check --quiet) < sums
        echo "blocks $full $trimmed"
        """,
        modules=["nbd", "xfs", "loop"],
    )

    full, trimmed = map(int, printed.splitlines()[-1].split()[1:])
    assert full - trimmed >= 60_000_000 // 512, "what was trimmed is still allocated"
    disk = guest.directory / "disk.img"
    checked = subprocess.run([xfs_repair, "-n", disk], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
