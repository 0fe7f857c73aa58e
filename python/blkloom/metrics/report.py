"""Reports of device counters, as text and as JSON. Pure.

Without `before`, the numbers count from the start of each worker. With `before`, they are the changes since then, with
rates. For a device that did not exist then, they count from its start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from blkloom.metrics.addresses import uri_of
from blkloom.metrics.rates import began_anew, happened
from blkloom.metrics.sampling import DeviceSample, Sample
from blkloom.stats import Histogram, OperationStats, Stats, bucket_bounds, format_nanoseconds
from blkloom.units import format_size

BAR: Final = 40
"""Characters of the longest bar of a histogram."""
_PARTS: Final = " ▏▎▍▌▋▊▉"


def as_dict(now: Sample, before: Sample | None = None) -> dict[str, Any]:
    """For JSON: {"version", "run_dir", "seconds" (with `before`), "devices": {name: {"state", ...,
    "device": `Stats.to_dict` or null, "memory": `MemoryUse.to_dict` or null,
    "exports": {id: {"name", "uri", **`Stats.to_dict`}}}}}.
    """
    head: dict[str, Any] = {"version": now.version, "run_dir": now.run_dir}
    if before:
        head["seconds"] = now.seconds - before.seconds
    return {**head, "devices": {device.info.name: _device_dict(device) for device in _changes(now, before)}}


def as_text(
    now: Sample,
    before: Sample | None = None,
    *,
    exports: bool = False,
    histogram: bool = False,
    show: Callable[[str], str] = str,
) -> str:
    """One block of text for each device, separated by empty lines. exports: also a table for each export. histogram:
    also bars of the latencies. show: formats the name of a device.
    """
    seconds = now.seconds - before.seconds if before else None
    return "\n\n".join("\n".join(_block(device, seconds, exports, histogram, show)) for device in _changes(now, before))


def histogram_bars(latency: Histogram) -> list[str]:
    """A line for every power of two nanoseconds from the least to the greatest value: limit, share, bar."""
    octaves: dict[int, int] = {}
    for index, count in enumerate(latency.counts):
        if count:
            # Below 16 ns a bucket is one number; no request is that fast, and they share a line.
            octave = max(0, index - 8) // 8
            octaves[octave] = octaves.get(octave, 0) + count
    if not octaves:
        return []
    most = max(octaves.values())
    return [
        f"{'< ' + format_nanoseconds(_limit(octave)):>10}  {count / latency.total:7.2%}  {_bar(count / most)}".rstrip()
        for octave, count in ((o, octaves.get(o, 0)) for o in range(min(octaves), max(octaves) + 1))
    ]


def _limit(octave: int) -> int:
    return bucket_bounds(15 + 8 * octave)[1] + 1


def _bar(share: float) -> str:
    eighths = max(1, round(share * BAR * 8)) if share else 0
    return "█" * (eighths // 8) + _PARTS[eighths % 8].strip()


def _changes(now: Sample, before: Sample | None) -> Iterator[DeviceSample]:
    for minor, device in sorted(now.devices.items()):
        earlier = before.devices.get(minor) if before else None
        if earlier is None or device.stats is None or earlier.stats is None:
            yield device
            continue
        anew = began_anew(earlier, device)
        exports = {
            id: stats if anew or id not in earlier.exports else stats - earlier.exports[id]
            for id, stats in device.exports.items()
        }
        yield DeviceSample(device.info, happened(earlier, device), exports, device.memory)


def _device_dict(device: DeviceSample) -> dict[str, Any]:
    info = device.info
    return {
        "minor": info.minor,
        "uuid": info.uuid,
        "state": info.state,
        "reason": info.reason,
        "size": info.size,
        "targets": info.types,
        "clients": info.connections,
        "restarts": info.restarts,
        "device": device.stats.to_dict() if device.stats else None,
        "memory": device.memory.to_dict() if device.memory else None,
        "exports": {
            export.id: {"name": export.name, "uri": uri_of(export), **device.exports[export.id].to_dict()}
            for export in info.exports
            if export.id in device.exports
        },
    }


def _block(
    device: DeviceSample, seconds: float | None, exports: bool, histogram: bool, show: Callable[[str], str]
) -> Iterator[str]:
    info = device.info
    clients = f"{info.connections} client{'' if info.connections == 1 else 's'}"
    yield f"{show(info.name)}: {info.state}, {format_size(info.size)}, {clients}"
    if info.reason:
        yield f"  {info.reason}"
    if device.stats is not None:
        yield from _indented(device.stats, seconds, "  ")
        if histogram:
            for name in device.stats:
                yield from _spread(name, device.stats[name])
    if device.memory:
        yield f"  {device.memory.to_text()}"
    for export in info.exports if exports else ():
        if (stats := device.exports.get(export.id)) is not None:
            yield f"  export {export.id}: {uri_of(export)}"
            yield from _indented(stats, seconds, "    ")


def _indented(stats: Stats, seconds: float | None, indent: str) -> Iterator[str]:
    if any(stats[name].count for name in stats):
        yield from (indent + line for line in stats.to_text(seconds=seconds).splitlines())
    else:
        yield f"{indent}no requests; faults {stats.faults}, in flight {stats.in_flight}"


def _spread(name: str, operation: OperationStats) -> Iterator[str]:
    if bars := histogram_bars(operation.latency):
        yield f"  latency of {name}"
        yield from (f"  {line}" for line in bars)
