"""The rows of start-up: time from the start of a command to its result, measured by `startup.py`.

A sample is the median of as many starts as fit into its time.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from subprocess import CalledProcessError
from typing import ClassVar, Final, Literal

from ground import Ground
from jobs import Client, Job, JobError, Outcome
from measuring import Meter, Session, Workload
from results import Goal, Sample
from startup import Measured, ended, first_create, greeting, listing

_NOTHING: Final = Job("randread", 4096)
"""No client runs in these rows; a workload has a job."""
_SIZE: Final = 64 << 20
_PYTHON: Final = "python -c pass"


class _Starts:
    """Session that starts a command repeatedly. start: runs it once and returns the seconds."""

    def __init__(self, start: Measured) -> None:
        self._start = start

    def warm_up(self, seconds: float, client: Client, *, again: bool) -> Sample | None:
        return None if again else self.measure(0.0, client)

    def measure(self, seconds: float, client: Client) -> Sample:
        meter, begun = Meter(None, "none"), time.monotonic()
        try:
            taken = [self._start()]
            while time.monotonic() - begun < seconds:
                taken.append(self._start())
        except CalledProcessError as error:
            raise JobError(f"{error}: {error.stderr.decode(errors='replace')[-400:].strip()}") from error
        return meter.sample(Outcome(len(taken), sum(taken), 0, 0.0, 0.0), value=median(taken))


@dataclass(frozen=True)
class Started:
    """Contender for start-up. command: a blkloom for `ls` and `create`, otherwise the whole command line. `serve`: it
    serves a file and is measured until it sends the greeting; `run`: it is measured until it ends.
    """

    clients: ClassVar[tuple[Client, ...]] = ("",)
    family: str
    until: Literal["serve", "ls", "create", "run"]
    command: tuple[str, ...]
    setting: str = ""

    def missing(self) -> str:
        return "" if shutil.which(self.command[0]) else f"{self.command[0]} is not here"

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[Session]:
        file, (program, *_) = ground.scratch / "startup.img", self.command
        file.touch()
        os.truncate(file, _SIZE)
        starts: dict[str, Callable[[], float]] = {
            "serve": lambda: greeting(ground.scratch, [*self.command, str(file)]),
            "ls": lambda: listing(program),
            "create": lambda: first_create(program),
            "run": lambda: ended(list(self.command)),
        }
        yield _Starts(starts[self.until])


def start_workloads(blkloom: str) -> list[Workload]:
    """All workloads, in the order of the report. blkloom: the command to measure."""
    serve, ls, create = "blkloom serve", "blkloom ls", "blkloom create"
    python = Started(_PYTHON, "run", (str(Path(blkloom).with_name("python")), "-c", "pass"))
    qemu = Started("qemu-nbd", "serve", ("qemu-nbd", "-f", "raw"))
    nbdkit = Started("nbdkit", "serve", ("nbdkit", "-f", "file"))
    return [
        Workload(
            "start-serve",
            "a server, to its greeting",
            _NOTHING,
            (Started(serve, "serve", (blkloom, "serve")), qemu, nbdkit, python),
            (Goal(serve, serve, at_most=0.120), *(Goal(serve, peer.family) for peer in (qemu, nbdkit, python))),
            "start",
            unit="s",
        ),
        Workload(
            "start-ls",
            "a list of one device",
            _NOTHING,
            (Started(ls, "ls", (blkloom,)), python),
            (Goal(ls, ls, at_most=0.070), Goal(ls, _PYTHON)),
            "start",
            unit="s",
        ),
        Workload(
            "start-create",
            "the first device, with supervisor and worker",
            _NOTHING,
            (Started(create, "create", (blkloom,)), python),
            (Goal(create, create, at_most=0.300), Goal(create, _PYTHON)),
            "start",
            unit="s",
        ),
    ]
