"""Output of the guests' scripts on nodes."""

from __future__ import annotations

from typing import NamedTuple


class NodeOutput(NamedTuple):
    """busy: the refusal to remove a node that is in use. full, trimmed: blocks of the file before and after fstrim."""

    busy: str
    full: int
    trimmed: int


def node_output(printed: str) -> NodeOutput:
    """From the lines `busy: ...` and `blocks <full> <trimmed>`, of which the last count."""
    busy, full, trimmed = "", 0, 0
    for line in printed.splitlines():
        if line.startswith("busy: "):
            busy = line
        if line.startswith("blocks "):
            full, trimmed = map(int, line.split()[1:])
    return NodeOutput(busy, full, trimmed)
