"""Samples in Prometheus' text format, version 0.0.4.

Every metric has HELP and TYPE once, followed by all its samples. Names of counters end in `_total`; times are in
seconds, sizes in bytes. The limits of a histogram are limits of the engine's buckets at powers of two, so its
cumulative counts are exact. The engine does not count `_sum`; it is computed from the middles of the buckets (error at
most 6 %). Operations that never happened have counters but no histogram. Pure; any thread.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from blkloom.control.states import ExportState
from blkloom.metrics.addresses import uri_of
from blkloom.metrics.sampling import Sample
from blkloom.stats import Histogram, Stats, bucket_bounds, bucket_of

LIMITS: Final = tuple(range(bucket_of(1 << 10) - 1, bucket_of(1 << 36), 8))
"""Indices of the engine's buckets at the limits of the histograms: 1 us, 2 us, 4 us ... 69 s."""

STATES: Final = ("ACTIVE", "SUSPENDED", "FAILED")

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Metric:
    name: str
    kind: str
    help: str


_OF_SUPERVISOR: Final = (
    _Metric("blkloom_supervisor_info", "gauge", "Always 1; the version and the run directory are labels."),
    _Metric("blkloom_supervisor_devices", "gauge", "Devices there are."),
    _Metric("blkloom_supervisor_workers", "gauge", "Worker processes that run."),
)
_OF_DEVICES: Final = (
    _Metric("blkloom_device_info", "gauge", "Always 1; what the device is made of is in labels."),
    _Metric("blkloom_device_state", "gauge", "1 for the state the device is in, 0 for the others."),
    _Metric("blkloom_device_size_bytes", "gauge", "Size of the device."),
    _Metric("blkloom_device_clients", "gauge", "NBD clients connected."),
    _Metric("blkloom_device_holders", "gauge", "Devices stacked on this one."),
    _Metric("blkloom_device_io_errors_total", "counter", "Requests that storage failed, since the device was made."),
    _Metric("blkloom_device_worker_restarts_total", "counter", "How often the device's worker was started again."),
)
_OF_MEMORY: Final = (
    _Metric("blkloom_device_client_memory_budget_bytes", "gauge", "What clients may make the device's worker keep."),
    _Metric("blkloom_device_client_memory_reserved_bytes", "gauge", "Of that, what is reserved for requests."),
    _Metric("blkloom_device_client_memory_waiting", "gauge", "Requests that wait for memory of the device's worker."),
)
_EXPORT_INFO: Final = _Metric("blkloom_export_info", "gauge", "Always 1; name and URI of the export are labels.")


def exposition(sample: Sample) -> str:
    """The complete text; it ends with a line feed."""
    return "".join(f"{line}\n" for line in _lines(sample))


def _lines(sample: Sample) -> Iterator[str]:
    supervisor: tuple[tuple[Labels, float], ...] = (
        ({"version": sample.version, "run_dir": sample.run_dir}, 1),
        ({}, len(sample.devices)),
        ({}, sample.workers),
    )
    for metric, (labels, value) in zip(_OF_SUPERVISOR, supervisor, strict=True):
        yield from _family(metric, [(labels, value)])
    yield from _devices(sample)
    yield from _memory(sample)
    of_devices: list[tuple[Labels, Stats]] = []
    of_exports: list[tuple[Labels, Stats]] = []
    for device in sample.devices.values():
        name = {"device": device.info.name}
        if device.stats is not None:
            of_devices.append((name, device.stats))
        of_exports += [({**name, "export": id}, stats) for id, stats in device.exports.items()]
    yield from _counters("blkloom_device", "the device", of_devices)
    exports = [(_export_labels(d.info.name, e), 1) for d in sample.devices.values() for e in d.info.exports]
    yield from _family(_EXPORT_INFO, exports)
    yield from _counters("blkloom_export", "clients of the export", of_exports)


def _devices(sample: Sample) -> Iterator[str]:
    infos = [device.info for device in sample.devices.values()]
    names = [{"device": info.name} for info in infos]
    values: tuple[list[tuple[Labels, float]], ...] = (
        [({"device": i.name, "uuid": i.uuid, "minor": str(i.minor), "targets": ",".join(i.types)}, 1) for i in infos],
        [({"device": i.name, "state": state}, int(i.state == state)) for i in infos for state in STATES],
        [(name, info.size) for name, info in zip(names, infos, strict=True)],
        [(name, info.connections) for name, info in zip(names, infos, strict=True)],
        [(name, len(info.holders)) for name, info in zip(names, infos, strict=True)],
        [(name, info.io_errors) for name, info in zip(names, infos, strict=True)],
        [(name, info.restarts) for name, info in zip(names, infos, strict=True)],
    )
    for metric, samples in zip(_OF_DEVICES, values, strict=True):
        yield from _family(metric, samples)


def _memory(sample: Sample) -> Iterator[str]:
    found = [({"device": d.info.name}, d.memory) for d in sample.devices.values() if d.memory]
    values: tuple[list[tuple[Labels, float]], ...] = (
        [(name, memory.budget) for name, memory in found],
        [(name, memory.reserved) for name, memory in found],
        [(name, memory.waiting) for name, memory in found],
    )
    for metric, samples in zip(_OF_MEMORY, values, strict=True):
        yield from _family(metric, samples)


def _counters(prefix: str, what: str, found: list[tuple[Labels, Stats]]) -> Iterator[str]:
    operations = [({**labels, "operation": name}, stats[name]) for labels, stats in found for name in stats]
    yield from _family(
        _Metric(f"{prefix}_operations_total", "counter", f"Requests of {what} that ended, with or without an error."),
        [(labels, operation.count) for labels, operation in operations],
    )
    yield from _family(
        _Metric(f"{prefix}_transferred_bytes_total", "counter", f"Bytes that requests of {what} were for."),
        [(labels, operation.bytes) for labels, operation in operations],
    )
    yield from _family(
        _Metric(f"{prefix}_errors_total", "counter", f"Requests of {what} that ended with an error."),
        [(labels, operation.errors) for labels, operation in operations],
    )
    yield from _family(
        _Metric(f"{prefix}_faults_total", "counter", f"Requests of {what} that a target had to answer."),
        [(labels, stats.faults) for labels, stats in found],
    )
    yield from _family(
        _Metric(f"{prefix}_in_flight", "gauge", f"Requests of {what} that have not ended yet, also those that wait."),
        [(labels, stats.in_flight) for labels, stats in found],
    )
    metric = _Metric(
        f"{prefix}_latency_seconds", "histogram", f"How long requests of {what} took; the sum is from bucket middles."
    )
    histograms = [(labels, operation.latency) for labels, operation in operations if operation.count]
    if histograms:
        yield from _head(metric)
        for labels, latency in histograms:
            yield from _histogram(metric.name, labels, latency)


def _histogram(name: str, labels: Labels, latency: Histogram) -> Iterator[str]:
    counts = latency.counts
    below, at = 0, 0
    for limit in LIMITS:
        below += sum(counts[at : limit + 1])
        at = limit + 1
        yield _sample(f"{name}_bucket", {**labels, "le": repr(bucket_bounds(limit)[1] / 1e9)}, below)
    # Use the count of the histogram itself: it must equal that of the last bucket, also while requests end.
    yield _sample(f"{name}_bucket", {**labels, "le": "+Inf"}, latency.total)
    yield _sample(f"{name}_sum", labels, latency.mean * latency.total / 1e9)
    yield _sample(f"{name}_count", labels, latency.total)


def _family(metric: _Metric, samples: Iterable[tuple[Labels, float]]) -> Iterator[str]:
    """Lines of one metric; none without samples."""
    lines = [_sample(metric.name, labels, value) for labels, value in samples]
    if lines:
        yield from _head(metric)
        yield from lines


def _head(metric: _Metric) -> Iterator[str]:
    yield f"# HELP {metric.name} {_escape(metric.help)}"
    yield f"# TYPE {metric.name} {metric.kind}"


def _sample(name: str, labels: Labels, value: float) -> str:
    inner = ",".join(f'{label}="{_escape(text, quote=True)}"' for label, text in labels.items())
    number = str(value) if isinstance(value, int) else "+Inf" if value == math.inf else repr(value)
    return f"{name}{{{inner}}} {number}" if inner else f"{name} {number}"


def _escape(text: str, *, quote: bool = False) -> str:
    """Escapes backslashes and line feeds, in labels also quotes. The format cannot represent bytes that are not
    UTF-8.
    """
    text = text.encode(errors="surrogateescape").decode(errors="replace")
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quote else text


def _export_labels(device: str, export: ExportState) -> Labels:
    return {"device": device, "export": export.id, "name": export.name, "uri": uri_of(export)}
