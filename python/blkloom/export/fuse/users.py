"""Finds the users of a mounted file: processes and kernel loop devices. Does not access the file itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def users_of(path: str) -> Iterator[str]:
    """Descriptions of the users: "fio (process 42)", "/dev/loop0". Only root sees processes of other users. path:
    absolute, without symbolic links.
    """
    for process in filter(str.isdigit, os.listdir("/proc")):
        if _has_open(process, path):
            yield f"{_name(process)} (process {process})"
    for device in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        try:
            found = device.read_text().rstrip("\n")
        except OSError:  # it was detached just now
            continue
        if found == path:
            yield f"/dev/{device.parts[3]}"


def _has_open(process: str, path: str) -> bool:
    try:
        descriptors = os.listdir(f"/proc/{process}/fd")
    except OSError:  # it has ended, or belongs to another user
        return False
    for descriptor in descriptors:
        try:
            if os.readlink(f"/proc/{process}/fd/{descriptor}") == path:
                return True
        except OSError:
            continue
    return False


def _name(process: str) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text().rstrip("\n")
    except OSError:
        return "?"
