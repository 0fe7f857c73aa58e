"""The rows of the benchmark: workloads, contenders, and duration."""

from jobs import Client
from measuring import NBD_CLIENTS, Effort, Workload
from peers import Blkloom, Nbdkit, NullServer, QemuNbd
from plot import LONGEST_LABEL, MOST_BARS
from qcow2_peers import BlkloomQcow2, QemuNbdQcow2
from results import BEFORE
from rows import workloads
from run import FULL, minutes

NOW, THEN = "/now/bin/blkloom", "/then/bin/blkloom"


def families(workload: Workload) -> set[str]:
    return {contender.family for contender in workload.contenders}


def test_every_server_of_nbd_is_measured_with_both_clients() -> None:
    assert NBD_CLIENTS == ("nbd_load", "fio")
    servers = (Blkloom, BlkloomQcow2, QemuNbd, QemuNbdQcow2, Nbdkit, NullServer)
    found: set[tuple[Client, ...]] = {
        contender.clients
        for workload in workloads(NOW)
        for contender in workload.contenders
        if isinstance(contender, servers)
    }
    assert found == {NBD_CLIENTS}


def test_goals_compare_what_is_measured() -> None:
    for workload in workloads(NOW):
        for goal in workload.goals:
            assert {goal.subject, goal.peer} <= families(workload), workload.name
            assert goal.floor in {"", *families(workload)}, workload.name


def test_names_of_rows_differ() -> None:
    names = [workload.name for workload in workloads(NOW)]
    assert len(set(names)) == len(names)


def test_the_goals_of_small_requests_are_shares_of_the_null_server() -> None:
    shares = {
        (workload.name, goal.subject): goal.at_least
        for workload in workloads(NOW)
        for goal in workload.goals
        if goal.peer == "null server" and goal.at_least
    }
    assert shares == {
        (name, subject): 0.8
        for name in ("randrw-4k-c1-q16", "randrw-4k-c2-q16")
        for subject in ("blkloom loop", "blkloom ram")
    }


def test_an_older_build_takes_part_in_every_row_that_blkloom_has() -> None:
    for now, both in zip(workloads(NOW), workloads(NOW, THEN), strict=True):
        ours = {contender.family for contender in now.contenders if NOW.removesuffix("blkloom") in repr(contender)}
        subjects = {goal.subject for goal in now.goals} & ours
        assert families(both) - families(now) == {family + BEFORE for family in subjects}, now.name
        assert subjects, now.name
        for contender in both.contenders:
            assert ("/then/" in repr(contender)) == contender.family.endswith(BEFORE)
        compared = {(goal.subject, goal.peer) for goal in both.goals} - {
            (goal.subject, goal.peer) for goal in now.goals
        }
        assert compared == {(family, family + BEFORE) for family in subjects}


def test_the_picture_has_a_dozen_bars_at_most_and_their_words_fit() -> None:
    headlines = [goal.headline for workload in workloads(NOW) for goal in workload.goals if goal.headline]
    assert len(headlines) <= MOST_BARS
    assert len(set(headlines)) == len(headlines)
    assert max(map(len, headlines)) <= LONGEST_LABEL


def test_a_full_run_has_five_rounds_and_takes_less_than_50_minutes() -> None:
    assert FULL.rounds >= 5
    assert minutes(workloads(NOW), FULL) < 50


def test_a_quick_run_of_a_row_takes_moments() -> None:
    assert minutes(workloads(NOW)[:1], Effort(rounds=1, seconds=0.2, warm_up=0.1)) < 1
