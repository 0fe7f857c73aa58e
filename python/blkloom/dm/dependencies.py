"""Dependencies of devices on lower devices and files, as a graph in the order of the kernel and libdevmapper.

A file takes the place of a block device: the path of a block device is shown by its numbers, any other path as it is.
Reads the file system only to check such paths.
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
    """A lower device (of blkloom), or the path of a file or block device, that another device uses."""

    path: str
    device: DeviceInfo | None = None

    def number(self, between: str) -> str:
        """`major, minor`, or the path if there are no numbers."""
        if self.device is not None:
            return f"0{between}{self.device.minor}"
        numbers = _block_numbers(self.path)
        return f"{numbers[0]}{between}{numbers[1]}" if numbers else self.path

    @property
    def block_name(self) -> str:
        """The name of a block device under /dev; the path of a file."""
        if self.device is not None:
            return block_name(self.device)
        return os.path.basename(os.path.realpath(self.path)) if _block_numbers(self.path) else self.path


def block_name(info: DeviceInfo) -> str:
    """The kernel's name of its block device; the device's name where there is none."""
    path = info.node.path if info.node is not None else ""
    return os.path.basename(path) if path.startswith("/dev/") else info.name


def _block_numbers(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None  # The path is in another mount namespace, or does not exist: show it as it is.
    return (os.major(found.st_rdev), os.minor(found.st_rdev)) if stat.S_ISBLK(found.st_mode) else None


def dependencies(info: DeviceInfo, others: Mapping[str, DeviceInfo]) -> list[Dependency]:
    """The dependencies, each once, in the order of the kernel: the last one in the table comes first."""
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
    """All devices and their dependencies."""

    def __init__(self, infos: Iterable[DeviceInfo]) -> None:
        self._others = {info.name: info for info in infos}
        self._nodes: dict[str, Node] = {}
        for info in self._others.values():
            self._add(Dependency(PREFIX + info.name, info))

    def roots(self, *, inverted: bool = False) -> list[Node]:
        """Nodes that no device uses; inverted: nodes without dependencies."""
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
