"""Reads the mounts of this process from /proc/self/mountinfo. Source: proc_pid_mountinfo(5)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_OCTAL = re.compile(r"\\([0-7]{3})")


class Mounted(NamedTuple):
    """One mount. kind: type and subtype of the file system ("fuse.blkloom"). source: the first field of mount(8).
    number: "major:minor" of the file system.
    """

    path: str
    kind: str
    source: str
    options: frozenset[str]
    number: str = ""


def parse(lines: Iterable[str]) -> list[Mounted]:
    """The mounts, in the order in which the kernel lists them: of two at one path the later hides the other."""
    return list(parse_with_ids(lines).values())


def parse_with_ids(lines: Iterable[str]) -> dict[int, Mounted]:
    """The same, by the number of the mount."""
    mounts = {}
    for line in lines:
        words, _, system = line.rstrip("\n").partition(" - ")
        identifier, _, number, _, path, options, *_ = words.split(" ")
        kind, source, of_system = [*system.split(" "), "", ""][:3]
        joined = frozenset(filter(None, [*options.split(","), *of_system.split(",")]))
        mounts[int(identifier)] = Mounted(_unescaped(path), kind, _unescaped(source), joined, number)
    return mounts


def mounted_at(path: str) -> Mounted | None:
    """Finds the mount at an absolute path without symbolic links. Does not access the mounted file system."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        found = [mount for mount in parse(lines) if mount.path == path]
    return found[-1] if found else None


def _unescaped(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
