"""`blkloom stats` as text and as JSON."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from blkloom.control.states import DeviceInfo, ExportState
from blkloom.metrics.report import BAR, as_dict, as_text, histogram_bars
from blkloom.metrics.sampling import DeviceSample, Sample
from blkloom.stats import BUCKETS, Histogram, OperationStats, Stats, bucket_of


def histogram(values: list[int]) -> Histogram:
    counts = [0] * BUCKETS
    for value in values:
        counts[bucket_of(value)] += 1
    return Histogram(tuple(counts))


def stats(reads: int, took: int = 1000) -> Stats:
    read = OperationStats(reads, 4096 * reads, 0, histogram([took] * reads))
    return Stats({"read": read, "write": OperationStats()}, faults=reads, in_flight=1)


def sample(seconds: float, reads: int, *, worker: int = 1, exported: int | None = None) -> Sample:
    info = DeviceInfo(
        name="disk",
        minor=0,
        size=1 << 20,
        connections=1,
        worker=worker,
        types=["ram"],
        exports=[ExportState(id="auto", name="disk", unix="/run/d")],
    )
    failed = DeviceInfo(name="broken", minor=1, state="FAILED", reason="its worker died")
    exports = {"auto": stats(reads if exported is None else exported)}
    devices = {0: DeviceSample(info, stats(reads), exports), 1: DeviceSample(failed)}
    return Sample(seconds, devices, run_dir="/run/x", version="1.2", workers=1)


def test_json_has_totals_buckets_and_exports() -> None:
    found = json.loads(json.dumps(as_dict(sample(1, 5))))
    assert (found["version"], found["run_dir"], "seconds" in found) == ("1.2", "/run/x", False)
    disk = found["devices"]["disk"]
    assert (disk["state"], disk["size"], disk["targets"], disk["clients"]) == ("ACTIVE", 1 << 20, ["ram"], 1)
    read = disk["device"]["operations"]["read"]
    assert (read["count"], read["latency_ns"]["buckets"]) == (5, [[960, 1023, 5]])
    export = disk["exports"]["auto"]
    assert (export["uri"], export["operations"]["read"]["count"]) == ("nbd+unix:///disk?socket=/run/d", 5)
    broken = found["devices"]["broken"]
    assert (broken["reason"], broken["device"], broken["exports"]) == ("its worker died", None, {})


def test_with_an_earlier_sample_it_is_what_happened_since() -> None:
    found = as_dict(sample(13, 9), sample(10, 5))
    assert found["seconds"] == 3
    disk = found["devices"]["disk"]
    assert (disk["device"]["operations"]["read"]["count"], disk["device"]["faults"]) == (4, 4)
    assert disk["exports"]["auto"]["operations"]["read"]["count"] == 4


def test_another_worker_has_counted_from_zero() -> None:
    disk = as_dict(sample(2, 900, worker=2), sample(1, 5))["devices"]["disk"]
    assert disk["device"]["operations"]["read"]["count"] == 900
    assert disk["exports"]["auto"]["operations"]["read"]["count"] == 900


def test_text_has_a_block_a_device_with_the_reason_of_a_failed_one() -> None:
    disk, broken = as_text(sample(1, 5), show=str.upper).split("\n\n")
    assert disk.splitlines()[0] == "DISK: ACTIVE, 1 MiB, 1 client"
    assert disk.splitlines()[2].split()[:4] == ["read", "5", "20", "KiB"]
    assert broken.splitlines() == ["BROKEN: FAILED, 0 B, 0 clients", "  its worker died"]


def test_text_of_an_interval_has_rates() -> None:
    head, row = as_text(sample(12, 30), sample(10, 10)).splitlines()[1:3]
    assert head.split()[4:6] == ["IOPS", "rate"]
    assert row.split()[:7] == ["read", "20", "80", "KiB", "0", "10", "40"]


def test_text_of_an_idle_device_is_one_line() -> None:
    assert as_text(sample(1, 0)).splitlines()[1] == "  no requests; faults 0, in flight 1"


def test_exports_and_histograms_are_shown_when_asked_for() -> None:
    plain, full = as_text(sample(1, 5)), as_text(sample(1, 5, exported=3), exports=True, histogram=True)
    assert "export" not in plain
    assert "latency of" not in plain
    assert "  export auto: nbd+unix:///disk?socket=/run/d" in full
    assert f"  latency of read\n   < 1.02 us  100.00%  {'█' * BAR}" in full
    assert "latency of write" not in full


@given(st.lists(st.integers(0, 2**63), min_size=1))
def test_bars_cover_all_values_and_the_most_frequent_is_the_longest(values: list[int]) -> None:
    lines = histogram_bars(histogram(values))
    shares = [float(line.split("%")[0].split()[-1]) for line in lines]
    assert abs(sum(shares) - 100) <= 0.005 * len(lines) + 1e-9
    lengths = [line.count("█") for line in lines]
    assert max(lengths) == BAR
    assert shares[lengths.index(BAR)] == max(shares)
    assert len(lines) <= 61


def test_bars_of_nothing_are_none() -> None:
    assert histogram_bars(Histogram()) == []
