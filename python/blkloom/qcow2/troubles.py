"""What went wrong in an image since its table was loaded: counts, and the latest of each kind.

Told by the storage (`watched.py`), by images that find their metadata wrong, and by the target; asked by the messages
`get_errors` and `get_event`. Nothing fails. Jobs that decompress tell of their reads too: any thread.

Source of the first lines and of the events' names: dm-qcow2 (Tkhai 2020), drivers/md/dm-qcow2-cmd.c.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from typing import Final, Literal, get_args

Kind = Literal[
    "metadata_read", "metadata_write", "sync", "allocation", "data_read", "data_write", "no_space", "corrupt"
]

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
"""metadata_*: reads and writes of tables. allocation: space that could not be had, for clusters or tables. data_*: data
that Python moved (copy on write, compressed clusters, damaged ones too), or that the engine found no space for.
no_space: requests that found none. corrupt: metadata that cannot be.
"""

Event = Literal["event_ENOSPC", "event_CORRUPT"]


class Troubles:
    """Of one loaded table."""

    def __init__(self) -> None:
        self.write_back_failed = False
        """Whether the last flush of metadata did not get through."""
        self.cut_failed = False
        """Whether the file could not be cut behind its last cluster, the last time."""
        self._lock = threading.Lock()
        self._counts: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self._latest: dict[Kind, str] = {}
        self._events: deque[Event] = deque()

    def note(self, kind: Kind, error: OSError, where: str = "") -> None:
        """One more. where: what was being done."""
        name = errno.errorcode.get(error.errno or 0, "error")
        with self._lock:
            self._counts[kind] += 1
            self._latest[kind] = " ".join((f"{name}: {where}" if where else str(error)).split())

    def event(self, event: Event) -> None:
        """Something its users should know; once, however often it happens before they ask."""
        with self._lock:
            if event not in self._events:
                self._events.append(event)

    def take_event(self) -> Event | None:
        """The oldest that was not taken yet."""
        with self._lock:
            return self._events.popleft() if self._events else None

    def report(self, *, wants_check: bool) -> str:
        """A line each: three flags as dm-qcow2 has them, then `<kind>=<count>` and, unless that is 0, the latest."""
        lines = [
            f"wants_check={int(wants_check)}",
            f"md_writeback_error={int(self.write_back_failed)}",
            f"truncate_error={int(self.cut_failed)}",
        ]
        with self._lock:
            lines += [f"{kind}={self._counts[kind]} {self._latest.get(kind, '')}".rstrip() for kind in KINDS]
        return "\n".join(lines) + "\n"
