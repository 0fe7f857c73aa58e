"""Types of answers with several fields, of workers and of the supervisor. As in messages, unknown fields are ignored
and missing fields have their defaults.
"""

from __future__ import annotations

import msgspec

from blkloom.control.states import DeviceInfo, DeviceState, NodeState, Number


class _Reply(msgspec.Struct, kw_only=True, omit_defaults=True):
    pass


class TableLoaded(_Reply):
    """The table that is now in the inactive slot. deps: see `DeviceInfo`. whole: see `LoadedTarget.whole`."""

    deps: list[str] = []
    whole: bool = False


class Attached(_Reply):
    """A node. passed_over: the better ways, and why they are not used. survives: its users' requests wait for another
    worker when one is killed; without, they fail.
    """

    node: NodeState
    survives: bool = True
    passed_over: dict[str, str] = {}


class Resumed(_Reply):
    """The live table: the number of its segments, its targets (each once), and the size in bytes."""

    targets: Number = 0
    types: list[str] = []
    size: Number = 0
    block_size: Number = 512
    event: Number = 0
    """The device's."""
    table: str | None = None
    """The text of the table, if a target has found a changed size."""


class Description(_Reply):
    """States of all devices of a worker."""

    devices: list[DeviceState] = []
    infos: list[DeviceInfo] = []


class Frozen(_Reply):
    """All devices of a worker, with their connections."""

    devices: list[DeviceState] = []
