"""Messages between the supervisor and the zygote. See `worker.zygote`."""

from __future__ import annotations

import msgspec


class _Message(msgspec.Struct, tag_field="kind", kw_only=True, omit_defaults=True):
    pass


class Fork(_Message, tag="fork"):
    """To the zygote: fork a worker with its sockets in `run_dir`, on the channel of this message. targets: names of the
    targets in its tables. client_memory: most bytes that it keeps for clients. level: log level, as in `logging`.
    """

    worker: str
    run_dir: str
    client_memory: int
    targets: list[str] = []
    level: str = "WARNING"
    fds: int = 1


class Forked(_Message, tag="forked"):
    """The worker runs. Comes with a pidfd."""

    worker: str
    pid: int
    fds: int = 1


class ForkRefused(_Message, tag="refused"):
    """The process cannot be forked."""

    worker: str
    errno: int


class Exited(_Message, tag="exited"):
    """A worker has ended and been reaped. status: its exit code, or minus the signal that ended it."""

    worker: str
    pid: int
    status: int


ToZygote = Fork
FromZygote = Forked | ForkRefused | Exited
