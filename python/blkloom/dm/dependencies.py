"""What devices stand on, and the graph of it, in the order the kernel and libdevmapper have it in.

Files are what a kernel would see as block devices: a path that is one shows its numbers, any other its
path. Reads the file system only to look at such paths.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec

from blkloom.control.states import DeviceInfo

PREFIX: Final = "blkloom:"


class Dependency(msgspec.Struct, frozen=True):
    """A device (of blkloom) or a path that another stands on."""

    path: str
    device: DeviceInfo | None = None

    def number(self, between: str) -> str:
        """`major, minor`, or the path of what has none."""
        if self.device is not None:
            return f"0{between}{self.device.minor}"
        numbers = _block_numbers(self.path)
        return f"{numbers[0]}{between}{numbers[1]}" if numbers else self.path

    @property
    def block_name(self) -> str:
        """As a block device is called under /dev; a file's path."""
        if self.device is not None:
            return self.device.name
        return os.path.basename(os.path.realpath(self.path)) if _block_numbers(self.path) else self.path


def _block_numbers(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None  # A path of another mount namespace, or gone: it is shown as it is.
    return (os.major(found.st_rdev), os.minor(found.st_rdev)) if stat.S_ISBLK(found.st_mode) else None


def dependencies(info: DeviceInfo, others: Mapping[str, DeviceInfo]) -> list[Dependency]:
    """Each once, in the kernel's order: what the table names last comes first."""
    found = []
    for text in reversed(dict.fromkeys(info.deps)):
        name = text.removeprefix(PREFIX)
        found.append(Dependency(text, others.get(name)) if text.startswith(PREFIX) else Dependency(text))
    return found


class Node(msgspec.Struct, eq=False):
    """A device or a path in the graph."""

    name: str
    """"" for a path."""
    dependency: Dependency
    uses: list[Node] = msgspec.field(default_factory=list)
    used_by: list[Node] = msgspec.field(default_factory=list)


class Graph:
    """All devices and what they stand on."""

    def __init__(self, infos: Iterable[DeviceInfo]) -> None:
        self._others = {info.name: info for info in infos}
        self._nodes: dict[str, Node] = {}
        for info in self._others.values():
            self._add(Dependency(PREFIX + info.name, info))

    def roots(self, *, inverted: bool = False) -> list[Node]:
        """Nodes nothing stands on; inverted: nodes that stand on nothing."""
        return [node for node in self._nodes.values() if not (node.uses if inverted else node.used_by)]

    def _add(self, dependency: Dependency) -> Node:
        if dependency.path in self._nodes:
            return self._nodes[dependency.path]
        info = dependency.device
        node = self._nodes[dependency.path] = Node(info.name if info else "", dependency)
        for below in dependencies(info, self._others) if info else ():
            child = self._add(below)
            if child not in node.uses:
                node.uses.append(child)
                child.used_by.append(node)
        return node
