"""`info` without columns, and the table and status lines, as dmsetup prints them. Pure.

Source: dmsetup.c (_display_info_long, _status).
"""

from __future__ import annotations

from collections.abc import Iterator

from blkloom.control.states import DeviceInfo
from blkloom.dm.names import MAJOR

Segment = tuple[int, int, str, str]
"""start, length (sectors), target, the rest of the line."""


def info_lines(info: DeviceInfo, shown: str) -> Iterator[str]:
    """Lines as dmsetup's, an empty one last; a failed device has its reason, and one whose storage has failed says how
    often and the last time. shown: the name.
    """
    state = info.state + (" (READ-ONLY)" if info.read_only else "") + (" (DEFERRED REMOVE)" if info.deferred else "")
    tables = " & ".join([*(["LIVE"] if info.live else []), *(["INACTIVE"] if info.inactive else [])])
    yield f"Name:              {shown}"
    yield f"State:             {state}"
    if info.reason:
        yield f"Reason:            {info.reason}"
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
    if info.uuid:
        yield f"UUID: {info.uuid}"
    yield ""


def table_segments(text: str) -> list[Segment]:
    """A table's text as segments, its words as they are."""
    segments = []
    for line in text.splitlines():
        start, length, target, *rest = line.split(" ", 3)
        segments.append((int(start), int(length), target, rest[0] if rest else ""))
    return segments


def segment_line(segment: Segment) -> str:
    """As dmsetup's: a space behind the target, whatever follows."""
    start, length, target, rest = segment
    return f"{start} {length} {target} {rest}"


def concise_device(info: DeviceInfo, shown: str, segments: list[Segment]) -> str:
    """One device in the concise form."""
    head = [_quoted(shown), _quoted(info.uuid), str(info.minor), "ro" if info.read_only else "rw"]
    lines = [f"{start} {length} {target} {_quoted(rest)}" for start, length, target, rest in segments]
    return ",".join([*head, *lines])


def _quoted(text: str) -> str:
    return "".join(f"\\{letter}" if letter in ",;\\" else letter for letter in text)
