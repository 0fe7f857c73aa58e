"""Results of a run: the data, its JSON form, and the values computed from it.

Plain frozen dataclasses; the file is their JSON (msgspec checks it on load). Every sample of every round is kept, so
all statistics can be computed again from the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Final, Literal

import msgspec

from jobs import Client

Verdict = Literal["met", "at the floor", "missed", "reported", "not measured"]
"""`at the floor`: short of the goal, but so near what the client and the machine can do that the goal counts as met."""
TableName = Literal[
    "mails", "nbd", "fuse", "vhost-user", "backing", "disk", "qcow2", "process", "scale", "tests", "start", ""
]
AT_THE_FLOOR: Final = 0.9
"""Share of the floor from which a figure is at it."""
BEFORE: Final = " (before)"
"""Ends the family of a contender that is an older build of blkloom."""


@dataclass(frozen=True)
class Sample:
    """Measurement of one contender in one round.

    value: in the workload's unit. operations: number of I/Os. server_cpu: CPU seconds of the server process (utime +
    stime), or of the kernel's workers; None without a server. client_cpu: of the load generator. other_cpu: used by the
    rest of the machine in the same time, the disturbance. stolen: seconds taken by the hypervisor. errors: I/O errors.
    p50_us, p99_us: latency. client_busy: share of the time that each client thread spent on a CPU. calls, switches:
    system calls and context switches of the server per I/O, counted in a run before; None without a server, or if they
    were not counted. extra: more figures by name (bytes, seconds).
    """

    value: float
    operations: int
    server_cpu: float | None
    client_cpu: float
    other_cpu: float
    stolen: float
    seconds: float
    errors: int = 0
    p50_us: float = 0.0
    p99_us: float = 0.0
    client_busy: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)
    calls: float | None = None
    switches: float | None = None

    @property
    def cpu_per_million(self) -> float | None:
        """Server CPU seconds per million I/Os."""
        if self.server_cpu is None or not self.operations:
            return None
        return self.server_cpu / self.operations * 1e6


@dataclass(frozen=True)
class Contest:
    """One contender of a workload with one client. family: its name; setting: its settings. samples: in the order of
    the rounds. trouble: the reason why there are none.
    """

    family: str
    setting: str
    samples: list[Sample]
    trouble: str = ""
    client: Client = ""

    @property
    def values(self) -> list[float]:
        return [sample.value for sample in self.samples]

    @property
    def errors(self) -> int:
        return sum(sample.errors for sample in self.samples)

    @property
    def figure(self) -> float:
        """The median over the rounds."""
        return median(self.values)

    @property
    def cpu_per_million(self) -> float | None:
        return _middle(sample.cpu_per_million for sample in self.samples)

    @property
    def client_cpu_per_million(self) -> float:
        return median(s.client_cpu / s.operations * 1e6 if s.operations else 0.0 for s in self.samples)

    @property
    def client_busy(self) -> float:
        return median(sample.client_busy for sample in self.samples)

    @property
    def calls(self) -> float | None:
        """System calls of the server an I/O."""
        return _middle(sample.calls for sample in self.samples)

    @property
    def switches(self) -> float | None:
        """Context switches of the server an I/O."""
        return _middle(sample.switches for sample in self.samples)

    def extra(self, name: str) -> float | None:
        return _middle(sample.extra.get(name) for sample in self.samples)


def _middle(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


@dataclass(frozen=True)
class Goal:
    """A goal: subject compared with peer, both names of families. at_least: the required ratio; at_most: a limit of the
    subject's own figure; neither: reported only. floor: the family that does only the unavoidable work; "" if there is
    none. client: the client that decides the goal, for each side that was measured with it. headline: label in the
    picture; "" for none.
    """

    subject: str
    peer: str
    at_least: float | None = None
    at_most: float | None = None
    floor: str = ""
    client: Client = "nbd_load"
    headline: str = ""


@dataclass(frozen=True)
class WorkloadResult:
    """Results of a workload. unit: of every value: "IOPS" (more is better) or "s" (less is better). table: of the
    report. again: time of the measurement, if that was after the run.
    """

    name: str
    title: str
    unit: Literal["IOPS", "s"]
    block: int
    goals: list[Goal]
    contests: list[Contest]
    table: TableName = ""
    again: str = ""


@dataclass(frozen=True)
class Missing:
    """Something that was not measured, with the reason."""

    what: str
    why: str


@dataclass(frozen=True)
class Run:
    """A whole run. complete: it has every row with full rounds and may be published."""

    when: str
    complete: bool
    rounds: int
    seconds: float
    machine: dict[str, str]
    versions: dict[str, str]
    missing: list[Missing]
    workloads: list[WorkloadResult]

    def with_rows_of(self, later: Run) -> Run:
        """The rows that `later` has, as they are there, and the others: each has all of its contenders from one run."""
        measured = {row.name: replace(row, again=later.when) for row in later.workloads}
        missing = [lack for lack in self.missing if lack.what.partition(":")[0] not in measured]
        rows = [measured.pop(row.name, row) for row in self.workloads] + list(measured.values())
        return replace(self, workloads=rows, missing=[*missing, *later.missing])


@dataclass(frozen=True)
class Comparison:
    """A goal compared with the figures. peer: its best setting. ratio: of the medians; round_ratio: the median of the
    ratios of each round, with their range in round_low and round_high. floor_share: the subject's figure as a share of
    the floor's. other_ratio: the ratio with fio, if both were measured with fio, too.
    """

    workload: WorkloadResult
    goal: Goal
    subject: Contest | None
    peer: Contest | None
    ratio: float | None
    round_ratio: float | None
    round_low: float | None
    round_high: float | None
    floor_share: float | None
    other_ratio: float | None
    verdict: Verdict

    @property
    def is_met(self) -> bool:
        return self.verdict in ("met", "at the floor")

    @property
    def way(self) -> str:
        """Which blkloom: the subject without its first name."""
        return self.goal.subject.removeprefix("blkloom ")

    @property
    def wanted(self) -> str:
        """The goal in words."""
        if self.goal.at_most is not None:
            return f"at most {self.goal.at_most:g} s"
        return f"{self.goal.at_least:g}x" if self.goal.at_least is not None else "reported"

    @property
    def reached(self) -> str:
        """What the goal is held against, in words."""
        if self.goal.at_most is not None:
            return f"{self.subject.figure:.3f} s" if self.subject else "-"
        return f"{self.ratio:.2f}x" if self.ratio is not None else "-"

    def __str__(self) -> str:
        return f"{self.workload.title}: {self.way} / {self.goal.peer.removeprefix('blkloom ')}"


def compare(workload: WorkloadResult) -> list[Comparison]:
    """The comparisons, one for each goal, in order."""
    return [_compare(workload, goal) for goal in workload.goals]


def best(workload: WorkloadResult, family: str, client: Client = "nbd_load") -> Contest | None:
    """The setting of `family` with the best median: of those measured with `client`, or of all if there are none; None
    if nothing was measured.
    """
    measured = [contest for contest in workload.contests if contest.family == family and contest.samples]
    measured = [contest for contest in measured if contest.client == client] or measured
    if not measured:
        return None
    return (max if workload.unit == "IOPS" else min)(measured, key=lambda contest: contest.figure)


def _compare(workload: WorkloadResult, goal: Goal) -> Comparison:
    subject, peer, floor = (best(workload, family, goal.client) for family in (goal.subject, goal.peer, goal.floor))
    ratio = share = round_ratio = low = high = None
    if subject and peer:
        ratio = subject.figure / peer.figure
        ratios = [a / b for a, b in zip(subject.values, peer.values, strict=False)]
        round_ratio, low, high = median(ratios), min(ratios), max(ratios)
    if subject and floor:
        share = subject.figure / floor.figure
    other = _other_ratio(workload, goal) if subject and subject.client == "nbd_load" else None
    verdict = _verdict(goal, subject, ratio, share)
    return Comparison(workload, goal, subject, peer, ratio, round_ratio, low, high, share, other, verdict)


def _other_ratio(workload: WorkloadResult, goal: Goal) -> float | None:
    subject, peer = (best(workload, family, "fio") for family in (goal.subject, goal.peer))
    if subject and peer and subject.client == peer.client == "fio":
        return subject.figure / peer.figure
    return None


def _verdict(goal: Goal, subject: Contest | None, ratio: float | None, share: float | None) -> Verdict:
    if subject is None:
        return "not measured"
    if subject.errors:
        return "missed"  # a fast wrong answer meets no goal
    if goal.at_most is not None:
        return "met" if subject.figure <= goal.at_most else "missed"
    if ratio is None:
        return "not measured"
    if goal.at_least is None:
        return "reported"
    if ratio >= goal.at_least:
        return "met"
    return "at the floor" if share is not None and share >= AT_THE_FLOOR else "missed"


def save(run: Run, path: Path) -> None:
    """Write the run as indented JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")


def load(path: Path) -> Run:
    """Read a run. Raises OSError, or msgspec.DecodeError that names the wrong field."""
    return msgspec.json.decode(path.read_bytes(), type=Run)
