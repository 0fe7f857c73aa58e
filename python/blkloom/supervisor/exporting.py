"""Endpoints of exports: this module opens and closes them, and keeps their descriptors in the store for workers.

After a worker has died, new requests of clients wait in the endpoints until the next worker serves them. What each kind
of export does: see `export.exporter`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from blkloom.control import messages as m
from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.rundir import RunDir
from blkloom.control.states import ExportState, Label, export_key, export_label
from blkloom.errors import BlkloomError, UsageError
from blkloom.export.registry import DEFAULT, endpoints
from blkloom.supervisor.registry import Entry

_log = logging.getLogger(__name__)


def automatic(run_dir: RunDir, name: str) -> ExportState:
    """The automatic export that every device has."""
    export = endpoints(DEFAULT).automatic(run_dir, name)
    assert export is not None
    export.id = "auto"
    return export


def wanted(run_dir: RunDir, entry: Entry, call: m.AddExport) -> ExportState:
    """The state of the export that the call describes. Raises UsageError."""
    export = endpoints(call.kind).wanted(run_dir, entry.name, call)
    taken = {other.id: other for other in entry.exports}
    if export.automatic:
        export.id = "auto" if export.kind == DEFAULT else f"auto-{export.kind}"
        if (there := taken.get(export.id)) is not None:
            raise UsageError(
                f"device '{entry.name}' is exported at {there.address} already", cure="give another address"
            )
        return export
    number = next(number for number in range(1, len(taken) + 2) if f"e{number}" not in taken)
    export.id = f"e{number}"
    return export


async def open_endpoint(
    store: DescriptorStore, entry: Entry, export: ExportState, *, allow_remote: bool
) -> dict[str, int]:
    """Opens the endpoint of an export and puts its descriptors into the store. Sets the address in `export`.

    allow_remote: other hosts may reach it. Returns the descriptors by key; the store still owns them. Raises
    ListenError, UsageError.
    """
    kind = endpoints(export.kind)
    opened = await kind.open(export, allow_remote=allow_remote)
    for key, descriptor in opened.items():
        store.put(export_label(entry.minor, export.id, kind.role, key), descriptor)
    return opened


async def open_missing(store: DescriptorStore, entries: Iterable[Entry]) -> None:
    """Calls `open_endpoint` for every export of the entries that has no endpoint."""
    for entry in entries:
        for export in entry.exports:
            if not labels(store, entry, export):
                await open_endpoint(store, entry, export, allow_remote=True)  # as was allowed when it was added


async def reopen_lost(store: DescriptorStore, entries: Iterable[Entry]) -> None:
    """Reopens the endpoints that another worker cannot continue after a worker was killed. Raises ListenError,
    MountError.
    """
    entries = list(entries)
    for entry in entries:
        for export in entry.exports:
            kept = labels(store, entry, export)
            if kept and not endpoints(export.kind).survives(export):
                _log.error("%s was disconnected: no other worker can continue it", export.address)
                store.drop(kept)
                await remove(export)
    await open_missing(store, entries)


def unmovable(entries: Iterable[Entry]) -> list[tuple[Entry, ExportState]]:
    """Those exports that no other worker can go on with, even where one hands them over."""
    exports = [(entry, export) for entry in entries for export in entry.exports]
    return [(entry, export) for entry, export in exports if not endpoints(export.kind).moves(export)]


async def close_endpoint(store: DescriptorStore, entry: Entry, export: ExportState) -> None:
    """Closes the descriptors and removes the socket or file, even while clients use it. Raises OSError."""
    kept = labels(store, entry, export)
    if not (kept or may_be_busy(export)):  # of a device that has failed: another process may listen there now
        return
    try:
        await endpoints(export.kind).close(export, force=True)
    finally:
        store.drop(kept)


async def close_unused(export: ExportState, *, force: bool) -> None:
    """Removes the socket or file, but keeps the descriptors. Raises OSError: EBUSY if it is in use, unless `force`."""
    await endpoints(export.kind).close(export, force=force)


def may_be_busy(export: ExportState) -> bool:
    """Whether `close_unused` can fail because of users; it is then called before the worker releases the export."""
    return endpoints(export.kind).may_be_busy


async def is_gone(export: ExportState) -> bool:
    """Whether a user has taken away what clients find."""
    return await asyncio.to_thread(endpoints(export.kind).is_gone, export)


async def remove(export: ExportState) -> None:
    """Removes the socket or file of an export that is given up. Logs errors."""
    try:
        await endpoints(export.kind).close(export, force=True)
    except (BlkloomError, OSError) as error:
        _log.error("%s cannot be removed: %s", export.address, error)


def give_up(store: DescriptorStore, entry: Entry, export: ExportState) -> None:
    """Makes the endpoint refuse clients: the device has failed. Logs errors."""
    store.drop(labels(store, entry, export))
    try:
        endpoints(export.kind).give_up(export)
    except (BlkloomError, OSError) as error:
        _log.error("%s cannot be removed: %s", export.address, error)


def rename(run_dir: RunDir, entry: Entry, export: ExportState) -> None:
    """Renames the automatic export together with its device. Raises ListenError, OSError."""
    endpoints(export.kind).rename(export, run_dir, entry.name)


def labels(store: DescriptorStore, entry: Entry, export: ExportState) -> list[Label]:
    """Labels of the export's descriptors in the store."""
    role = endpoints(export.kind).role
    return [label for label in store.labels(entry.minor) if label.role == role and export_key(label)[0] == export.id]
