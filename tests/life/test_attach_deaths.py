"""Attach and detach whose processes are killed, at any step and in any order: the next supervisor completes or undoes
them, and nothing is left.
"""

from __future__ import annotations

import os
from itertools import count

import pytest

from long_runs import LONG

from .deaths import ATTACH, DETACH, FEWEST_STEPS, SUPERVISOR, Deaths, deaths

__all__ = ["deaths"]
pytestmark = pytest.mark.timeout(300)

OF_SUPERVISOR = ["itself", "worker itself", "worker"]
OF_TASK = ["itself", "supervisor", "worker supervisor", "itself supervisor", "worker"]


@pytest.mark.parametrize(
    ("verb", "via", "role", "choices"),
    [
        ("attach", "loop", SUPERVISOR, OF_SUPERVISOR),
        ("detach", "loop", SUPERVISOR, OF_SUPERVISOR),
        ("attach", "fuse", SUPERVISOR, OF_SUPERVISOR),
        ("detach", "fuse", SUPERVISOR, OF_SUPERVISOR),
        ("attach", "loop", ATTACH, OF_TASK),
        ("detach", "loop", DETACH, OF_TASK),
    ],
)
def test_nothing_stale_after_a_death_at_any_step(
    deaths: Deaths, verb: str, via: str, role: str, choices: list[str]
) -> None:
    """At every fourth step, other processes each time. With `make survival` and `make fuzz`: at each step, all."""
    thorough = LONG or "BLKLOOM_FUZZ_CASES" in os.environ
    for turn in range(len(choices) if thorough else 1):
        for number, step in enumerate(count(1, 1 if thorough else 4)):
            victims = choices[(number + turn) % len(choices)]
            reached = deaths.killed(verb, via, role, step, victims)
            try:
                deaths.check_nothing_stale()
            except AssertionError as error:
                error.add_note(f"after step {step} of {verb}, {reached}: killed was {victims}")
                raise
            if not reached:
                assert step > FEWEST_STEPS
                break


def test_a_detach_whose_process_is_killed_leaves_no_node_without_its_loop_device(deaths: Deaths) -> None:
    for step in count(1):
        reached = deaths.killed("detach", "loop", DETACH, step, "itself")
        deaths.check_nothing_stale()
        if not reached:
            assert step > FEWEST_STEPS
            break
