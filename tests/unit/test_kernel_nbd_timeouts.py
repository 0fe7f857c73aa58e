"""Time-outs of a kernel NBD device: when a worker acts, and how long requests may take."""

from __future__ import annotations

import pytest

from blkloom.export.kernel_nbd.timeouts import Timeouts


def _looks(timeouts: Timeouts, begins: float) -> tuple[float, float]:
    """A request begins and does not end. Returns its age when the worker acts, and when it looked last before."""
    now, older = 0.0, False
    while True:
        before, now = now, now + timeouts.pause
        if older:
            if timeouts.is_due(now):
                return now - begins, before - begins
        else:
            timeouts.none_old(now)
            older = begins < now


@pytest.mark.parametrize("base", [1, 4, 30])
@pytest.mark.parametrize("phase", [0.01, 0.25, 0.5, 0.99])
def test_the_worker_acts_between_a_quarter_and_half_of_the_time_out(base: int, phase: float) -> None:
    timeouts = Timeouts(base, 0.0)
    age, _ = _looks(timeouts, (5 + phase) * timeouts.pause)
    assert base / 4 <= age <= base / 2


@pytest.mark.parametrize("base", [1, 30])
def test_a_look_that_comes_late_still_acts_before_the_time_out(base: int) -> None:
    """One look may be late by a quarter of the time-out."""
    timeouts = Timeouts(base, 0.0)
    age, _ = _looks(timeouts, 5.01 * timeouts.pause)
    assert age + base / 4 < base


def test_slow_requests_get_more_time_but_not_without_limit() -> None:
    timeouts = Timeouts(30, 0.0)
    given = []
    for now in range(5):
        timeouts.slower(now)
        given.append(timeouts.request)
    assert given == [60, 120, 240, 240, 240]
    age, _ = _looks(timeouts, 1.0)
    assert 30 / 4 <= age <= 240 / 2


def test_the_time_out_is_as_at_first_when_no_request_was_old_for_a_while() -> None:
    timeouts = Timeouts(4, 0.0)
    assert not timeouts.none_old(100.0), "it never changed"
    timeouts.slower(100.0)
    assert timeouts.request == 8
    assert not timeouts.none_old(101.0)
    assert timeouts.none_old(100.0 + 4 * 8)
    timeouts.calm()
    assert timeouts.request == 4


def test_requests_of_before_a_restart_do_not_count() -> None:
    timeouts = Timeouts(4, 0.0)
    assert timeouts.is_due(10.0)
    timeouts.restarted(10.0)
    assert not timeouts.is_due(10.5)


def test_requests_that_are_served_again_keep_their_age_until_they_have_ended() -> None:
    timeouts = Timeouts(8, 0.0)
    timeouts.restarted(10.0, oldest=8.0)
    assert timeouts.oldest == 8.0
    assert timeouts.is_due(11.0)
    assert not timeouts.none_old(11.0), "now they are the older ones"
    assert (timeouts.oldest, timeouts.is_due(11.5)) == (8.0, True)
    assert not timeouts.none_old(12.0), "now they have ended"
    assert (timeouts.oldest, timeouts.is_due(12.0)) == (11.0, False)
