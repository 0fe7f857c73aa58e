"""Measures contenders: runs clients in rounds, and reads the CPU times before and after.

A `Session` is a running contender; a `Contender` can start one. Rounds are interleaved (A B C B A C ...), in an order
that differs from round to round and is the same in every run. So a change of the machine's speed affects all
contenders, and none always follows the same other one. Only one contender runs at a time, and it is started anew for
each round. The first of its clients warms it up, while system calls and context switches are counted. One thread; the
measured processes are separate. A failed contender is reported with the reason and left out of later rounds.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import Field, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Protocol

import client as clients
import counting
from counting import CountError, Counts
from ground import Ground, GroundError
from jobs import Client, Job, JobError, Outcome
from results import Contest, Goal, Missing, Sample, TableName, WorkloadResult
from servers import Server, ServerError

_TICKS: Final = os.sysconf("SC_CLK_TCK")

Who = Literal["server", "kernel", "none"]
"""What serves the I/O, and so whose CPU time is the server's: a process, kernel threads, or only the client itself."""
NBD_CLIENTS: Final[tuple[Client, ...]] = ("nbd_load", "fio")
"""Every server that speaks NBD is measured with both; the first decides."""
BESIDE: Final = 0.5
"""A client that does not decide is measured for this share of the time."""


class Session(Protocol):
    """A running contender."""

    def warm_up(self, seconds: float, client: Client, *, again: bool) -> Sample | None:
        """Run the job before it is measured. again: this is not the first round. The sample counts; None where nothing
        is to be warmed up. Raises CountError, JobError, ServerError, OSError.
        """
        ...

    def measure(self, seconds: float, client: Client) -> Sample:
        """Run the job for about so long. Raises JobError, ServerError, OSError."""
        ...


class Contender(Protocol):
    """A contender: a server or program that can be started and measured; a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def clients(self) -> tuple[Client, ...]:
        """The clients that measure it, one after the other."""
        ...

    @property
    def family(self) -> str:
        """Its name in the report."""
        ...

    @property
    def setting(self) -> str:
        """Its settings; "" if there is only one."""
        ...

    def missing(self) -> str:
        """What is missing on this machine, and how to install it; "" if the contender can run."""
        ...

    def session(self, ground: Ground, job: Job) -> AbstractContextManager[Session]:
        """Start it, and stop it at the end of the block. Raises ServerError, GroundError, JobError, OSError."""
        ...


@dataclass(frozen=True)
class Effort:
    """Length of the measurements: rounds, seconds per measurement, seconds of warm-up before the first one of a
    session.
    """

    rounds: int
    seconds: float
    warm_up: float


@dataclass(frozen=True)
class Workload:
    """One job for several contenders, and its row in the report. table: of the report; "" for the appendix only.
    slower: factor for the measuring time. warm_up: seconds, if it takes longer than usual.
    """

    name: str
    title: str
    job: Job
    contenders: tuple[Contender, ...]
    goals: tuple[Goal, ...]
    table: TableName = ""
    unit: Literal["IOPS", "s"] = "IOPS"
    slower: float = 1.0
    warm_up: float = 0.0

    def seconds(self, effort: Effort, client: Client, first: Client) -> float:
        """How long to measure with a client of a contender whose first one is `first`."""
        return effort.seconds * self.slower * (1.0 if client == first else BESIDE)


@dataclass(frozen=True)
class _Account:
    """CPU seconds up to now: of the server, of ended children, of this process, of the machine."""

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
    """CPU times of one measurement, from the construction to `sample`. Children that end in between count as the load
    generator.
    """

    def __init__(self, server: Server | None, who: Who) -> None:
        self._server, self._who = server, who
        self._before = _Account.read(server)

    def sample(
        self,
        outcome: Outcome,
        *,
        value: float | None = None,
        extra: dict[str, float] | None = None,
        counts: Counts | None = None,
    ) -> Sample:
        """value: of the sample; I/Os per second unless given. counts: of the server meanwhile."""
        before, after = self._before, _Account.read(self._server)
        client = after.children - before.children
        rest = after.busy - before.busy - client - (after.own - before.own)
        server = {"server": after.server - before.server, "kernel": max(rest, 0.0), "none": None}[self._who]
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
            calls=counts.calls / outcome.operations if counts else None,
            switches=counts.switches / outcome.operations if counts else None,
        )


class ClientSession:
    """Measured with a load generator. where: fio's words for the engine and the data; extra: figures that every
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

    def fill(self, client: Client = "nbd_load") -> None:
        """Write the whole device once, so that memory that is given out late is there."""
        self._run(Job("write", 1 << 20, depth=4), client, seconds=None)

    def warm_up(self, seconds: float, client: Client, *, again: bool) -> Sample | None:
        return self._sample(seconds, client, counting_too=True)

    def measure(self, seconds: float, client: Client) -> Sample:
        return self._sample(seconds, client)

    def once(self, client: Client, *, counting_too: bool = False) -> Sample:
        """The job over the whole disk, once, however long that takes."""
        return self._sample(None, client, counting_too=counting_too)

    def _sample(self, seconds: float | None, client: Client, *, counting_too: bool = False) -> Sample:
        meter = Meter(self._server, self._who)
        with counts_of(self._server if counting_too else None) as counts:
            outcome = self._run(self._job, client, seconds)
        return meter.sample(outcome, extra=self._extra, counts=counts)

    def _run(self, job: Job, client: Client, seconds: float | None) -> Outcome:
        ground = self._ground
        return clients.run(job, client, self._where, size=ground.size, scratch=ground.scratch, seconds=seconds)


def counts_of(server: Server | None) -> AbstractContextManager[Counts | None]:
    """What the server does in the block; None where there is no server, or nothing to count with."""
    return nullcontext() if server is None or counting.lack() else counting.counted(server.pid)


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
    samples: dict[tuple[Contender, Client], list[Sample]] = {
        (contender, client): [] for contender in workload.contenders for client in contender.clients
    }
    shuffled = random.Random(workload.name)
    for number in range(effort.rounds):
        for contender in shuffled.sample(workload.contenders, len(workload.contenders)):
            report(f"{workload.name} · {_label(contender)} · {number + 1}/{effort.rounds}")
            if trouble[contender]:
                continue
            try:
                with contender.session(ground, workload.job) as session:
                    for client, sample in _clients(session, contender, workload, effort, again=number > 0):
                        samples[contender, client].append(sample)
            except (CountError, JobError, ServerError, GroundError, OSError, subprocess.TimeoutExpired) as error:
                trouble[contender] = f"{type(error).__name__}: {error}"
                for client in contender.clients:
                    samples[contender, client].clear()
    contests = [
        Contest(contender.family, contender.setting, found, trouble[contender], client)
        for (contender, client), found in samples.items()
    ]
    missing = [
        Missing(f"{workload.name}: {_label(contender)}", reason) for contender, reason in trouble.items() if reason
    ]
    block, goals = workload.job.block, list(workload.goals)
    result = WorkloadResult(workload.name, workload.title, workload.unit, block, goals, contests, workload.table)
    return result, missing


def _clients(
    session: Session, contender: Contender, workload: Workload, effort: Effort, *, again: bool
) -> list[tuple[Client, Sample]]:
    """A sample with every client of the contender, in turn; the first also says what was counted while warming up."""
    first, *_ = contender.clients
    warm = session.warm_up(max(effort.warm_up, workload.warm_up), first, again=again)
    found = {client: session.measure(workload.seconds(effort, client, first), client) for client in contender.clients}
    if warm:
        found[first] = replace(found[first], calls=warm.calls, switches=warm.switches)
    return list(found.items())


def _label(contender: Contender) -> str:
    return f"{contender.family} ({contender.setting})" if contender.setting else contender.family
