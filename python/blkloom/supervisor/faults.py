"""`SetFault`: loads a table with one target over what a device has, and takes it away again.

The table of the device is in a layer below it meanwhile (`layers`). Runs on the event loop.
"""

from __future__ import annotations

from typing import Final

from blkloom.control import messages as m
from blkloom.control.endpoint import Opener
from blkloom.control.faults import DEVICE, Fault
from blkloom.errors import BlkloomError, UsageError
from blkloom.supervisor.device_verbs import DeviceVerbs
from blkloom.supervisor.devices import Devices
from blkloom.supervisor.layers import Layers, whole_table
from blkloom.supervisor.registry import Entry
from blkloom.supervisor.table_verbs import TableVerbs
from blkloom.supervisor.tables import Tables

_KIND: Final = "fault"


class Faults:
    """Makes devices faulty and well again."""

    def __init__(
        self, devices: Devices, tables: Tables, table_verbs: TableVerbs, device_verbs: DeviceVerbs, layers: Layers
    ) -> None:
        self._devices = devices
        self._tables = tables
        self._table_verbs = table_verbs
        self._device_verbs = device_verbs
        self._layers = layers

    async def set(self, call: m.SetFault, opener: Opener) -> None:
        """Replaces the fault of a device. If that fails, the device is as it was, or well. Raises TableError for wrong
        arguments, UsageError.
        """
        entry = self._devices.live(call.device)
        lower = self._layers.below(entry, _KIND)
        if call.fault is None:
            if lower is None:
                raise UsageError(f"device '{entry.name}' has no fault", cure="`blkloom fault` lists those that have")
            await self._layers.end(entry, lower, opener)
            return
        if entry.is_partition:
            cure = "give its disk a fault, with --range for a part of it"
            raise UsageError(f"device '{entry.name}' is a partition", cure=cure)
        self._tables.parsed(_line(entry, call.fault, "blkloom:device"))
        if added := lower is None:
            lower = await self._layers.add(entry, _KIND)
        try:
            table = _line(entry, call.fault, f"blkloom:{lower.name}")
            words = call.fault.words
            await self._layers.load(entry, lower, table, opener, read_only=call.fault.read_only, fault=words)
            await self._table_verbs.resume(m.Resume(device=entry.key, flush=False), opener)
            for text in call.fault.messages:
                await self._device_verbs.message(m.SendMessage(device=entry.key, sector=0, text=text))
        except (BlkloomError, OSError):
            if added:
                await self._layers.end(entry, lower, opener)
            raise


def _line(entry: Entry, fault: Fault, path: str) -> str:
    return whole_table(entry, [path if word == DEVICE else word for word in fault.line])
