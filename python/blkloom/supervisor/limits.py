"""Start parameters of a supervisor: its limits, and the state it inherits from the program before an upgrade."""

from __future__ import annotations

import msgspec


class Limits(msgspec.Struct, frozen=True):
    """Limits of a supervisor. devices: number of devices. memory: bytes of all RAM devices. deaths: of a worker within
    a minute. idle: seconds without devices and clients after which it ends; 0 for never. recovery: seconds that I/O
    waits for a killed worker to end. client_memory: bytes that a worker keeps at most for its clients. keep_devices:
    SIGTERM and SIGINT end the supervisor, but not its devices, and systemd stores descriptors of them.
    """

    devices: int
    memory: int
    deaths: int
    idle: float
    recovery: float
    client_memory: int
    keep_devices: bool = False


class Inherited(msgspec.Struct, frozen=True):
    """Descriptors that the program before an upgrade left open in this process: the lock, the control socket, and the
    connection of the client that asked for the upgrade.
    """

    lock: int
    control: int
    client: int
    request: int
    stored: int
    """A memfd with the labels and numbers of the store's descriptors."""
    ours: int
    """Whether the supervisor owns the file of the control socket and may remove it."""
