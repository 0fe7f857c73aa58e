"""Listening sockets of exports: bound here, kept in the store, handed to workers.

A worker that dies leaves its clients' connection attempts waiting in the socket, for the next one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Final

from blkloom.control import messages as m
from blkloom.control.rundir import RunDir
from blkloom.control.states import ExportState, Label
from blkloom.errors import UsageError
from blkloom.export.nbd.listening import check_path, listen_tcp, listen_unix
from blkloom.supervisor.registry import Entry
from blkloom.supervisor.store import Store

AUTOMATIC: Final = "auto"


def label(entry: Entry, export: ExportState) -> Label:
    """Of the export's listening socket."""
    return Label(device=entry.minor, load=0, role="listen", key=export.id)


def automatic(run_dir: RunDir, name: str) -> ExportState:
    """The export every device has."""
    return ExportState(id=AUTOMATIC, name=name, unix=str(run_dir.device(name)), automatic=True)


def wanted(run_dir: RunDir, entry: Entry, call: m.AddExport) -> ExportState:
    """What a call asks for. Raises UsageError."""
    if call.unix and call.host:
        raise UsageError("an export listens on a Unix socket or on TCP, not on both", cure="make two exports")
    if call.unix and not os.path.isabs(call.unix):
        raise UsageError(f"{call.unix}: the path of a socket must be absolute", cure="begin it with /")
    taken = {export.id for export in entry.exports}
    if not call.unix and not call.host and not call.port:
        if AUTOMATIC in taken:
            raise UsageError(
                f"device {entry.name!r} is exported at {run_dir.device(entry.name)} already",
                cure="give a socket path, or a host and a port",
            )
        export = automatic(run_dir, entry.name)
        export.read_only = call.read_only
        return export
    number = next(number for number in range(1, len(taken) + 2) if f"e{number}" not in taken)
    return ExportState(
        id=f"e{number}",
        name=call.name or entry.name,
        unix=call.unix,
        host=call.host or ("" if call.unix else "localhost"),
        port=call.port,
        read_only=call.read_only,
    )


async def listen(store: Store, entry: Entry, export: ExportState, *, allow_remote: bool) -> int:
    """Binds and keeps the export's socket; the descriptor stays the store's. `export` learns its port.
    allow_remote: as for `listen_tcp`. Raises ListenError, UsageError.
    """
    if export.unix:
        listening = listen_unix(export.unix).socket
    else:
        first, *others = await listen_tcp(export.host, export.port, allow_remote=allow_remote)
        for other in others:
            other.close()
        listening = first.socket
        export.host, export.port = listening.getsockname()[:2]
    descriptor = listening.detach()
    store.put(label(entry, export), descriptor)
    return descriptor


async def listen_again(store: Store, entries: Iterable[Entry]) -> None:
    """`listen`, for those of the entries' exports that do not."""
    for entry in entries:
        for export in entry.exports:
            if store.find(label(entry, export)) is None:
                await listen(store, entry, export, allow_remote=True)  # as was allowed when it was added


def stop_listening(store: Store, entry: Entry, export: ExportState) -> None:
    """Gives the socket and its file up."""
    if store.find(label(entry, export)) is not None and export.unix:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(export.unix)
    store.drop([label(entry, export)])


def move(store: Store, entry: Entry, export: ExportState, path: str) -> None:
    """The socket's file to another name: whoever is connected stays. Raises ListenError, OSError."""
    check_path(path)
    if store.find(label(entry, export)) is not None:
        with contextlib.suppress(FileNotFoundError):  # somebody removed it: as before, nobody finds it
            os.rename(export.unix, path)
    export.unix = path
