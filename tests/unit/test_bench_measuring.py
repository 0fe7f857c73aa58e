"""The rounds of a workload: warm-up, counting and measurement of contenders, and failed contenders."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import pytest

from ground import Ground
from jobs import Client, Job, JobError
from measuring import NBD_CLIENTS, Effort, Workload, measure
from results import Sample, WorkloadResult

GROUND = cast(Ground, None)
EFFORT = Effort(rounds=3, seconds=1.0, warm_up=0.25)


@dataclass(frozen=True)
class Fake:
    """A contender that keeps a diary. fails_in: the round in which its measurement fails."""

    clients: ClassVar[tuple[Client, ...]] = NBD_CLIENTS
    family: str
    setting: str = ""
    fails_in: int = -1
    diary: list[tuple[Any, ...]] = field(default_factory=list, hash=False, compare=False)

    def missing(self) -> str:
        return ""

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator["Session"]:
        self.diary.append(("up",))
        yield Session(self)
        self.diary.append(("down",))


@dataclass
class Session:
    fake: Fake

    def warm_up(self, seconds: float, client: Client, *, again: bool) -> Sample | None:
        self.fake.diary.append(("warm", seconds, client, again))
        return sample(calls=2.0, switches=0.5)

    def measure(self, seconds: float, client: Client) -> Sample:
        self.fake.diary.append(("measure", seconds, client))
        if self.fake.diary.count(("up",)) == self.fake.fails_in + 1:
            raise JobError("no reply")
        return sample()


def sample(**changes: Any) -> Sample:
    return Sample(100.0, 100, 0.1, 0.1, 0.0, 0.0, 1.0, **changes)


def measured(*contenders: Fake, **changes: Any) -> tuple[WorkloadResult, list[str]]:
    workload = Workload("row", "a row", Job("randread", 4096), contenders, (), **changes)
    result, missing = measure(workload, GROUND, EFFORT, report=lambda _: None)
    return result, [f"{lack.what}: {lack.why}" for lack in missing]


def test_a_session_is_warmed_up_once_and_measured_with_both_clients() -> None:
    fake = Fake("a")
    measured(fake)
    first = [
        ("up",),
        ("warm", 0.25, "nbd_load", False),
        ("measure", 1.0, "nbd_load"),
        ("measure", 0.5, "fio"),
        ("down",),
    ]
    assert fake.diary[:5] == first
    assert [entry[3] for entry in fake.diary if entry[0] == "warm"] == [False, True, True]


def test_what_was_counted_while_warming_up_is_said_of_the_first_client() -> None:
    result, _ = measured(Fake("a"))
    assert [(c.client, len(c.samples), c.calls, c.switches) for c in result.contests] == [
        ("nbd_load", 3, 2.0, 0.5),
        ("fio", 3, None, None),
    ]


def test_a_workload_may_take_longer_to_warm_up_and_to_measure() -> None:
    fake = Fake("a")
    measured(fake, slower=2.0, warm_up=1.5)
    assert fake.diary[1:4] == [("warm", 1.5, "nbd_load", False), ("measure", 2.0, "nbd_load"), ("measure", 1.0, "fio")]


@pytest.mark.parametrize("number", [0, 2])
def test_one_that_fails_in_any_round_has_no_samples_and_its_reason_is_kept(number: int) -> None:
    result, missing = measured(Fake("a", fails_in=number), Fake("b"))
    assert {(c.family, len(c.samples), c.trouble) for c in result.contests} == {
        ("a", 0, "JobError: no reply"),
        ("b", 3, ""),
    }
    assert missing == ["row: a: JobError: no reply"]
