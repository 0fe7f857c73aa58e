"""The rates of `blkloom top`: two samples to rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkloom.control.states import DeviceInfo
from blkloom.metrics.history import BARS, History, sparkline
from blkloom.metrics.ordering import Order, ordered
from blkloom.metrics.rates import Flow, Rates, Row, rows_between, total_of
from blkloom.metrics.sampling import DeviceSample, Sample
from blkloom.metrics.short import short_count, short_size
from blkloom.stats import Histogram, OperationStats, Stats, bucket_bounds, bucket_of


def histogram(*nanoseconds: int) -> Histogram:
    counts = [0] * (bucket_of(max(nanoseconds, default=0)) + 1)
    for value in nanoseconds:
        counts[bucket_of(value)] += 1
    return Histogram(tuple(counts))


def device(
    name: str = "disk",
    *,
    minor: int = 0,
    worker: int = 100,
    reads: int = 0,
    writes: int = 0,
    took: int = 1000,
    faults: int = 0,
    in_flight: int = 0,
) -> DeviceSample:
    """Reads of 4096 bytes, writes of 512; the first half of either took `took`, the others ten times that."""

    def operation(count: int, size: int) -> OperationStats:
        slow = count // 2
        return OperationStats(
            count, count * size, 0, histogram(*[took] * (count - slow), *[took * 10] * slow) if count else Histogram()
        )

    stats = Stats({"read": operation(reads, 4096), "write": operation(writes, 512)}, faults, in_flight)
    return DeviceSample(DeviceInfo(name=name, minor=minor, worker=worker, size=1 << 20, connections=2), stats)


def sample(seconds: float, *devices: DeviceSample) -> Sample:
    return Sample(seconds, {device.info.minor: device for device in devices})


def test_two_samples_make_rates_of_what_happened_between_them() -> None:
    (row,) = rows_between(
        sample(10, device(reads=100, writes=10, faults=3)),
        sample(12, device(reads=300, writes=14, faults=9, in_flight=5)),
    )
    assert row.rates is not None
    assert (row.rates.read.iops, row.rates.write.iops, row.rates.iops) == (100, 2, 102)
    assert (row.rates.read.bandwidth, row.rates.write.bandwidth) == (100 * 4096, 2 * 512)
    assert (row.rates.faults, row.in_flight) == (3, 5)


def test_latencies_are_of_the_requests_between_the_samples_only() -> None:
    (row,) = rows_between(
        sample(0, device(reads=1000, took=50)),
        sample(1, replace(device(), stats=device(reads=1000, took=50).stats + device(reads=4, took=90_000).stats)),  # type: ignore[operator]
    )
    assert row.rates is not None
    assert row.rates.read.percentile(50) == bucket_bounds(bucket_of(90_000))[1]
    assert row.rates.read.percentile(99) == bucket_bounds(bucket_of(900_000))[1] == row.rates.p99
    assert row.rates.write.percentile(99) is None


def test_the_first_sample_has_no_rates_but_what_is_in_flight() -> None:
    (row,) = rows_between(None, sample(5, device(reads=100, in_flight=7)))
    assert (row.rates, row.in_flight) == (None, 7)


def test_a_device_that_was_not_there_before_has_no_rates() -> None:
    rows = rows_between(sample(0, device()), sample(1, device(), device("new", minor=1, reads=500)))
    assert [row.rates is None for row in rows] == [False, True]


def test_a_device_that_is_gone_has_no_row() -> None:
    assert [row.info.minor for row in rows_between(sample(0, device(), device(minor=1)), sample(1, device()))] == [0]


def test_counters_that_went_back_count_from_zero() -> None:
    (row,) = rows_between(sample(0, device(reads=1000, faults=7)), sample(1, device(reads=20, faults=7)))
    assert row.rates is not None
    assert (row.rates.read.iops, row.rates.faults) == (20, 7)


def test_counters_of_another_worker_count_from_zero_even_if_they_are_higher() -> None:
    (row,) = rows_between(sample(0, device(worker=1, reads=10)), sample(2, device(worker=2, reads=50)))
    assert row.rates is not None
    assert row.rates.read.iops == 25


def test_a_device_without_counters_has_a_row_without_numbers() -> None:
    failed = DeviceSample(DeviceInfo(name="broken", minor=0, state="FAILED", reason="why"))
    for before in (None, sample(0, device(reads=5)), sample(0, failed)):
        (row,) = rows_between(before, sample(1, failed))
        assert (row.rates, row.in_flight, row.info.reason) == (None, None, "why")
    (row,) = rows_between(sample(0, failed), sample(1, device(reads=10**6)))
    assert row.rates is None


def test_two_samples_of_the_same_instant_have_no_rates() -> None:
    (row,) = rows_between(sample(1, device()), sample(1, device(reads=3)))
    assert row.rates is None


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.booleans())
def test_rates_are_never_negative(before: int, now: int, restarted: bool) -> None:
    old = device(reads=min(before, 50), writes=min(now, 50), faults=before)
    new = device(worker=101 if restarted else 100, reads=min(now, 50), writes=min(before, 50), faults=now)
    (row,) = rows_between(sample(0, old), sample(1, new))
    assert row.rates is not None
    assert min(row.rates.read.iops, row.rates.write.iops, row.rates.read.bandwidth, row.rates.faults) >= 0


def test_the_total_is_the_sum_of_all_rows() -> None:
    before = sample(0, device(), device("b", minor=1))
    now = sample(1, device(reads=10, took=100, in_flight=1), device("b", minor=1, reads=30, faults=2, in_flight=2))
    total = total_of([*rows_between(before, now), Row(DeviceInfo(name="broken", minor=2, size=5))])
    assert (total.clients, total.in_flight, total.size) == (4, 3, (2 << 20) + 5)
    assert total.rates is not None
    assert (total.rates.read.iops, total.rates.faults, total.rates.read.latency.total) == (40, 2, 40)


def test_a_total_without_any_rates_has_none() -> None:
    assert total_of(rows_between(None, sample(1, device()))).rates is None
    assert total_of([]).rates is None


def test_a_sample_joins_what_the_supervisor_tells_by_name() -> None:
    zero = {"count": 0, "bytes": 0, "errors": 0, "latency": []}
    counters = {"read": {**zero, "count": 4}, "write": zero, "faults": 1, "in_flight": 2}
    found = Sample.of(
        [DeviceInfo(name="a", minor=3), DeviceInfo(name="b", minor=4, state="FAILED")],
        {"a": {"device": counters, "exports": {"auto": counters}}, "came just now": {}},
        {"run_dir": "/run/x", "version": "1.2", "workers": 5},
        7.5,
    )
    assert list(found.devices) == [3, 4]
    a, b = found.devices.values()
    assert a.stats is not None
    assert (a.stats["read"].count, a.exports["auto"].faults, b.stats) == (4, 1, None)
    assert (found.run_dir, found.version, found.workers, found.failed, found.seconds) == ("/run/x", "1.2", 5, 1, 7.5)


def row(name: str, *, iops: float = 0, bandwidth: float = 0, took: int = 0, state: str = "ACTIVE") -> Row:
    info = DeviceInfo(name=name, minor=ord(name[0]), state=state)  # type: ignore[arg-type]
    flow = Flow(iops, bandwidth, histogram(took) if took else Histogram())
    return Row(info, 0, Rates(read=flow) if state == "ACTIVE" else None)


ROWS = [
    row("b", iops=5, bandwidth=10, took=30),
    row("a", iops=5, bandwidth=99, took=20),
    row("d", state="FAILED"),
    row("c", iops=7, bandwidth=0, took=900),
]


@pytest.mark.parametrize(
    ("order", "reverse", "names"),
    [
        (Order.IOPS, False, "dcab"),
        (Order.IOPS, True, "dabc"),
        (Order.BANDWIDTH, False, "dabc"),
        (Order.LATENCY, False, "dcba"),
        (Order.NAME, False, "dabc"),
        (Order.NAME, True, "dcba"),
    ],
)
def test_failed_devices_come_first_then_the_chosen_order(order: Order, reverse: bool, names: str) -> None:
    assert "".join(row.info.name for row in ordered(ROWS, order, reverse=reverse)) == names


def test_the_past_keeps_the_last_values_of_devices_that_are_still_there() -> None:
    past = History(3)
    for value in range(5):
        past.add({1: float(value), 2: None if value < 4 else 9.0})
    assert (list(past[1]), list(past[2]), list(past[3])) == ([2, 3, 4], [9], [])
    past.add({2: None})
    assert (list(past[1]), list(past[2])) == ([], [9])


def test_a_sparkline_grows_from_nothing_to_the_greatest_value() -> None:
    assert sparkline([0, 0.001, 4, 8], 6) == "  ▁▂▅█"
    assert sparkline([0, 0], 3) == " ▁▁"
    assert sparkline([], 3) == "   "
    assert sparkline(range(100), 2) == "██"


@given(st.lists(st.floats(0, 1e12), max_size=20), st.integers(1, 16))
def test_a_sparkline_is_as_wide_as_asked(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == width
    assert set(line) <= {" ", *BARS}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.04, "0"),
        (0.5, "0.5"),
        (3, "3"),
        (9.96, "10"),
        (9876, "9,876"),
        (9999.6, "10.0k"),
        (98_760, "98.8k"),
        (1_234_567, "1.23M"),
        (999_960, "1.00M"),
    ],
)
def test_counts_are_short(value: float, text: str) -> None:
    assert short_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (0.3, "0 B"), (512, "512 B"), (1536, "1.5 KiB"), (64 << 20, "64 MiB"), (1000 << 20, "0.98 GiB")],
)
def test_sizes_are_short(value: float, text: str) -> None:
    assert short_size(value) == text


@given(st.floats(0, 1e14))
def test_no_number_is_wider_than_its_column(value: float) -> None:
    assert len(short_count(value)) <= 6
    assert len(short_size(value)) <= 8
