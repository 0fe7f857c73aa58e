"""Table analysis in the supervisor: the devices below a table, and the memory that it needs.

Only the parser of a target runs here. Its `map` runs in the worker, so an error in it cannot harm the supervisor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from blkloom.errors import ResourceError, TableError, UsageError
from blkloom.supervisor.registry import Entry, Registry
from blkloom.table import Table, parse_table
from blkloom.table.printing import format_table
from blkloom.targets.registry import Targets
from blkloom.units import format_size, to_bytes

_MEMORY: Final = "ram"


class Read(msgspec.Struct, frozen=True):
    """A table after analysis. below: minors of the devices below it. memory: bytes. targets: their names."""

    below: frozenset[int]
    memory: int
    targets: frozenset[str]


class Tables:
    """Analyses tables with the registry. folder: the directory of the devices' sockets. memory: most bytes of all RAM
    devices together.
    """

    def __init__(self, targets: Targets, registry: Registry, folder: Path, *, memory: int) -> None:
        self._targets = targets
        self._registry = registry
        self._folder = str(folder)
        self._memory = memory

    def read(self, entry: Entry, text: str, source: str) -> Read:
        """Analyses a new table. Raises TableError (syntax, missing devices, cycles), ResourceError."""
        found = self.look(text, source)
        self._registry.check_stack(entry, found.below)
        taken = self._registry.memory() - entry.memory_inactive - entry.memory_loading
        if found.memory and taken + found.memory > self._memory:
            raise ResourceError(
                f"{format_size(found.memory)} of memory for '{entry.name}' are too much: RAM devices have "
                f"{format_size(taken)} of the {format_size(self._memory)} they may have",
                cure="remove some, or start the supervisor with a higher --max-ram",
            )
        return found

    def look(self, text: str, source: str, *, loaded: bool = False) -> Read:
        """As `read`, but without the checks of the registry. loaded: the table was loaded before, so a device below it
        may have failed since.
        """
        table = parse_table(text, targets=self._targets, source=source)
        below = set()
        memory = 0
        for segment in table.segments:
            for ref in segment.target.device_refs():
                if (name := ref.device_name(self._folder)) is None:
                    continue
                lower = self._registry.named(name)
                if lower is None or lower.making:
                    raise TableError(
                        "Device lookup failed: no such blkloom device",
                        place=segment.place,
                        value=ref.path,
                        cure="`blkloom ls` lists the devices",
                    )
                if lower.failed and not loaded:
                    raise UsageError(f"device '{name}' has failed: {lower.failed}", cure=f"blkloom resume {name}")
                below.add(lower.minor)
            if segment.target.name == _MEMORY:
                memory += to_bytes(segment.length)
        return Read(frozenset(below), memory, frozenset(segment.target.name for segment in table.segments))

    def parsed(self, text: str) -> Table:
        """Parses a table that was loaded before."""
        return parse_table(text, targets=self._targets)

    def shown(self, text: str) -> str:
        """The table in the form of `dmsetup table`."""
        return format_table(self.parsed(text))


def error_table(size: int) -> str:
    """An error table of that many bytes: all I/O fails."""
    return f"0 {max(1, size // 512)} error"
