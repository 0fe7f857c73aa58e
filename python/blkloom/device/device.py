"""A device: a name, an active and an inactive table, suspended or live.

The I/O methods are inherited from the engine: they release the GIL and may be called from any thread. This class adds
the states of a device-mapper device: `load` fills the inactive slot, `resume` makes that table active, `suspend` stops
new requests, drains and flushes, and `close` ends the device. These calls are serialized. A failed load or swap leaves
the active table as it was. `close` closes every file and releases every lock, also after a load that failed half-way.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, cast

from blkloom import _engine, open_files
from blkloom.device.at_exit import close_at_exit, forget
from blkloom.device.compose import LoadedTable, Owner, compose
from blkloom.device.mapper import Mapper
from blkloom.device.raw_io import RawDevice
from blkloom.errors import DrainError, LostData, ResourceError, UsageError
from blkloom.forked import OwnProcess, ProcessLock
from blkloom.table import Table
from blkloom.targets.descriptors import Descriptors
from blkloom.targets.holding import SharedFiles
from blkloom.targets.limits import BlockLimits
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import Mapped
from blkloom.units import Sectors

if TYPE_CHECKING:
    from blkloom.async_device import AsyncDevice

_log = logging.getLogger(__name__)

_LOST: Final = (
    "what was written may be lost, and every flush fails until the file is reopened "
    "(load the table again and resume, or remove the device and create it)"
)


class Device(_engine.Device):
    """A virtual block device built from a table. A context manager; close it when done.

    Offsets and lengths of I/O are bytes; errors are OSError with the errno a disk would give. In a fork of the process
    that made it all I/O and every change raise ForkedError, and `close` does nothing.
    """

    read_only: bool
    """Whether writes fail with EROFS: the active table was loaded read-only. Before the first load, the setting of the
    device.
    """
    engine: _engine.Engine
    """The engine that serves this device's exports and asynchronous I/O."""

    def __new__(
        cls,
        table: Table | None = None,
        *,
        engine: _engine.Engine | None = None,
        name: str = "",
        fault_timeout: float = 30.0,
        **_for_init: Any,
    ) -> Self:
        """Makes the engine's half of the device: suspended and without a map."""
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
        held: SharedFiles | None = None,
        on_event: Callable[[str], None] = lambda _what: None,
        on_sync_failed: Callable[[], None] = lambda: None,
        on_io_errors: Callable[[], None] = lambda: None,
    ) -> None:
        """Loads `table` and goes live; without a table, the device starts suspended and empty.

        engine: the engine to use; None for a new engine, which is closed with the device.
        fault_timeout: seconds after which a fault without an answer fails (ETIMEDOUT).
        read_only: open the files for reading only; the default for `load`.
        direct_io: open files with O_DIRECT unless the table says otherwise.
        shared: do not lock files; other programs may change them at the same time.
        devices: the devices that tables can name as `blkloom:NAME`. device_folder: paths in it also name
        them. held: the place where its open files are kept, None for a new one. on_event: callback for events of
        targets, on any thread. on_sync_failed: callback after a failed sync of a file, once the keeper of the
        descriptors was told; the failed flush is answered when the callback returns. Mostly on the mapper's thread.
        on_io_errors: callback after I/O errors were logged, on the mapper's thread.
        Raises TableError, BackingError, BusyError, ResourceError; then nothing stays open.
        """
        self.read_only = self._read_only = read_only
        self._direct_io = direct_io
        self._shared = shared
        self._devices = devices if devices is not None else {}
        self._device_folder = device_folder
        self._fault_timeout = fault_timeout
        self._owns_engine = engine is None
        self._process = OwnProcess(self.called)
        self._life = ProcessLock(self._process)
        """Taken first by calls that load, swap or close; these may wait for files to open."""
        self._control = ProcessLock(self._process)
        """Held while the device is stopped or changed; never while a file opens, which other processes could delay."""
        self._closed = False
        self._held = held if held is not None else SharedFiles()
        self._on_event = on_event
        self._on_sync_failed = on_sync_failed
        self._owner_numbers = itertools.count()
        self.shared: dict[str, object] = {}
        """Objects that targets of the tables above this device share, by name."""
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

    # States

    @property
    def called(self) -> str:
        """The device in messages: `device 'disk'`, or `the device` if it has no name."""
        return f"device '{self.name}'" if self.name else "the device"

    @property
    def table(self) -> Table | None:
        """The active table."""
        loaded = self._active
        return loaded.table if loaded else None

    @property
    def inactive_table(self) -> Table | None:
        """The table that the next `resume` makes active."""
        loaded = self._inactive
        return loaded.table if loaded else None

    @property
    def limits(self) -> BlockLimits:
        """Preferred sizes of reads and writes, according to the active table."""
        loaded = self._active
        return loaded.limits if loaded else BlockLimits()

    @property
    def is_raw(self) -> bool:
        """Whether another host that loads the active table, on the same files, continues with the same data. Not so for
        image formats, snapshots and memory.
        """
        loaded = self._active
        return loaded is not None and loaded.is_raw

    @property
    def rotational(self) -> bool:
        """Whether data of the active table is on a rotating disk."""
        loaded = self._active
        return loaded is not None and loaded.rotational

    @property
    def contexts(self) -> tuple[str, ...]:
        """Metadata contexts of `extents` besides `base:allocation`, as of the last `load` or `resume`."""
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
        """Opens and maps `table` in the inactive slot, in place of a former table. If this raises, both slots stay as
        they were.

        read_only, shared: None for the settings of the device. descriptors: opens files, None for this process. Returns
        the loaded table. Raises TypeError for text; `blkloom.parse_table` makes a table of it.
        """
        if not isinstance(table, Table):
            what = type(table).__name__
            raise TypeError(f"load takes a Table, not {what}: blkloom.parse_table(text, targets=...) makes one of text")
        with self._life:
            self._check_open()
            context = LoadContext(
                self._held,
                read_only=self._read_only if read_only is None else read_only,
                direct_io=self._direct_io,
                shared=self._shared if shared is None else shared,
                devices=self._devices,
                device_folder=self._device_folder,
                descriptors=descriptors,
                above=self,
            )
            loaded = compose(table, context, self._owner_numbers)
            with self._control:
                self.clear()
                self._add(loaded)
                self._inactive = loaded
            return loaded

    def _add(self, loaded: LoadedTable) -> None:
        try:
            self._mapper.add(loaded, self, self._fault_timeout)
        except OSError as error:
            loaded.close()
            what = f"{self.called}: no event loop for its targets can be had: {error.strerror}"
            raise ResourceError(what, cure=open_files.advice(), errno=error.errno) from error

    def clear(self) -> None:
        """Empties the inactive slot."""
        with self._life, self._control:
            loaded, self._inactive = self._inactive, None
            if loaded:
                self._mapper.retire(loaded)

    def suspend(self, *, flush: bool = True, timeout: float | None = None) -> None:
        """Makes new requests wait, finishes those in flight, and flushes. timeout: seconds. Raises DrainError, which
        names what does not end, and OSError if the flush fails; then the device stays live.
        """
        with self._life, self._control:
            self._check_open()
            was_live = not self.suspended
            self._drain(flush=flush, timeout=timeout)
            if was_live:
                self._postsuspend()

    def _drain(self, *, flush: bool, timeout: float | None) -> None:
        was_live = not self.suspended
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            super().suspend(flush=flush, timeout=timeout)
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            if not self._mapper.wait_until_quiet(left):
                raise TimeoutError(errno.ETIMEDOUT, "a handler that was cancelled does not end")
        except OSError as error:
            if was_live and self.suspended:  # the flush failed, and no target has been told yet
                super().resume()
            if not isinstance(error, TimeoutError):
                raise
            after = f" after {timeout:g} s" if timeout is not None else ""
            raise self.stuck(f"{self.called}: requests in flight had not ended{after}") from error

    def _postsuspend(self) -> None:
        """Calls the targets' `postsuspend`. The device is live again if one raises."""
        try:
            for owner in self._active.owners.values() if self._active else ():
                self._mapper.ask(owner.target.postsuspend)
        except BaseException:
            self.note_failed_syncs()
            self._go_live()
            raise

    def _go_live(self) -> None:
        """Calls the targets' `preresume`, and lets requests in. Raises their exceptions; the device stays suspended
        then.
        """
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
        """Makes the inactive table active, if there is one and unless `swap` is False, and goes live. A live device is
        suspended for that (drained and flushed), as `dmsetup resume` does. If the swap fails, the old table stays
        active; if a target refuses, the device stays suspended. Other arguments and errors are those of `suspend`.
        """
        with self._life, self._control:
            self._check_open()
            if swap:
                self.activate(flush=flush, timeout=timeout)
            if self._active is None:
                raise UsageError("a device without a table cannot be resumed", cure="load a table first")
            self._go_live()

    def activate(self, *, flush: bool = True, timeout: float | None = None) -> None:
        """Makes the inactive table active, if there is one. The device is suspended after that."""
        with self._life, self._control:
            self._check_open()
            if self._inactive:
                self._swap_in(self._inactive, flush=flush, timeout=timeout)

    def status(self) -> list[tuple[Sectors, Sectors, str, str]]:
        """(start, length, target, status text) of each segment of the active table. Waits for a running handler."""
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
        error = self._active.load_context.sync_error(number) if self._active else 0
        return f"{text} sync_failed={errno.errorcode.get(error, error)}".lstrip() if error else text

    def message(self, sector: Sectors, words: list[str]) -> str | None:
        """Sends a message to the target whose segment contains `sector` (sectors). Returns its answer, or None. Raises
        UsageError, and the exceptions of the target.
        """
        with self._life, self._control:
            if self._active is None:
                raise UsageError("a device without a table takes no messages", cure="load a table and resume")
            owners = zip(self._active.table.segments, self._active.owners.values(), strict=True)
            for segment, owner in owners:
                if segment.start <= sector < segment.end:
                    return self._ask_message(owner, words)
        raise UsageError(f"Target message sector outside device: {sector}", cure=f"it has {segment.end} sectors")

    def _ask_message(self, owner: Owner, words: list[str]) -> str | None:
        answer: str | None = self._mapper.ask_to_end(partial(owner.target.message, words), self._fault_timeout)
        return answer

    def begin_handover(self) -> None:
        """Prepares the hand-over of clients: coroutines that answer reads are cancelled, and these reads wait, to be
        handed over with the clients. Requests that change something are still waited for. Until `end_handover`.
        """
        self._mapper.set_handing_over(True)

    def end_handover(self) -> None:
        """Cancels the hand-over: the clients stay, and the reads that wait are handled again."""
        self._mapper.set_handing_over(False)
        self.retry_deferred()

    def all_below(self) -> list[Device]:
        """All lower devices, at any depth, each once."""
        found: list[Device] = []
        waiting = [self]
        while waiting:
            device = waiting.pop()
            for loaded in (device._active, device._inactive):
                for below in loaded.load_context.below if loaded else ():
                    if below not in found:
                        found.append(below)
                        waiting.append(below)
        return found

    def stuck(self, what: str) -> DrainError:
        """A DrainError for `what`; it names what the requests in flight wait for, as far as that is known."""
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
            names = ", ".join(f"'{name}'" for name in suspended)
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

    # Failed syncs

    @property
    def sync_errors(self) -> dict[str, int]:
        """Files of the active table, here and in lower devices, with a failed sync since they were opened, and the
        errno. Data written to them may be lost, and every flush fails.
        """
        found: dict[str, int] = {}
        for device in (self, *self.all_below()):
            for file in device._active.load_context.files.written() if device._active else ():
                if file.sync_error:
                    found.setdefault(file.label, file.sync_error)
        return found

    @property
    def sync_error(self) -> int:
        """An errno of `sync_errors`; 0 if there are none."""
        return next(iter(self.sync_errors.values()), 0)

    def note_failed_syncs(self) -> None:
        """Records and reports new failed syncs, of this device and of lower ones. Does nothing if there are none."""
        for device in (*self.all_below(), self):
            if any(file.has_unreported_failure for file in device._written()):
                device._mapper.ask(device._note_failed_syncs)

    def _note_failed_syncs(self) -> None:
        """`note_failed_syncs` under the turn mutex, so that one thread at a time runs it."""
        tables = self._tables()
        for loaded in tables:
            for owner in loaded.owners.values():
                self._mapper.try_tell(owner, owner.target.sync_failed)
        failed = [file for file in self._written() if file.has_unreported_failure]
        for file in failed:
            why = os.strerror(file.sync_error)
            _log.error("%s: %s: a sync failed: %s; %s", self.called, file.label, why, _LOST)
        for loaded in tables:
            loaded.load_context.files.keep_failures()
        if failed:
            self._on_sync_failed()
        for file in failed:
            file.set_failure_reported()

    def _tables(self) -> list[LoadedTable]:
        return [loaded for loaded in (self._active, self._inactive) if loaded]

    def _written(self) -> list[_engine.File]:
        return [file for loaded in self._tables() for file in loaded.load_context.files.written()]

    def _lost(self) -> LostData | None:
        """The message about lost data when the device is closed."""
        if not (errors := self.sync_errors):
            return None
        texts = [f"a sync of {path} had failed: {os.strerror(number)}" for path, number in errors.items()]
        what = f"data written to device '{self.name}' may be lost" if self.name else "data that was written may be lost"
        return LostData(f"{what}: {'; '.join(texts)}", cure="check what is there", errno=self.sync_error)

    def has_work(self, owner: int) -> None:
        """As `LiveSegment.has_work`, for the target with the number `owner`."""
        self._mapper.has_work(owner)
        self.wake_mapper()

    def tell(self, what: str) -> None:
        """Reports an event of the device, to the log and to the `on_event` callback."""
        _log.warning("%s: %s", self.called, what)
        self._on_event(what)

    def swap(self, map: _engine.Map) -> None:
        """Refused: the map of a device made from tables changes with its table."""
        raise UsageError("this device's map belongs to its table", cure="use load() and resume()")

    def close(self, *, flush: bool = True) -> None:
        """Drains and, unless the device is suspended, flushes; releases files, locks and memory; ends the mapper
        thread. Later I/O fails with ESHUTDOWN. A second call does nothing, and neither does a call in a fork of the
        process that made the device.

        Raises OSError if the last flush failed, or an earlier one, and TimeoutError if requests did not end in time;
        the device is closed even then.
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
                what = f"{self.called} closed with requests not ended after {self._fault_timeout:g} s"
                raise self.stuck(what) from error
            finally:
                super().close()
                if not self._mapper.ended(self._fault_timeout):
                    _log.error("%s: a target's handler does not return; its files stay open", self.called)
                self._active = self._inactive = None
                if self._owns_engine:
                    self.engine.close()
                forget(self)

    def _finish(self, *, flush: bool) -> None:
        """The last step of closing. Raises OSError if data was not written."""
        failure: OSError | None = None
        if not self.suspended:
            self.fail_deferred()  # here they would wait for a resume that never happens
            try:
                super().suspend(flush=flush, timeout=self._fault_timeout)
                self._mapper.wait_until_quiet(self._fault_timeout)
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
            raise OSError(errno.ESHUTDOWN, f"{self.called} is closed")

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
        """The device as a file object: an `io.RawIOBase` with its own position. Wrap it in `io.BufferedRandom` or
        `io.BufferedReader`. Closing it leaves the device open.
        """
        return RawDevice(self, writable=not self.read_only)

    def asyncio(self) -> AsyncDevice:
        """The I/O methods as coroutines for the running asyncio loop. Close it when done; that leaves the device open.
        Raises RuntimeError outside of a running loop.
        """
        from blkloom.async_device import AsyncDevice  # asyncio is a slow import that few programs need

        return AsyncDevice(self)
