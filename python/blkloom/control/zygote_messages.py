"""What the supervisor and the zygote tell each other. See `worker.zygote`."""

from __future__ import annotations

import msgspec


class _Message(msgspec.Struct, tag_field="kind", kw_only=True, omit_defaults=True):
    pass


class Fork(_Message, tag="fork"):
    """To the zygote: a worker for `run_dir`, on the channel that rides along. targets: that its tables will name.
    client_memory: bytes that its clients may make it keep. level: of its log, as `logging` calls it.
    """

    worker: str
    run_dir: str
    client_memory: int
    targets: list[str] = []
    level: str = "WARNING"
    fds: int = 1


class Forked(_Message, tag="forked"):
    """It lives. A pidfd rides along."""

    worker: str
    pid: int
    fds: int = 1


class ForkRefused(_Message, tag="refused"):
    """No process can be had."""

    worker: str
    errno: int


class Exited(_Message, tag="exited"):
    """A worker has ended and been reaped. status: its exit code, or minus the signal that ended it."""

    worker: str
    pid: int
    status: int


ToZygote = Fork
FromZygote = Forked | ForkRefused | Exited
