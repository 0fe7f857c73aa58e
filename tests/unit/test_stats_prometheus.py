"""Samples in Prometheus' text format, parsed by Prometheus' own parser."""

from __future__ import annotations

import math
import re
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from blkloom.control.states import DeviceInfo, ExportState
from blkloom.metrics.prometheus import LIMITS, exposition
from blkloom.metrics.sampling import DeviceSample, Sample
from blkloom.stats import BUCKETS, Histogram, OperationStats, Stats, bucket_bounds, bucket_of

NANOSECONDS = st.lists(st.integers(0, 2**63), max_size=30)


def histogram(values: list[int]) -> Histogram:
    counts = [0] * BUCKETS
    for value in values:
        counts[bucket_of(value)] += 1
    return Histogram(tuple(counts))


def stats(reads: list[int]) -> Stats:
    read = OperationStats(len(reads), 4096 * len(reads), 1, histogram(reads))
    return Stats({"read": read, "flush": OperationStats()}, faults=3, in_flight=2)


def sample(name: str = "disk", reads: list[int] | None = None) -> Sample:
    info = DeviceInfo(
        name=name,
        minor=4,
        uuid="u-u",
        types=["loop", "ram"],
        size=8192,
        connections=2,
        holders=["upper"],
        restarts=1,
        exports=[ExportState(id="auto", name=name, unix="/run/a b"), ExportState(id="1", name="x", host="::1", port=7)],
    )
    counters = stats([1000] if reads is None else reads)
    failed = DeviceInfo(name="broken", minor=5, state="FAILED", reason="why")
    devices = {4: DeviceSample(info, counters, {"auto": counters, "1": counters}), 5: DeviceSample(failed)}
    return Sample(9.0, devices, run_dir="/run/x", version="1.2", workers=3)


def parsed(sample: Sample) -> dict[str, Metric]:
    families = list(text_string_to_metric_families(exposition(sample)))
    assert len({family.name for family in families}) == len(families), "a metric is there twice"
    return {family.name: family for family in families}


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    (found,) = [
        sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return float(found)


def test_every_metric_has_its_type_its_help_and_its_name_by_the_conventions() -> None:
    for family in parsed(sample()).values():
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        assert re.fullmatch(r"blkloom_[a-z_]+", family.name)
        if family.type == "counter":
            assert all(sample.name == f"{family.name}_total" for sample in family.samples)
        else:
            assert not family.name.endswith("_total")


def test_counters_and_gauges_are_those_of_the_device() -> None:
    families = parsed(sample(reads=[1, 2, 3]))
    of = {"device": "disk", "operation": "read"}
    assert value(families, "blkloom_device_operations_total", **of) == 3
    assert value(families, "blkloom_device_transferred_bytes_total", **of) == 3 * 4096
    assert value(families, "blkloom_device_errors_total", **of) == 1
    assert value(families, "blkloom_device_operations_total", device="disk", operation="flush") == 0
    assert value(families, "blkloom_device_faults_total", device="disk") == 3
    assert value(families, "blkloom_device_in_flight", device="disk") == 2
    assert value(families, "blkloom_device_size_bytes", device="disk") == 8192
    assert value(families, "blkloom_device_clients", device="disk") == 2
    assert value(families, "blkloom_device_holders", device="disk") == 1
    assert value(families, "blkloom_device_worker_restarts_total", device="disk") == 1
    assert value(families, "blkloom_device_info", uuid="u-u", minor="4", targets="loop,ram") == 1
    assert value(families, "blkloom_supervisor_info", version="1.2", run_dir="/run/x") == 1
    assert (value(families, "blkloom_supervisor_devices"), value(families, "blkloom_supervisor_workers")) == (2, 3)


def test_exports_have_counters_of_their_own_and_say_where_they_are() -> None:
    families = parsed(sample(reads=[5]))
    for export in ("auto", "1"):
        labels = {"device": "disk", "export": export, "operation": "read"}
        assert value(families, "blkloom_export_operations_total", **labels) == 1
    assert value(families, "blkloom_export_info", export="auto", uri="nbd+unix:///disk?socket=/run/a%20b") == 1
    assert value(families, "blkloom_export_info", export="1", uri="nbd://[::1]:7/x") == 1


def test_a_failed_device_has_a_state_and_no_counters() -> None:
    families = parsed(sample())
    states = {state: value(families, "blkloom_device_state", device="broken", state=state) for state in
              ("ACTIVE", "SUSPENDED", "FAILED")}  # fmt: skip
    assert states == {"ACTIVE": 0, "SUSPENDED": 0, "FAILED": 1}
    assert not [s for s in families["blkloom_device_operations"].samples if s.labels["device"] == "broken"]


@given(NANOSECONDS)
def test_buckets_count_exactly_what_is_not_above_them(reads: list[int]) -> None:
    families = parsed(sample(reads=reads))
    if not reads:
        assert "blkloom_device_latency_seconds" not in families
        return
    buckets = {
        float(s.labels["le"]): s.value
        for s in families["blkloom_device_latency_seconds"].samples
        if s.name.endswith("_bucket")
    }
    assert len(buckets) == len(LIMITS) + 1
    assert list(buckets) == sorted(buckets)
    for limit, count in buckets.items():
        at_most = math.inf if limit == math.inf else round(limit * 1e9)
        # The engine keeps buckets, not values: all of one are at most its end.
        assert count == sum(bucket_bounds(bucket_of(nanoseconds))[1] <= at_most for nanoseconds in reads)
        assert count == sum(nanoseconds <= at_most for nanoseconds in reads)
    labels = {"device": "disk", "operation": "read"}
    assert value(families, "blkloom_device_latency_seconds_count", **labels) == len(reads) == buckets[math.inf]
    total = value(families, "blkloom_device_latency_seconds_sum", **labels)
    assert total == pytest.approx(sum(reads) / 1e9, rel=1 / 15, abs=1e-9 * len(reads))


def test_limits_double_from_a_microsecond_to_a_minute() -> None:
    ends = [bucket_bounds(limit)[1] + 1 for limit in LIMITS]
    assert ends == [1 << power for power in range(10, 37)]


@given(NANOSECONDS, NANOSECONDS)
def test_counts_and_sums_never_go_back(first: list[int], then: list[int]) -> None:
    def samples(reads: list[int]) -> dict[tuple[str, ...], float]:
        families = parsed(sample(reads=reads))
        return {
            (s.name, *s.labels.values()): s.value
            for family in families.values()
            if family.type != "gauge"
            for s in family.samples
        }

    earlier, later = samples(first), samples(first + then)
    assert all(later[key] >= value * (1 - 1e-12) for key, value in earlier.items())


@given(st.text(min_size=1))
def test_any_name_comes_back_as_it_is(name: str) -> None:
    families = parsed(sample(name=name))
    names = {s.labels["device"] for s in families["blkloom_device_size_bytes"].samples}
    assert names == {name, "broken"}


def test_labels_are_escaped_as_the_format_says() -> None:
    assert r'blkloom_device_size_bytes{device="a\\b\"c\nd"} 8192' in exposition(sample(name='a\\b"c\nd')).splitlines()


def test_help_and_type_come_once_and_before_all_samples_of_their_metric() -> None:
    seen: dict[str, list[str]] = defaultdict(list)
    for line in exposition(sample()).splitlines():
        words = line.split(" ", 3)
        name = words[2] if line.startswith("#") else re.match(r"[a-z_]+", line)[0]  # type: ignore[index]
        base = re.sub(r"_(bucket|sum|count)$", "", name) if "latency" in name else name
        seen[base].append(words[1] if line.startswith("#") else "sample")
    assert all(kinds[:2] == ["HELP", "TYPE"] and set(kinds[2:]) == {"sample"} for kinds in seen.values())


def test_without_devices_only_the_supervisor_is_told_of() -> None:
    families = parsed(Sample(1.0, run_dir="/run/x", version="1"))
    assert set(families) == {"blkloom_supervisor_info", "blkloom_supervisor_devices", "blkloom_supervisor_workers"}
    assert exposition(Sample(1.0)).endswith("\n")
