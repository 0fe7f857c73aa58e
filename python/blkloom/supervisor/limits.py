"""What a supervisor is started with: its limits, and what the program before it in the same process left."""

from __future__ import annotations

import msgspec


class Limits(msgspec.Struct, frozen=True):
    """devices: of this supervisor. memory: bytes of all RAM devices. deaths: of a worker within a minute. idle:
    seconds without devices and clients after which it ends; 0 for never. recovery: seconds that I/O waits for a killed
    worker to end. client_memory: bytes that its clients may make a worker keep.
    """

    devices: int
    memory: int
    deaths: int
    idle: float
    recovery: float
    client_memory: int


class Inherited(msgspec.Struct, frozen=True):
    """What the program before this one in the same process left open: lock, control socket, and the
    client that asked for the upgrade.
    """

    lock: int
    control: int
    client: int
    request: int
    stored: int
    """A memfd with the labels and numbers of the store's descriptors."""
    ours: int
    """Whether the control socket's file is the supervisor's to remove."""
