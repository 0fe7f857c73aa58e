"""A sample: the states and counters of all devices at one time.

A `Sample` is made from the answers of the supervisor (`Client.info`, `stats`, `version`). These are separate answers: a
device may be created or removed between them. `stats` is None for a device without counters (FAILED, or its worker is
being replaced). Immutable, pure; any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from blkloom.control.states import DeviceInfo
from blkloom.stats import MemoryUse, Stats


@dataclass(frozen=True, slots=True)
class DeviceSample:
    """One device: its state, its counters, those of its exports by id, and the memory of its worker's clients."""

    info: DeviceInfo
    stats: Stats | None = None
    exports: Mapping[str, Stats] = field(default_factory=dict)
    memory: MemoryUse | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """All devices by minor number. seconds: time of the sample, on a monotonic clock."""

    seconds: float
    devices: Mapping[int, DeviceSample] = field(default_factory=dict)
    run_dir: str = ""
    version: str = ""
    """Version of the supervisor."""
    workers: int = 0

    @classmethod
    def of(
        cls, infos: Iterable[DeviceInfo], stats: Mapping[str, Any], version: Mapping[str, Any], seconds: float
    ) -> Self:
        """From `Client.info()`, `Client.stats()` and `Client.version()`. Raises KeyError or TypeError if
        they are something else.
        """
        return cls(
            seconds,
            {info.minor: _device(info, stats.get(info.name)) for info in infos},
            run_dir=version["run_dir"],
            version=version["version"],
            workers=version["workers"],
        )

    @property
    def failed(self) -> int:
        """Number of FAILED devices."""
        return sum(device.info.state == "FAILED" for device in self.devices.values())


def _device(info: DeviceInfo, counters: Mapping[str, Any] | None) -> DeviceSample:
    if counters is None:
        return DeviceSample(info)
    return DeviceSample(
        info,
        Stats.from_engine(counters["device"]),
        {id: Stats.from_engine(export) for id, export in counters["exports"].items()},
        MemoryUse(**counters["memory"]) if "memory" in counters else None,
    )
