"""Formats `info` without columns, tables and status lines like dmsetup. Pure.

Source: dmsetup.c (_display_info_long, _status).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from blkloom.control.states import DeviceInfo
from blkloom.device_names import MAJOR

Segment = tuple[int, int, str, str]
"""start, length (sectors), target, the rest of the line."""
_OF_MACHINES: Final = "vhost-user"
"""Kind of the exports for virtual machines; see `export.registry`."""


def info_lines(info: DeviceInfo, shown: str) -> Iterator[str]:
    """The lines of dmsetup's `info`, with an empty line at the end. Further lines: the reason of a failed device, its
    fault, I/O errors (their number and the last one), the node, paths of FUSE files, and sockets of virtual machines.
    shown: the name.
    """
    state = info.state + (" (READ-ONLY)" if info.read_only else "") + (" (DEFERRED REMOVE)" if info.deferred else "")
    tables = " & ".join([*(["LIVE"] if info.live else []), *(["INACTIVE"] if info.inactive else [])])
    yield f"Name:              {shown}"
    yield f"State:             {state}"
    if info.reason:
        yield f"Reason:            {info.reason}"
    if info.fault:
        yield f"Fault:             {info.fault}"
    for failed in info.sync_errors:
        yield f"Lost data:         a sync of {failed}"
    yield f"Tables present:    {tables or 'None'}"
    yield f"Open count:        {info.open_count}"
    yield f"Event number:      {info.event}"
    yield f"Major, minor:      {MAJOR}, {info.minor}"
    yield f"Number of targets: {info.targets}"
    if info.io_errors:
        yield f"I/O errors:        {info.io_errors}"
        yield f"Last error:        {info.last_io_error}"
    if info.node is not None:
        yield f"Node:              {info.node.path}"
        for user in info.node.used_by:
            yield f"Node in use:       {user}"
    for path in files(info):
        yield f"File:              {path}"
    for export in info.exports:
        if export.kind == _OF_MACHINES:
            yield f"Socket for VMs:    {export.path}"
    if info.uuid:
        yield f"UUID: {info.uuid}"
    yield ""


def files(info: DeviceInfo) -> list[str]:
    """Paths of its FUSE files, but for one that only its node uses."""
    hidden = info.node.export if info.node is not None and info.node.own_export else ""
    files = [export for export in info.exports if export.path and export.kind != _OF_MACHINES]
    return [export.path for export in files if export.id != hidden]


def table_segments(text: str) -> list[Segment]:
    """Splits the text of a table into segments, without changing their words."""
    segments = []
    for line in text.splitlines():
        start, length, target, *rest = line.split(" ", 3)
        segments.append((int(start), int(length), target, rest[0] if rest else ""))
    return segments


def segment_line(segment: Segment) -> str:
    """A line in dmsetup's format: always a space after the target."""
    start, length, target, rest = segment
    return f"{start} {length} {target} {rest}"


def concise_device(info: DeviceInfo, shown: str, segments: list[Segment]) -> str:
    """One device in the concise form."""
    head = [_quoted(shown), _quoted(info.uuid), str(info.minor), "ro" if info.read_only else "rw"]
    lines = [f"{start} {length} {target} {_quoted(rest)}" for start, length, target, rest in segments]
    return ",".join([*head, *lines])


def _quoted(text: str) -> str:
    return "".join(f"\\{letter}" if letter in ",;\\" else letter for letter in text)
