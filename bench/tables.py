"""Text of tables with many segments of one file. Pure; uses nothing of blkloom."""

from __future__ import annotations

from pathlib import Path


def table_text(path: Path, size: int, segments: int) -> str:
    """A table of the first `size` bytes of the file, in `segments` segments. Neighbours are swapped in pairs, so
    that no two segments could be merged into one.
    """
    sectors = size // 512
    edges = [sectors * i // segments for i in range(segments + 1)]
    if segments == 1:
        return f"0 {sectors} loop {path}\n"
    lengths = [edges[i + 1] - edges[i] for i in range(segments)]
    order = [i ^ 1 if i ^ 1 < segments else i for i in range(segments)]
    lines, start = [], 0
    for i in order:
        lines.append(f"{start} {lengths[i]} loop {path} {edges[i] * 512}\n")
        start += lengths[i]
    return "".join(lines)
