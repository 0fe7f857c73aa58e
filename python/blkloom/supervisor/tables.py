"""What the supervisor reads in a table: which devices it stands on, and how much memory it takes.

Only `parse` runs here, never a target's `map`: that is the worker's, and so is what it may break.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from blkloom.errors import ResourceError, TableError, UsageError
from blkloom.supervisor.registry import Entry, Registry
from blkloom.table import Table, parse
from blkloom.table.printing import format_table
from blkloom.target.registry import Targets
from blkloom.units import format_size, to_bytes

_MEMORY: Final = "ram"


class Read(msgspec.Struct, frozen=True):
    """below: minors of the devices it stands on. memory: bytes. targets: their names."""

    below: frozenset[int]
    memory: int
    targets: frozenset[str]


class Tables:
    """Reads tables against the registry. folder: where devices have their sockets. memory: bytes all RAM
    devices may have together.
    """

    def __init__(self, targets: Targets, registry: Registry, folder: Path, *, memory: int) -> None:
        self._targets = targets
        self._registry = registry
        self._folder = str(folder)
        self._memory = memory

    def read(self, entry: Entry, text: str, source: str) -> Read:
        """Raises TableError: what does not parse, devices that are not there, cycles. ResourceError."""
        found = self.look(text, source)
        self._registry.check_stack(entry, found.below)
        taken = self._registry.memory() - entry.memory_inactive - entry.memory_loading
        if found.memory and taken + found.memory > self._memory:
            raise ResourceError(
                f"{format_size(found.memory)} of memory for {entry.name!r} are too much: RAM devices have "
                f"{format_size(taken)} of the {format_size(self._memory)} they may have",
                cure="remove some, or start the supervisor with a higher --max-ram",
            )
        return found

    def look(self, text: str, source: str, *, loaded: bool = False) -> Read:
        """As `read`, without the checks that are the registry's. loaded: it was loaded once, and may
        stand on what has failed since.
        """
        table = parse(text, targets=self._targets, source=source)
        below = set()
        memory = 0
        for segment in table.segments:
            for leg in segment.target.legs():
                if (name := leg.device_name(self._folder)) is None:
                    continue
                lower = self._registry.named(name)
                if lower is None or lower.making:
                    raise TableError(
                        "Device lookup failed: no such blkloom device",
                        place=segment.place,
                        value=leg.path,
                        cure="`blkloom ls` lists those there are",
                    )
                if lower.failed and not loaded:
                    raise UsageError(f"device {name!r} has failed: {lower.failed}", cure=f"blkloom resume {name}")
                below.add(lower.minor)
            if segment.target.name == _MEMORY:
                memory += to_bytes(segment.length)
        return Read(frozenset(below), memory, frozenset(segment.target.name for segment in table.segments))

    def parsed(self, text: str) -> Table:
        """A table that was loaded once."""
        return parse(text, targets=self._targets)

    def shown(self, text: str) -> str:
        """As `dmsetup table` shows it."""
        return format_table(self.parsed(text))


def error_table(size: int) -> str:
    """A table of that many bytes that fails all I/O."""
    return f"0 {max(1, size // 512)} error"
