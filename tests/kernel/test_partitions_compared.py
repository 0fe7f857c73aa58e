"""blkloom finds the same partitions as the kernel on a loop device, for many kinds of disks."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from guest import Guest

from partition_images import IMAGES, by_number, found_in, make

SCRIPT = """
for image in *.img; do
    block=${image#*@}
    device=$(losetup --find --show --partscan --read-only --sector-size="${block%.img}" "$image")
    name=${device##*/}
    for part in /sys/block/"$name"/"$name"p*; do
        [ ! -e "$part" ] || echo "part ${image%@*} $(<"$part"/partition) $(<"$part"/start) $(<"$part"/size)"
    done
    losetup --detach "$device"
done
"""


@pytest.mark.kernel
def test_partitions_are_those_the_kernel_shows(guest: Guest, program: Callable[[str, str], str]) -> None:
    found = {}
    for name, image in IMAGES.items():
        path = guest.directory / f"{name}@{image.block}.img"
        try:
            make(name, program, path)
        except pytest.skip.Exception:
            path.unlink()  # who is not root has the others
            continue
        found[name] = by_number(found_in(path, image.block))
    shown: dict[str, dict[int, tuple[int, int]]] = {name: {} for name in found}
    for line in guest.run(SCRIPT, modules=["loop"]).splitlines():
        if line.startswith("part "):
            name, number, start, size = line.split()[1:]
            shown[name][int(number)] = int(start), int(size)
    assert found == shown, json.dumps([found, shown])
