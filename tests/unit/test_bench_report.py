"""The performance page: from samples to verdicts, the page, its appendix and its picture."""

from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from appendix import appendix
from jobs import Client
from plot import LONGEST_LABEL, MOST_BARS, svg
from reporting import page
from results import Contest, Goal, Missing, Run, Sample, WorkloadResult, compare, load, save

FLOOR = "null server"


def contest(family: str, value: float, client: Client = "nbd_load", **extra: Any) -> Contest:
    sample = Sample(value, 1000, 0.002, 0.001, 0.0, 0.0, 1.0, calls=0.5, switches=0.25, **extra)
    return Contest(family, "", [sample, sample], client=client)


def workload(*contests: Contest, goals: list[Goal], **changes: Any) -> WorkloadResult:
    return replace(WorkloadResult("row", "4K, qd 16", "IOPS", 4096, goals, list(contests), "nbd"), **changes)


def run(*workloads: WorkloadResult) -> Run:
    machine = {"kernel": "6.12", "cpu": "a CPU", "cpus": "2", "virtual": "no", "memory": "8 GiB"}
    return Run("2026-01-01", True, 5, 1.0, machine, {"blkloom": "blkloom, version 1"}, [], list(workloads))


LOOP_AND_PEER = Goal("blkloom loop", "nbdkit file", 1.5, floor=FLOOR)


@pytest.mark.parametrize(
    ("subject", "peer", "floor", "verdict"),
    [
        (150.0, 100.0, 1000.0, "met"),
        (140.0, 100.0, 155.0, "at the floor"),
        (140.0, 100.0, 160.0, "missed"),
        (90.0, 100.0, 90.0, "at the floor"),
    ],
)
def test_a_missed_goal_counts_as_met_within_a_tenth_of_the_floor(
    subject: float, peer: float, floor: float, verdict: str
) -> None:
    found = workload(
        contest("blkloom loop", subject), contest("nbdkit file", peer), contest(FLOOR, floor), goals=[LOOP_AND_PEER]
    )
    (comparison,) = compare(found)
    assert comparison.verdict == verdict
    assert comparison.is_met == (verdict != "missed")
    assert comparison.floor_share == subject / floor


def test_errors_meet_no_goal_at_the_floor_either() -> None:
    found = workload(
        contest("blkloom loop", 200.0, errors=1),
        contest("nbdkit file", 100.0),
        contest(FLOOR, 200.0),
        goals=[LOOP_AND_PEER],
    )
    assert [c.verdict for c in compare(found)] == ["missed"]


def test_goals_are_judged_with_the_client_that_sends_together_and_fio_stands_beside() -> None:
    found = workload(
        contest("blkloom loop", 300.0),
        contest("blkloom loop", 110.0, "fio"),
        contest("nbdkit file", 150.0),
        contest("nbdkit file", 100.0, "fio"),
        goals=[LOOP_AND_PEER],
    )
    (comparison,) = compare(found)
    assert (comparison.ratio, comparison.other_ratio) == (2.0, 1.1)


def test_a_peer_that_only_fio_can_drive_is_compared_with_fio_where_the_goal_says_so() -> None:
    contests = [contest("blkloom ram", 300.0), contest("blkloom ram", 90.0, "fio"), contest("/dev/loop", 100.0, "fio")]
    goals = [Goal("blkloom ram", "/dev/loop", client="fio"), Goal("blkloom ram", "/dev/loop")]
    assert [c.ratio for c in compare(workload(*contests, goals=goals))] == [0.9, 3.0]


def test_a_row_shows_both_clients_the_floor_and_what_an_io_costs_the_server() -> None:
    found = workload(
        contest("blkloom loop", 180_000.0),
        contest("blkloom loop", 110_000.0, "fio"),
        contest("nbdkit file", 100_000.0),
        contest("nbdkit file", 100_000.0, "fio"),
        contest(FLOOR, 200_000.0),
        goals=[LOOP_AND_PEER, Goal("blkloom loop", FLOOR, 0.8, floor=FLOOR)],
    )
    text = page(run(found), plot="p.svg", appendix="a.md")
    (row,) = [line for line in text.splitlines() if line.startswith("| 4K, qd 16")]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        *("4K, qd 16", "loop", "180k", "90% (goal 80%)", "nbdkit file **1.80x** (1.5x)", "110k (1.10x)"),
        *("2.00", "0.50", "0.25", "met"),
    ]
    assert "**2 of 2 goals met**" in text


def test_an_older_build_has_a_column_of_its_own() -> None:
    found = workload(
        contest("blkloom loop", 120.0),
        contest("blkloom loop (before)", 100.0),
        goals=[Goal("blkloom loop", "blkloom loop (before)")],
    )
    text = page(run(found), plot="p.svg", appendix="a.md")
    (row,) = [line for line in text.splitlines() if line.startswith("| 4K, qd 16")]
    assert row.split("|")[-3].strip() == "1.20x"


def test_start_up_times_have_a_table() -> None:
    found = workload(
        contest("blkloom serve", 0.11, ""), goals=[Goal("blkloom serve", "", at_most=0.12)], unit="s", table="start"
    )
    text = page(run(found), plot="p.svg", appendix="a.md")
    assert "## Start-up" in text
    assert "| 110 ms (goal 120 ms) |" in text


def test_what_could_not_be_counted_is_named() -> None:
    found = replace(run(), missing=[Missing("system calls and context switches", "perf is not installed")])
    assert "Missing: system calls and context switches: perf is not installed" in appendix(found, page="p.md")


def test_results_are_read_back_as_they_were_written(tmp_path: Any) -> None:
    found = run(workload(contest("blkloom loop", 1.0), goals=[LOOP_AND_PEER]))
    save(found, tmp_path / "r.json")
    assert load(tmp_path / "r.json") == found


def test_the_picture_has_few_bars_and_nothing_leaves_it() -> None:
    goal = replace(LOOP_AND_PEER, headline="W" * LONGEST_LABEL)
    rows = [workload(contest("blkloom loop", 500.0), contest("nbdkit file", 100.0), goals=[goal])] * (MOST_BARS + 3)
    picture = ElementTree.fromstring(svg(run(*rows)))
    texts = [element for element in picture if element.tag.endswith("text")]
    labels = [element for element in texts if element.text == goal.headline]
    assert len(labels) == MOST_BARS
    width, height = float(picture.get("width", 0)), float(picture.get("height", 0))
    for element in texts:
        # No usual font has a mean width of more than this for such words.
        length = 0.65 * float(element.get("font-size", 13)) * len(element.text or "")
        start = float(element.get("x", 0)) - (length / 2 if element.get("text-anchor") == "middle" else 0)
        assert start >= 0
        assert start + length <= width, element.text
        assert float(element.get("y", 0)) < height


def test_rows_measured_again_replace_those_of_the_run_and_the_page_names_them() -> None:
    first = workload(contest("blkloom loop", 100.0), contest("nbdkit file", 100.0), goals=[LOOP_AND_PEER], name="a")
    other = workload(contest("blkloom loop", 300.0), contest("nbdkit file", 100.0), goals=[LOOP_AND_PEER], name="b")
    begun = replace(run(first, other), missing=[Missing("a: nbdkit file", "not there"), Missing("perf", "not there")])
    new = replace(other, name="c", title="New")
    later = replace(run(replace(first, title="Again", contests=other.contests), new), when="2026-02-02")
    merged = begun.with_rows_of(later)
    assert [(row.name, row.again, row.contests[0].figure) for row in merged.workloads] == [
        ("a", "2026-02-02", 300.0),
        ("b", "", 300.0),
        ("c", "2026-02-02", 300.0),
    ]
    assert [lack.what for lack in merged.missing] == ["perf"]
    assert "all of its contenders: *Again* (2026-02-02); *New* (2026-02-02)." in page(
        merged, plot="x.svg", appendix="x.md"
    )
    assert "all of its contenders" not in page(begun, plot="x.svg", appendix="x.md")
