"""Paths and devices that a table names, and the order in which devices are made. Pure."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from blkloom.control.rundir import RunDir
from blkloom.device_names import STACKED, unmangle
from blkloom.errors import UsageError
from blkloom.table import Segment, Table
from blkloom.table.syntax import Argument
from blkloom.targets.device_ref import DeviceRef

_NUMBERS = re.compile(r"[0-9]+:[0-9]+")
_PARTITION = re.compile(r"-part[0-9]+$")


def paths(table: Table) -> Iterator[str]:
    """The paths of files, block devices and devices in a table, in its order."""
    seen: list[str] = []

    def see(path: str) -> str:
        seen.append(path)
        return path

    with_paths(table, see)
    yield from dict.fromkeys(seen)


def with_paths(table: Table, change: Callable[[str], str]) -> Table:
    """The table with other paths. change: returns the new path for a path."""

    def changed(value: object) -> object:
        if isinstance(value, DeviceRef):
            return msgspec.structs.replace(value, path=change(value.path))
        if isinstance(value, tuple):
            return tuple(map(changed, value))
        return value

    segments = []
    for segment in table.segments:
        target = segment.target
        fields = {name: changed(getattr(target, name)) for name in target.__struct_fields__}
        for argument in target.arguments:
            if isinstance(argument, Argument) and argument.is_path and isinstance(fields[argument.fields[0]], str):
                fields[argument.fields[0]] = change(str(fields[argument.fields[0]]))
        segments.append(Segment(segment.start, segment.length, type(target)(**fields), segment.place))
    return Table(tuple(segments))


def is_device(path: str) -> bool:
    """Whether a path is `blkloom:NAME`."""
    return path.startswith(STACKED)


def is_absolute(path: str) -> bool:
    """Whether a path means the same in every directory."""
    return is_device(path) or os.path.isabs(path) or _NUMBERS.fullmatch(path) is not None


def needs(table: Table, run_dir: RunDir, nodes: Mapping[str, str]) -> set[str]:
    """The names of the devices that the table names: as `blkloom:NAME`, or by the path of a socket, a stable name of a
    node (also of a partition), or a file of the run directory. nodes: names of devices, by the paths of their nodes.
    """
    found = set()
    for path in paths(table):
        folder, last = os.path.split(os.path.normpath(path))
        if is_device(path):
            found.add(path.removeprefix(STACKED))
        elif path in nodes:
            found.add(nodes[path])
        elif folder in {str(run_dir.devices), str(run_dir.files)}:
            found.add(unmangle(last))
        elif folder == str(run_dir.links):
            found |= {unmangle(last), unmangle(_PARTITION.sub("", last))}
    return found


def in_order(needed: Mapping[str, Iterable[str]]) -> tuple[list[str], dict[str, UsageError]]:
    """Sorts devices so that each comes after those that it needs. needed: for each device those it needs; others than
    the keys are ignored. Returns the order, and the errors of the devices that are in a cycle or need one that is.
    """
    waiting = {name: {other for other in others if other in needed} for name, others in sorted(needed.items())}
    order: list[str] = []
    while ready := [name for name, others in waiting.items() if not others]:
        order += ready
        for name in ready:
            del waiting[name]
        for others in waiting.values():
            others.difference_update(ready)
    return order, {name: _cycle_error(name, waiting) for name in waiting}


def _cycle_error(name: str, waiting: Mapping[str, set[str]]) -> UsageError:
    """waiting: devices that all need another one of them, so that following them leads into a cycle."""
    way = [name]
    while (following := min(waiting[way[-1]])) not in way:
        way.append(following)
    cycle = way[way.index(following) :]
    shown = " needs ".join(f"'{one}'" for one in [*cycle, following])
    if name in cycle:
        return UsageError(f"needs itself: {shown}", cure="change one of their tables")
    return UsageError(f"needs '{way[1]}', which cannot be made: {shown}", cure="change one of their tables")
