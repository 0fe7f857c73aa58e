"""One entry of the conformance suite's list: a table and its requirements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from blkloom import TargetSpec


@dataclass(frozen=True)
class UnderTest:
    """A table and what it needs. below: tables of the devices it stands on, by name. own: what the
    targets that are neither built in nor made of files hold at first, by their names. allocated: its files
    have no holes, and many extents; but for those named in `sparse`. examples: how many sequences of
    requests are tried, None for as many as usual. cut: bytes that files have, by name; reads
    beyond them get zeros.
    """

    table: str
    read_only: bool = False
    direct_io: bool = False
    below: Mapping[str, str] = field(default_factory=dict)
    targets: tuple[type[TargetSpec], ...] = ()
    own: Mapping[str, bytes] = field(default_factory=dict)
    allocated: bool = False
    sparse: tuple[str, ...] = ()
    examples: int | None = None
    cut: Mapping[str, int] = field(default_factory=dict)
