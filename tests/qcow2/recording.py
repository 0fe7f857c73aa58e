"""Disk that records all changes, and generates the states that a crash could leave.

A `Recorder` has the bytes of some files and a log of all changes; `Watch` fills it from a live device. `after_crash`
gives a possible state after a power failure at a point of the log: everything up to the last sync of the file, and any
subset of later sectors, because writes without a sync between them have no order. Storage that tears inside a sector of
512 bytes is not modelled; the format does not support it. `killed` gives the state after the process was killed, with
the redo log in its memory: everything before the point, and a part of what happened then.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import pytest

from blkloom.image.redo_log import RedoLog
from blkloom.image.storage import FileStorage
from blkloom.targets.image import LoadedImage

SECTOR = 512
REDO_LOG = "redo log"
"""Name of the memory of the redo log among the files."""

_COUNT = struct.Struct("=Q")

Kind = Literal["write", "zero", "punch", "truncate", "sync", "replace"]


@dataclass(frozen=True)
class Event:
    """offset: bytes; truncate's new length. data: a write's. length: bytes zeroed or punched. A file that is replaced
    holds data and nothing else, durably. is_atomic: a killed process has done it completely or not at all.
    """

    file: str
    kind: Kind
    offset: int = 0
    data: bytes = b""
    length: int = 0
    is_atomic: bool = False


@dataclass
class Recorder:
    """files: their bytes now. log: what was done since `begin`. initial: the bytes at `begin`."""

    files: dict[str, bytearray]
    log: list[Event] = field(default_factory=list[Event])
    initial: dict[str, bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """What is there now is durable; forget how it came."""
        self.log.clear()
        self.initial = {name: bytes(content) for name, content in self.files.items()}

    def do(self, event: Event) -> None:
        """Carry out and remember."""
        self.log.append(event)
        apply(self.files[event.file], event)

    def after_crash(self, point: int, dice: random.Random | None) -> dict[str, bytes]:
        """The files after a crash between events `point` - 1 and `point`. dice: chooses what of the
        unsynced is lost; None loses nothing, as when only the process is killed.
        """
        found = {}
        for name, initial in self.initial.items():
            content = bytearray(initial)
            events = [(at, event) for at, event in enumerate(self.log[:point]) if event.file == name]
            synced = max((at for at, event in events if event.kind in ("sync", "replace")), default=-1)
            share = dice.choice([0.0, 0.1, 0.5, 0.9, 1.0]) if dice else 1.0
            for at, event in events:
                if at <= synced or dice is None:
                    apply(content, event)
                else:
                    _apply_torn(content, event, dice, share)
            found[name] = bytes(content)
        return found

    def killed(self, point: int, dice: random.Random) -> Recorder:
        """The record of a process that was killed before event `point` was complete: the kernel may have stopped it
        between two pages, and the processor between any two bytes of the redo log.
        """
        found = Recorder({name: bytearray(content) for name, content in self.initial.items()})
        for event in self.log[:point]:
            found.do(event)
        if point < len(self.log) and (begun := _begun(self.log[point], dice)):
            found.do(begun)
        return found


def _begun(event: Event, dice: random.Random) -> Event | None:
    """A part of the event, from its beginning on."""
    length = len(event.data) or event.length
    page = 1 if event.file == REDO_LOG else mmap.PAGESIZE
    ends = range(page - event.offset % page, length, page)
    if event.kind not in ("write", "zero", "punch") or event.is_atomic or not ends:
        return None
    end = dice.choice(ends)
    return replace(event, data=event.data[:end], length=end if event.length else 0)


def apply(content: bytearray, event: Event) -> None:
    """What the event does to the bytes of its file. A punch never makes a file longer."""
    if event.kind == "write":
        _put(content, event.offset, event.data)
    elif event.kind == "zero":
        _put(content, event.offset, bytes(event.length))
    elif event.kind == "punch":
        end = min(event.offset + event.length, len(content))
        if event.offset < end:
            content[event.offset : end] = bytes(end - event.offset)
    elif event.kind == "truncate":
        if event.offset < len(content):
            del content[event.offset :]
        else:
            content.extend(bytes(event.offset - len(content)))
    elif event.kind == "replace":
        content[:] = event.data


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _apply_torn(content: bytearray, event: Event, dice: random.Random, share: float) -> None:
    """share: how likely a sector of it reached the disk."""
    if event.kind == "truncate":
        if dice.random() < share:
            apply(content, event)
        return
    if event.kind == "sync":
        return
    data = event.data if event.kind == "write" else bytes(event.length)
    at = 0
    while at < len(data):
        count = min(SECTOR - (event.offset + at) % SECTOR, len(data) - at)
        if dice.random() < share:
            piece = Event(event.file, event.kind, event.offset + at, data[at : at + count], count)
            apply(content, piece)
        at += count


class Watch:
    """Records what a device does to its files. Metadata goes through FileStorage, whose methods are wrapped
    while this is entered; what the engine writes by itself is found by looking at the files before each of
    those calls and after each request. That is exact as long as one request is made at a time, whatever the
    device does by itself meanwhile: such a call and its record are atomic for a reader of the record. The engine
    syncs before it asks the target to flush; its other syncs are the caller's to tell (`engine_syncs`). redo_log: the
    contents of the memory of the redo log.
    """

    def __init__(self, paths: dict[str, Path], redo_log: bytes = b"") -> None:
        self._paths = paths
        self._names = {os.path.realpath(path): name for name, path in paths.items()}
        self._turn = threading.RLock()
        files = {name: bytearray(path.read_bytes()) for name, path in paths.items()}
        self.recorder = Recorder(files | {REDO_LOG: bytearray(redo_log)})

    def __enter__(self) -> Self:
        self._patch = pytest.MonkeyPatch()
        for kind in ("write", "zero", "punch", "truncate", "sync"):
            self._patch.setattr(FileStorage, kind, self._wrapped(kind, getattr(FileStorage, kind)))
        for name in ("_store", "_set_committed"):
            self._patch.setattr(RedoLog, name, self._logged(getattr(RedoLog, name)))
        flush = LoadedImage.flush

        def flushed(target: LoadedImage) -> None:
            self.engine_syncs()
            flush(target)

        self._patch.setattr(LoadedImage, "flush", flushed)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def look(self) -> None:
        """Whatever the files hold and the recorder does not, the engine wrote."""
        with self._turn:
            self._look()

    def _look(self) -> None:
        for name, path in self._paths.items():
            found, known = path.read_bytes(), self.recorder.files[name]
            if found == known:
                continue
            while (again := path.read_bytes()) != found:  # it is at it: the rest of a request that faulted here
                found = again
            assert len(found) >= len(known), "the engine never makes a file shorter"
            for at in range(0, len(found), SECTOR):
                sector = found[at : at + SECTOR]
                if sector != known[at : at + SECTOR]:
                    self.recorder.do(Event(name, "write", at, sector))
            if len(found) > len(known):
                self.recorder.do(Event(name, "truncate", len(found)))

    def engine_syncs(self) -> None:
        """The engine has synced the files, or is about to."""
        with self._turn:
            self._look()
            for name in self._paths:
                self.recorder.do(Event(name, "sync"))

    def maintained(self) -> None:
        """Another program that had the files is done with them, and its changes are durable."""
        for name, path in self._paths.items():
            if (found := path.read_bytes()) != self.recorder.files[name]:
                self.recorder.do(Event(name, "replace", data=found))

    def _wrapped(self, kind: Kind, method: Callable[..., bool | None]) -> Callable[..., bool | None]:
        def call(storage: FileStorage, *arguments: Any) -> bool | None:
            with self._turn:
                self._look()
                answer = method(storage, *arguments)
                assert answer is not False, "a file system with holes is what is replayed"
                name = self._names[os.path.realpath(storage.path)]
                self.recorder.do(_event(name, kind, *arguments))
                return answer

        return call

    def _logged(self, method: Callable[..., None]) -> Callable[..., None]:
        """Of the redo log. Records what the memory holds after it, and the engine's writes before it."""

        def call(log: RedoLog, *arguments: Any) -> None:
            with self._turn:
                self._look()
                method(log, *arguments)
                if len(arguments) == 2:
                    self.recorder.do(Event(REDO_LOG, "write", arguments[0], bytes(arguments[1])))
                else:
                    count = log._map[: _COUNT.size]
                    self.recorder.do(Event(REDO_LOG, "write", 0, count, is_atomic=True))

        return call


def _event(name: str, kind: Kind, *arguments: Any) -> Event:
    if kind == "write":
        return Event(name, kind, arguments[0], bytes(arguments[1]))
    if kind in ("zero", "punch"):
        return Event(name, kind, arguments[0], length=arguments[1])
    return Event(name, kind, *arguments)
