"""Finds the users of a block device: mounts, swap, devices on top, processes. Reads /proc and /sys only."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from blkloom.export.fuse.mountinfo import Mounted, parse
from blkloom.export.fuse.users import users_of


class MountPlace(NamedTuple):
    """A mount point of a file system. path: in its mount namespace. reached: its path from this process. number: of the
    file system, "major:minor".
    """

    path: str
    reached: str
    number: str


def mount_places(path: str, link: str = "") -> list[MountPlace]:
    """The mount points of a block device and of its partitions. link: another path of the device."""
    nodes = _with_partitions(path)
    numbers = _numbers(nodes)
    found = []
    for process, mounts in _all_mounts():
        root = "" if process == "self" else f"/proc/{process}/root"
        found += [MountPlace(m.path, root + m.path, m.number) for m in mounts if _is_of(m, numbers, nodes, link)]
    return found


def users_of_block_device(path: str, link: str = "") -> list[str]:
    """The users of a block device and its partitions, as text: "mounted at /mnt", "mounted at /mnt for process 42",
    "swap on /dev/loop0", "device dm-0", "fio (process 42)". path: the node, such as /dev/loop0. link: another path of
    it. Mounts in another mount namespace are found if /proc shows a process in it; it is named if the place is not
    mounted here, too.
    """
    nodes = _with_partitions(path)
    mounted: dict[str, str] = {}
    for process, mounts in _all_mounts():
        for place in _mounted(mounts, nodes, link):
            mounted.setdefault(place, place if process == "self" else f"{place} for process {process}")
    found = list(mounted.values())
    found += [f"swap on {node}" for node in _swaps() if node in nodes]
    found += _holders(nodes)
    for node in nodes:
        found += users_of(node)
    return found


def holders_of_block_device(path: str, link: str = "") -> list[str]:
    """The users that are found quickly: mounts in this process' mount namespace, and stacked devices."""
    nodes = _with_partitions(path)
    return _mounted(_mounts_seen_by("self"), nodes, link) + _holders(nodes)


def _with_partitions(path: str) -> dict[str, Path]:
    """The node and the nodes of its partitions, each with its directory in sysfs."""
    name = os.path.basename(path)
    folder = Path("/sys/class/block", name)
    parts = [part.parent for part in sorted(folder.glob(f"{name}*/partition"))]
    return {path: folder} | {f"/dev/{part.name}": part for part in parts}


def _mounted(mounts: Iterable[Mounted], nodes: Mapping[str, Path], link: str) -> list[str]:
    """The mount points, each once, as text."""
    numbers = _numbers(nodes)
    places = [mount.path for mount in mounts if _is_of(mount, numbers, nodes, link)]
    return [f"mounted at {place}" for place in dict.fromkeys(places)]


def _numbers(nodes: Mapping[str, Path]) -> set[str]:
    numbers = set()
    for folder in nodes.values():
        with suppress(OSError):
            numbers.add((folder / "dev").read_text().strip())
    return numbers


def _is_of(mount: Mounted, numbers: Collection[str], nodes: Collection[str], link: str) -> bool:
    """Whether it is a mount of the device. A btrfs mount has another number, so its source counts too."""
    return mount.number in numbers or mount.source in nodes or (bool(link) and mount.source == link)


def _holders(nodes: Mapping[str, Path]) -> list[str]:
    found: list[str] = []
    for folder in nodes.values():
        with suppress(OSError):
            found += [f"device {holder}" for holder in sorted(os.listdir(folder / "holders"))]
    return found


def _all_mounts() -> Iterator[tuple[str, list[Mounted]]]:
    """The mounts of each mount namespace, with a process in it. The namespace of this process ("self") is first."""
    seen = set()
    for process in ["self", *filter(str.isdigit, os.listdir("/proc"))]:
        try:
            namespace = os.readlink(f"/proc/{process}/ns/mnt")
            if namespace not in seen:
                yield process, _mounts_seen_by(process)
                seen.add(namespace)
        except OSError:  # it has ended, or is another user's
            continue


def _mounts_seen_by(process: str) -> list[Mounted]:
    with open(f"/proc/{process}/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        return parse(lines)


def _swaps() -> list[str]:
    with suppress(OSError), open("/proc/swaps", encoding="utf-8", errors="surrogateescape") as lines:
        return [line.split()[0] for line in list(lines)[1:]]
    return []
