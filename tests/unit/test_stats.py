"""blkloom.stats: buckets as in the engine, percentiles, arithmetic, reports."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkloom.stats import (
    BUCKETS,
    Histogram,
    OperationStats,
    Stats,
    bucket_bounds,
    bucket_of,
    format_nanoseconds,
    without_tails,
)

NANOSECONDS = st.integers(0, 2**64 - 1)


def histogram(values: list[int]) -> Histogram:
    counts = [0] * BUCKETS
    for value in values:
        counts[bucket_of(value)] += 1
    return Histogram(tuple(counts))


def snapshot(reads: list[int], faults: int = 0) -> Stats:
    read = OperationStats(len(reads), 4096 * len(reads), 0, histogram(reads))
    return Stats({"read": read, "write": OperationStats()}, faults)


@given(NANOSECONDS)
def test_a_value_lies_within_the_bounds_of_its_bucket(value: int) -> None:
    least, greatest = bucket_bounds(bucket_of(value))
    assert least <= value <= greatest
    assert greatest - least <= least / 8


def test_buckets_cover_all_numbers_without_gap_or_overlap() -> None:
    bounds = [bucket_bounds(index) for index in range(BUCKETS)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 2**64 - 1
    assert all(greatest + 1 == least for (_, greatest), (least, _) in itertools.pairwise(bounds))


@given(st.lists(NANOSECONDS, min_size=1), st.integers(0, 100))
def test_a_percentile_is_the_bucket_of_the_nearest_rank(values: list[int], percent: int) -> None:
    rank = max(1, -(-len(values) * percent // 100))
    exact = sorted(values)[rank - 1]
    assert histogram(values).percentile(percent) == bucket_bounds(bucket_of(exact))[1]


@given(st.lists(NANOSECONDS, min_size=1))
def test_the_mean_is_within_a_bucket_of_the_true_one(values: list[int]) -> None:
    true = sum(values) / len(values)
    assert histogram(values).mean == pytest.approx(true, rel=1 / 15, abs=1)


@given(st.lists(NANOSECONDS), st.lists(NANOSECONDS))
def test_merged_histograms_count_both_and_subtract_again(first: list[int], second: list[int]) -> None:
    both = histogram(first) + histogram(second)
    assert both == histogram(first + second)
    assert both - histogram(second) == histogram(first)


def test_histograms_of_different_length_merge() -> None:
    assert Histogram((1,)) + Histogram((1, 2, 3)) == Histogram((2, 2, 3))


def test_an_empty_histogram_reports_zeros() -> None:
    assert (Histogram().percentile(99), Histogram().mean, Histogram().largest, Histogram().total) == (0, 0, 0, 0)


@pytest.mark.parametrize("percent", [-1, 100.1])
def test_a_percentile_outside_of_0_to_100_is_refused(percent: float) -> None:
    with pytest.raises(ValueError, match="not from 0 to 100"):
        Histogram((1,)).percentile(percent)


def test_the_engine_s_dict_becomes_typed() -> None:
    zero = {"count": 0, "bytes": 0, "errors": 0, "latency": [0] * BUCKETS}
    latency = [0] * BUCKETS
    latency[bucket_of(1000)] = 2
    stats = Stats.from_engine(
        {
            "read": {"count": 2, "bytes": 8192, "errors": 1, "latency": latency},
            "write": zero,
            "faults": 3,
            "in_flight": 4,
        }
    )
    assert list(stats) == ["read", "write"]
    assert (stats["read"].count, stats["read"].bytes, stats["read"].errors) == (2, 8192, 1)
    assert stats["read"].latency.percentile(50) == bucket_bounds(bucket_of(1000))[1]
    assert (stats.faults, stats.in_flight) == (3, 4)
    assert stats["flush"] == OperationStats()


@given(st.lists(NANOSECONDS))
def test_histograms_travel_without_the_zeros_at_their_ends_and_mean_the_same(values: list[int]) -> None:
    counts = list(histogram(values).counts)
    counters = {
        "read": {"count": len(values), "bytes": 0, "errors": 0, "latency": counts},
        "faults": 1,
        "in_flight": 2,
    }
    travelling = without_tails(counters)
    latency = travelling["read"]["latency"]
    assert len(latency) == (bucket_of(max(values)) + 1 if values else 0)
    arrived, whole = Stats.from_engine(travelling), Stats.from_engine(counters)
    assert arrived["read"].latency - whole["read"].latency == whole["read"].latency - whole["read"].latency
    assert arrived["read"].latency.total == whole["read"].latency.total
    assert (arrived.faults, arrived.in_flight) == (1, 2)


def test_two_snapshots_subtract_to_what_happened_between_them() -> None:
    assert (snapshot([10, 20, 30], faults=5) - snapshot([10, 20], faults=2)) == snapshot([30], faults=3)


def test_stats_of_two_devices_merge_whatever_operations_they_have() -> None:
    other = Stats({"flush": OperationStats(1, 0, 0, Histogram((1,)))}, faults=1, in_flight=2)
    merged = snapshot([5]) + other
    assert (merged["read"].count, merged["flush"].count, merged.faults, merged.in_flight) == (1, 1, 1, 2)


def test_json_holds_percentiles_and_only_buckets_that_are_not_empty() -> None:
    found = json.loads(snapshot([1000, 1000, 9]).to_json())
    read = found["operations"]["read"]["latency_ns"]
    assert read["buckets"] == [[9, 9, 1], [960, 1023, 2]]
    assert (read["p50"], read["max"]) == (1023, 1023)
    assert found["operations"]["write"]["count"] == 0


def test_the_text_table_shows_only_operations_that_happened() -> None:
    text = snapshot([1000] * 20, faults=7).to_text(seconds=2)
    head, row, tail = text.splitlines()
    assert head.split() == [
        "operation",
        "count",
        "bytes",
        "errors",
        "IOPS",
        "rate",
        "mean",
        "p50",
        "p90",
        "p99",
        "p99.9",
        "max",
    ]
    assert row.split()[:4] == ["read", "20", "80", "KiB"]
    assert "10  40 KiB/s" in row
    assert tail == "faults 7, in flight 0"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 ns"), (850, "850 ns"), (12_340, "12.3 us"), (4.56e6, "4.56 ms"), (7.89e9, "7.89 s"), (5e12, "5000 s")],
)
def test_nanoseconds_are_shown_with_three_digits(value: float, text: str) -> None:
    assert format_nanoseconds(value) == text
