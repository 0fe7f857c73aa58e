"""Measuring: a client against a contender with the CPU accounts read before and after, and the rounds.

A `Session` is a contender that is up and can be measured; a `Contender` knows how to bring it up.
Rounds are interleaved (A B C B A C ...), in an order that is another every round, and the same in every run: a
machine whose speed drifts does it to everybody, and nobody is always the one who comes after another. One contender is
up at a time and started anew every time. One thread; the processes measured are
others. A contender that fails is reported with its reason and left out of later rounds.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

import client
from ground import Ground, GroundError
from jobs import Job, JobError, Outcome
from results import Contest, Goal, Missing, Sample, WorkloadResult
from servers import Server, ServerError

_TICKS: Final = os.sysconf("SC_CLK_TCK")

Who = Literal["server", "kernel", "nobody"]
"""Who serves the I/O, and so whose CPU is the server's: a process, kernel threads, or nobody but
the client itself."""


class Session(Protocol):
    """A contender that is up."""

    def measure(self, seconds: float) -> Sample:
        """Run the job for about so long. Raises JobError, ServerError, OSError."""
        ...


class Contender(Protocol):
    """Somebody to measure; hashable."""

    @property
    def family(self) -> str:
        """Who it is in the report."""
        ...

    @property
    def setting(self) -> str:
        """How it is set up; "" where there is one way only."""
        ...

    def missing(self) -> str:
        """What it lacks on this machine, and how to get it; "" when it can run."""
        ...

    def session(self, ground: Ground, job: Job) -> AbstractContextManager[Session]:
        """Bring it up, and down again. Raises ServerError, GroundError, JobError, OSError."""
        ...


@dataclass(frozen=True)
class Workload:
    """One job for several contenders, and the rows of the report it gives."""

    name: str
    title: str
    job: Job
    contenders: tuple[Contender, ...]
    goals: tuple[Goal, ...]
    unit: Literal["IOPS", "s"] = "IOPS"


@dataclass(frozen=True)
class Effort:
    """How long: rounds, seconds a measurement, seconds of warming up before each."""

    rounds: int
    seconds: float
    warm_up: float


@dataclass(frozen=True)
class _Account:
    """CPU seconds so far: of the server, of ended children, of this process, of the machine."""

    server: float
    children: float
    own: float
    busy: float
    stolen: float

    @staticmethod
    def read(server: Server | None) -> _Account:
        with Path("/proc/stat").open() as stat:  # proc_stat(5): user nice system idle iowait irq softirq steal
            user, nice, system, _, _, irq, softirq, steal = (int(word) for word in stat.readline().split()[1:9])
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return _Account(
            server=server.cpu_seconds() if server else 0.0,
            children=children.ru_utime + children.ru_stime,
            own=time.process_time(),
            busy=(user + nice + system + irq + softirq) / _TICKS,
            stolen=steal / _TICKS,
        )


class Meter:
    """Keeps the accounts of one measurement, from its making to `sample`. Children that end in
    between are taken for the load generator.
    """

    def __init__(self, server: Server | None, who: Who) -> None:
        self._server, self._who = server, who
        self._before = _Account.read(server)

    def sample(self, outcome: Outcome, *, value: float | None = None, extra: dict[str, float] | None = None) -> Sample:
        """value: of the sample; I/Os per second unless given."""
        before, after = self._before, _Account.read(self._server)
        client = after.children - before.children
        rest = after.busy - before.busy - client - (after.own - before.own)
        server = {"server": after.server - before.server, "kernel": max(rest, 0.0), "nobody": None}[self._who]
        return Sample(
            value=value if value is not None else outcome.operations / outcome.seconds,
            operations=outcome.operations,
            server_cpu=server,
            client_cpu=client,
            other_cpu=max(rest - (server or 0.0), 0.0),
            stolen=after.stolen - before.stolen,
            seconds=outcome.seconds,
            errors=outcome.errors,
            p50_us=outcome.p50_us,
            p99_us=outcome.p99_us,
            client_busy=outcome.busy,
            extra=extra or {},
        )


class ClientSession:
    """Measured with the job's client. where: fio's words for the engine and the data; extra: figures that every
    sample of this session carries.
    """

    def __init__(
        self,
        ground: Ground,
        job: Job,
        where: Sequence[str],
        *,
        who: Who,
        server: Server | None = None,
        extra: dict[str, float] | None = None,
    ) -> None:
        self._ground, self._job, self._where = ground, job, list(where)
        self._who, self._server, self._extra = who, server, extra or {}

    def fill(self) -> None:
        """Write the whole device once, so that memory that is given out late is there."""
        self._run(Job("write", 1 << 20, depth=4), seconds=None)

    def measure(self, seconds: float) -> Sample:
        meter = Meter(self._server, self._who)
        return meter.sample(self._run(self._job, seconds), extra=self._extra)

    def once(self) -> Sample:
        """The job over the whole disk, once, however long that takes."""
        meter = Meter(self._server, self._who)
        return meter.sample(self._run(self._job, None), extra=self._extra)

    def _run(self, job: Job, seconds: float | None) -> Outcome:
        return client.run(job, self._where, size=self._ground.size, scratch=self._ground.scratch, seconds=seconds)


def measure(
    workload: Workload,
    ground: Ground,
    effort: Effort,
    *,
    report: Callable[[str], None],
) -> tuple[WorkloadResult, list[Missing]]:
    """All rounds of a workload. report is told what is being measured, once a measurement.

    A contender that cannot run gets no samples and a Missing; one that fails in a later round
    keeps none either, since its figures would not stand for the same rounds as the others'.
    """
    trouble = {contender: contender.missing() for contender in workload.contenders}
    samples: dict[Contender, list[Sample]] = {contender: [] for contender in workload.contenders}
    shuffled = random.Random(workload.name)
    for number in range(effort.rounds):
        for contender in shuffled.sample(workload.contenders, len(workload.contenders)):
            report(f"{workload.name} · {_label(contender)} · {number + 1}/{effort.rounds}")
            if trouble[contender]:
                continue
            try:
                with contender.session(ground, workload.job) as session:
                    session.measure(effort.warm_up)
                    samples[contender].append(session.measure(effort.seconds))
            except (JobError, ServerError, GroundError, OSError, subprocess.TimeoutExpired) as error:
                trouble[contender] = f"{type(error).__name__}: {error}"
                samples[contender].clear()
    contests = [
        Contest(contender.family, contender.setting, samples[contender], trouble[contender])
        for contender in workload.contenders
    ]
    missing = [
        Missing(f"{workload.name}: {_label(contender)}", reason) for contender, reason in trouble.items() if reason
    ]
    result = WorkloadResult(
        workload.name, workload.title, workload.unit, workload.job.block, list(workload.goals), contests
    )
    return result, missing


def _label(contender: Contender) -> str:
    return f"{contender.family} ({contender.setting})" if contender.setting else contender.family
