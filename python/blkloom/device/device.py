"""A device: a name, an active and an inactive table, suspended or live.

The I/O methods are the engine's own, inherited: they cost what the engine costs, release the GIL
and may be called from any thread. What this class adds is the life of a device as device-mapper
knows it: `load` fills the inactive slot, `resume` swaps it in, `suspend` stops new requests, drains
and flushes, `close` ends it. Changes of the life are serialized; a failed load or swap leaves the
active table as it was. Closing gives up every file and lock, also of a load that failed half-way.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, cast

from blkloom import _engine
from blkloom.device.async_device import AsyncDevice
from blkloom.device.at_exit import close_at_exit, forget
from blkloom.device.compose import LoadedTable, Owner, compose
from blkloom.device.mapper import Mapper
from blkloom.device.raw_io import RawDevice
from blkloom.errors import DrainError, LostData, UsageError
from blkloom.forked import OwnProcess, ProcessLock
from blkloom.table import Table
from blkloom.target.base import Mapped
from blkloom.target.descriptors import Descriptors
from blkloom.target.holding import HeldFiles
from blkloom.target.limits import BlockLimits
from blkloom.target.opening import Opening
from blkloom.units import Sectors

_log = logging.getLogger(__name__)

_LOST: Final = (
    "what was written may be lost, and every flush fails until the file is opened anew "
    "(load the table again and resume, or remove the device and create it)"
)


class Device(_engine.Device):
    """A virtual block device built from a table. A context manager; close it when done.

    Offsets and lengths of I/O are bytes; errors are OSError with the errno a disk would give. In a fork of the process
    that made it all I/O and every change raise ForkedError, and `close` does nothing.
    """

    read_only: bool
    """Writes fail with EROFS: the active table was loaded read-only. Before the first: as the device was made."""
    engine: _engine.Engine
    """The engine whose loops serve this device's exports and asynchronous I/O."""

    def __new__(
        cls,
        table: Table | None = None,
        *,
        engine: _engine.Engine | None = None,
        name: str = "",
        fault_timeout: float = 30.0,
        **_for_init: Any,
    ) -> Self:
        """Makes the engine's half: suspended and without a map."""
        loops = engine or _engine.Engine()
        self = cast(Self, super().__new__(cls, loops, None, name=name, fault_timeout=fault_timeout))
        self.engine = loops
        return self

    def __init__(
        self,
        table: Table | None = None,
        *,
        engine: _engine.Engine | None = None,
        name: str = "",
        fault_timeout: float = 30.0,
        read_only: bool = False,
        direct_io: bool = False,
        shared: bool = False,
        devices: Mapping[str, Device] | None = None,
        device_folder: str = "",
        held: HeldFiles | None = None,
        on_event: Callable[[str], None] = lambda _what: None,
        on_sync_failed: Callable[[], None] = lambda: None,
        on_io_errors: Callable[[], None] = lambda: None,
    ) -> None:
        """Loads `table` and goes live; without one the device starts suspended and empty.

        engine: whose loops to use; None for an engine of its own, closed with the device.
        fault_timeout: seconds after which a fault its target has not answered fails (ETIMEDOUT).
        read_only: open every file for reading only, of tables that are not loaded otherwise.
        direct_io: open files with O_DIRECT unless the table says otherwise.
        shared: claim no files; others may change them at the same time.
        devices: the devices that `blkloom:NAME` in tables may name. device_folder: paths in it name
        them too. held: where its files are kept, None for a place of its own. on_event: told, on
        whatever thread, what a target has its users know. on_sync_failed: a file could not be synced, and the one who
        has descriptors kept was told; the flush that met it fails when this returns. On the mapper's thread, mostly.
        on_io_errors: called on the mapper's thread when the log has been told of I/O errors.
        Raises TableError, BackingError, BusyError, ResourceError; then nothing stays open.
        """
        self.read_only = self._read_only = read_only
        self._direct_io = direct_io
        self._shared = shared
        self._devices = devices if devices is not None else {}
        self._device_folder = device_folder
        self._fault_timeout = fault_timeout
        self._owns_engine = engine is None
        self._process = OwnProcess(f"device {name!r}" if name else "a device")
        self._life = ProcessLock(self._process)
        """Held first, by who changes its life or its files: they may wait for files to open."""
        self._control = ProcessLock(self._process)
        """Held for as long as it is stopped, or changed; never while a file opens that others could delay."""
        self._closed = False
        self._held = held if held is not None else HeldFiles()
        self._on_event = on_event
        self._on_sync_failed = on_sync_failed
        self._owner_numbers = itertools.count()
        self._active: LoadedTable | None = None
        self._inactive: LoadedTable | None = None
        self._mapper = Mapper(self, on_io_errors)
        try:
            self.attach_mapper()
            self._mapper.start()
            close_at_exit(self)
            if table is not None:
                self.load(table)
                self.resume()
        except BaseException:
            self.close()
            raise

    # Life

    @property
    def table(self) -> Table | None:
        """The active table."""
        loaded = self._active
        return loaded.table if loaded else None

    @property
    def inactive_table(self) -> Table | None:
        """The table the next `resume` swaps in."""
        loaded = self._inactive
        return loaded.table if loaded else None

    @property
    def limits(self) -> BlockLimits:
        """In what sizes it should be read and written, by its active table."""
        loaded = self._active
        return loaded.limits if loaded else BlockLimits()

    @property
    def contexts(self) -> tuple[str, ...]:
        """Metadata contexts that `extents` can tell of besides `base:allocation`, as of the last `load` or `resume`."""
        loaded = self._active
        return loaded.contexts if loaded else ()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def load(
        self,
        table: Table,
        *,
        read_only: bool | None = None,
        shared: bool | None = None,
        descriptors: Descriptors | None = None,
    ) -> LoadedTable:
        """Opens and maps `table` into the inactive slot, in place of what was there. The active
        table, and the inactive one if this raises, stay as they are.

        read_only, shared: None as the device was made. descriptors: who opens files, None for this
        process. Returns what was loaded. Raises TypeError for text, which `blkloom.table.parse` makes a table of.
        """
        if not isinstance(table, Table):
            what = type(table).__name__
            raise TypeError(f"load takes a Table, not {what}: blkloom.table.parse(text, targets=...) makes one of text")
        with self._life:
            self._check_open()
            opening = Opening(
                self._held,
                read_only=self._read_only if read_only is None else read_only,
                direct_io=self._direct_io,
                shared=self._shared if shared is None else shared,
                devices=self._devices,
                device_folder=self._device_folder,
                descriptors=descriptors,
                above=self,
            )
            loaded = compose(table, opening, self._owner_numbers)
            with self._control:
                self.clear()
                self._mapper.add(loaded)
                self._inactive = loaded
            return loaded

    def clear(self) -> None:
        """Empties the inactive slot."""
        with self._life, self._control:
            loaded, self._inactive = self._inactive, None
            if loaded:
                self._mapper.retire(loaded)

    def suspend(self, *, flush: bool = True, timeout: float | None = None) -> None:
        """Stops new requests (they wait), finishes those in flight, flushes. timeout: seconds.
        Raises DrainError, which says what does not end, and OSError when the flush fails; then the
        device stays live.
        """
        with self._life, self._control:
            self._check_open()
            was_live = not self.suspended
            self._drain(flush=flush, timeout=timeout)
            if was_live:
                self._postsuspend()

    def _drain(self, *, flush: bool, timeout: float | None) -> None:
        was_live = not self.suspended
        try:
            super().suspend(flush=flush, timeout=timeout)
        except OSError as error:
            if was_live and self.suspended:  # the flush failed, and no target has been told yet
                super().resume()
            if not isinstance(error, TimeoutError):
                raise
            after = f" after {timeout:g} s" if timeout is not None else ""
            raise self.stuck(f"device {self.name!r}: requests in flight had not ended{after}") from error

    def _postsuspend(self) -> None:
        """Tells the targets. Live again if one raises."""
        try:
            for owner in self._active.owners.values() if self._active else ():
                self._mapper.ask(owner.target.postsuspend)
        except BaseException:
            self.note_failed_syncs()
            self._go_live()
            raise

    def _go_live(self) -> None:
        """Tells the targets, and lets requests in. Raises what they raise; it stays suspended then."""
        loaded = self._active
        if loaded and self.suspended:
            try:
                for number, owner in list(loaded.owners.items()):
                    mapped = self._mapper.ask(owner.target.preresume)
                    if mapped is not None:
                        loaded.remap(number, mapped)
                        super().swap(loaded.map)
                self._mapper.ask(loaded.ask_contexts)
            finally:
                self.note_failed_syncs()
        super().resume()

    def resume(self, *, flush: bool = True, timeout: float | None = None, swap: bool = True) -> None:
        """Swaps the inactive table in, if there is one and unless `swap` is False, and goes live. A live
        device is suspended for that (drained and flushed) as `dmsetup resume` does. If the swap fails
        the old table stays active; if a target refuses, the device stays suspended. Other arguments and
        errors are those of `suspend`.
        """
        with self._life, self._control:
            self._check_open()
            if swap:
                self.activate(flush=flush, timeout=timeout)
            if self._active is None:
                raise UsageError("a device without a table cannot be resumed", cure="load a table first")
            self._go_live()

    def activate(self, *, flush: bool = True, timeout: float | None = None) -> None:
        """Swaps the inactive table in, if there is one. The device is suspended after that."""
        with self._life, self._control:
            self._check_open()
            if self._inactive:
                self._swap_in(self._inactive, flush=flush, timeout=timeout)

    def status(self) -> list[tuple[Sectors, Sectors, str, str]]:
        """(start, length, target, what it says of itself) a segment of the active table; waits for
        the handler that runs.
        """
        with self._control:
            owners = list(self._active.owners.items()) if self._active else []
            segments = self._active.table.segments if self._active else ()
            texts = [self._mapper.ask(partial(self._status, number, owner)) for number, owner in owners]
        return [
            (segment.start, segment.length, segment.target.name, text)
            for segment, text in zip(segments, texts, strict=True)
        ]

    def _status(self, number: int, owner: Owner) -> str:
        text = owner.target.status()
        error = self._active.opening.sync_error(number) if self._active else 0
        return f"{text} sync_failed={errno.errorcode.get(error, error)}".lstrip() if error else text

    def message(self, sector: Sectors, words: list[str]) -> str | None:
        """Gives a message to the target whose segment holds `sector` (sectors). Its answer, or None.
        Raises UsageError, and whatever the target raises.
        """
        with self._life, self._control:
            if self._active is None:
                raise UsageError("a device without a table takes no messages", cure="load a table and resume")
            owners = zip(self._active.table.segments, self._active.owners.values(), strict=True)
            for segment, owner in owners:
                if segment.start <= sector < segment.end:
                    return self._mapper.ask(partial(owner.target.message, words))
        raise UsageError(f"Target message sector outside device: {sector}", cure=f"it has {segment.end} sectors")

    def all_below(self) -> list[Device]:
        """The devices this one stands on, at whatever depth, each once."""
        found: list[Device] = []
        waiting = [self]
        while waiting:
            device = waiting.pop()
            for loaded in (device._active, device._inactive):
                for below in loaded.opening.below if loaded else ():
                    if below not in found:
                        found.append(below)
                        waiting.append(below)
        return found

    def stuck(self, what: str) -> DrainError:
        """`what` went wrong, and whom requests in flight wait for, as far as that can be told."""
        files: dict[str, int] = {}
        suspended: list[str] = []
        for device in (self, *self.all_below()):
            for path, count in device._held.in_flight().items():
                files[path] = files.get(path, 0) + count
            if device is not self and device.suspended:
                suspended.append(device.name)
        if files:
            waiting = ", ".join(f"{count} in {path}" for path, count in files.items())
            return DrainError(f"{what}: {waiting}", path=next(iter(files)), cure="see what keeps its storage")
        if suspended:
            names = ", ".join(map(repr, suspended))
            return DrainError(f"{what}: they wait for suspended devices below: {names}", cure="resume those first")
        return DrainError(f"{what}: no file holds them up, so a target does", cure="see the log for its errors")

    def _swap_in(self, new: LoadedTable, *, flush: bool, timeout: float | None) -> None:
        was_live = not self.suspended
        if was_live:
            self.suspend(flush=flush, timeout=timeout)
        try:
            super().swap(new.map)
        except BaseException:
            if was_live:
                self._go_live()
            raise
        old, self._active, self._inactive = self._active, new, None
        self.read_only = new.read_only
        if old:
            self._mapper.retire(old)
            self.note_failed_syncs()

    def remap(
        self, owner: int, mapped: Mapped, *, drained: Callable[[], None] = lambda: None, timeout: float | None = None
    ) -> bool:
        """As `LiveSegment.remap`, for the target with the number `owner`."""
        with self._control:
            tables = [loaded for loaded in (self._active, self._inactive) if loaded and owner in loaded.owners]
            if self._closed or not tables:
                return False
            with self.stopped(timeout=timeout) if tables[0] is self._active else nullcontext():
                drained()
                tables[0].remap(owner, mapped)
                if tables[0] is self._active:
                    super().swap(tables[0].map)
            return True

    @contextmanager
    def stopped(self, *, timeout: float | None = None) -> Iterator[None]:
        """As `LiveSegment.stopped`."""
        if self._mapper.is_current_thread():
            raise UsageError("a fault handler cannot drain its own device")
        with self._control:
            live = not self._closed and not self.suspended
            if live:
                self._drain(flush=False, timeout=timeout)
            try:
                yield
            finally:
                if live:
                    super().resume()

    # Syncs that failed

    @property
    def sync_errors(self) -> dict[str, int]:
        """Files that could not be synced since they were opened for the active table, here and below, and the errno:
        what was written to them may be lost, and every flush fails.
        """
        found: dict[str, int] = {}
        for device in (self, *self.all_below()):
            for file in device._active.opening.written() if device._active else ():
                if file.sync_error:
                    found.setdefault(file.label, file.sync_error)
        return found

    @property
    def sync_error(self) -> int:
        """An errno of `sync_errors`; 0 where there are none."""
        return next(iter(self.sync_errors.values()), 0)

    def note_failed_syncs(self) -> None:
        """Has those that nobody knows of remembered, here and below, and says so; does nothing where there are none."""
        for device in (*self.all_below(), self):
            if any(file.has_unreported_failure for file in device._written()):
                device._mapper.ask(device._note_failed_syncs)

    def _note_failed_syncs(self) -> None:
        """In the mapper's turn, which makes this one at a time."""
        tables = self._tables()
        for loaded in tables:
            for owner in loaded.owners.values():
                self._mapper.try_tell(owner, owner.target.sync_failed)
        failed = [file for file in self._written() if file.has_unreported_failure]
        for file in failed:
            why = os.strerror(file.sync_error)
            _log.error("device %r: %s: a sync failed: %s; %s", self.name, file.label, why, _LOST)
        for loaded in tables:
            loaded.opening.keep_failures()
        if failed:
            self._on_sync_failed()
        for file in failed:
            file.set_failure_reported()

    def _tables(self) -> list[LoadedTable]:
        return [loaded for loaded in (self._active, self._inactive) if loaded]

    def _written(self) -> list[_engine.File]:
        return [file for loaded in self._tables() for file in loaded.opening.written()]

    def _lost(self) -> LostData | None:
        """What to say at the end."""
        if not (errors := self.sync_errors):
            return None
        texts = [f"a sync of {path} had failed: {os.strerror(number)}" for path, number in errors.items()]
        what = f"data written to device {self.name!r} may be lost" if self.name else "data that was written may be lost"
        return LostData(f"{what}: {'; '.join(texts)}", cure="check what is there", errno=self.sync_error)

    def has_work(self, owner: int) -> None:
        """As `LiveSegment.has_work`, for the target with the number `owner`."""
        self._mapper.has_work(owner)
        self.wake_mapper()

    def tell(self, what: str) -> None:
        """An event of the device: to the log, and to whoever made it."""
        _log.warning("device %r: %s", self.name, what)
        self._on_event(what)

    def swap(self, map: _engine.Map) -> None:
        """Refused: the map of a device made from tables changes with its table."""
        raise UsageError("this device's map belongs to its table", cure="use load() and resume()")

    def close(self, *, flush: bool = True) -> None:
        """Drains and, unless the device is suspended, flushes; gives up files, locks and memory;
        ends the mapper thread. I/O after that fails with ESHUTDOWN. Does no harm twice, and nothing at all in a fork
        of the process that made the device.

        Raises OSError if the last flush failed, or one before it, TimeoutError if requests did not end in time; the
        device is closed even so.
        """
        if not self._process.is_current:
            return
        if self._mapper.is_current_thread():
            raise UsageError("a fault handler cannot close its own device")
        with self._life, self._control:
            if self._closed:
                return
            self._closed = True
            try:
                self._finish(flush=flush)
            except TimeoutError as error:
                what = f"device {self.name!r} closed with requests not ended after {self._fault_timeout:g} s"
                raise self.stuck(what) from error
            finally:
                super().close()
                if not self._mapper.ended(self._fault_timeout):
                    _log.error("device %r: a target's handler does not return; its files stay open", self.name)
                self._active = self._inactive = None
                if self._owns_engine:
                    self.engine.close()
                forget(self)

    def _finish(self, *, flush: bool) -> None:
        """The last that is done with its targets. Raises OSError if something was not written."""
        failure: OSError | None = None
        if not self.suspended:
            self.fail_held()  # here they would wait for a resume that does not come
            try:
                super().suspend(flush=flush, timeout=self._fault_timeout)
                for owner in self._active.owners.values() if self._active and flush else ():
                    self._mapper.ask(owner.target.postsuspend)
            except OSError as error:
                failure = error
        if flush and not isinstance(failure, TimeoutError) and (lost := self._lost()):
            raise lost from failure
        if failure:
            raise failure

    def _check_open(self) -> None:
        if self._closed:
            raise OSError(errno.ESHUTDOWN, f"device {self.name!r} is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "suspended" if self.suspended else "live"
        return f"<blkloom.Device {self.name!r} {self.size} bytes, {state}>"

    # Views

    def raw(self) -> RawDevice:
        """The device as a file object: an `io.RawIOBase` with a position of its own. Wrap it in
        `io.BufferedRandom` or `io.BufferedReader`. Closing it leaves the device open.
        """
        return RawDevice(self, writable=not self.read_only)

    def asyncio(self) -> AsyncDevice:
        """The I/O methods as coroutines for the running event loop. Close it when done; that leaves
        the device open. Raises RuntimeError outside of a running loop.
        """
        return AsyncDevice(self)
