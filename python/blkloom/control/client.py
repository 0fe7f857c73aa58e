"""The supervisor's client: one method a verb. The `blkloom` command uses nothing else.

A device is named by its name, or by `messages.Selector(uuid=...)` or `Selector(minor=...)`.
Calls block; use an instance from one thread at a time. Files that a table names are opened here, with
the caller's rights, working directory and mount namespace, when the supervisor asks for them.
Errors come up as they were raised there: classes of `blkloom.errors`, OSError, TimeoutError.
"""

from __future__ import annotations

import base64
import errno
import itertools
import os
import threading
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from blkloom.control import messages as m
from blkloom.control.channel import Channel
from blkloom.control.failures import to_exception
from blkloom.control.framing import ChannelClosed
from blkloom.control.rundir import RunDir
from blkloom.control.starting import connect
from blkloom.control.states import DeviceInfo, ExportState, LoopNotes, OpenedFile
from blkloom.errors import ResourceError
from blkloom.forked import OwnProcess
from blkloom.target.descriptors import descriptor_path, open_file

OPEN_SECONDS: Final = 10.0
"""How long a file may take to open before its table is refused."""


class Client:
    """A connection to the supervisor of a run directory. A context manager."""

    def __init__(
        self, run_dir: str | os.PathLike[str] | None = None, *, start: bool = True, timeout: float | None = None
    ) -> None:
        """run_dir: None for `RunDir.default`. start: start a supervisor if there is none. timeout: seconds
        without an answer after which a call fails (`wait` excepted); None: the supervisor's own bounds
        are enough. Raises NoSupervisor, UsageError, OSError.
        """
        self.run_dir = RunDir.default(os.environ) if run_dir is None else RunDir.at(run_dir)
        self._timeout = timeout
        self._process = OwnProcess("a connection to the supervisor")
        self._numbers = itertools.count(1)
        self._channel = Channel(connect(self.run_dir, start=start), m.ToClient)
        try:
            with suppress(ChannelClosed):  # one that refuses us may have hung up, but says why
                self._channel.send(m.Hello(pid=os.getpid()))
            hello, _ = self._channel.receive(timeout)
            if isinstance(hello, m.Failure):
                raise to_exception(hello)
            self._check(hello)
        except BaseException:
            self._channel.close()
            raise

    def _check(self, hello: m.Hello) -> None:
        if hello.protocol != m.PROTOCOL:
            raise ResourceError(
                f"the supervisor (version {hello.version}) speaks protocol {hello.protocol}, this is {m.PROTOCOL}",
                cure="run: blkloom upgrade, with the version that started it; or restart it",
                errno=errno.EPROTO,
            )

    # What there is

    def info(self, device: m.DeviceKey = "") -> list[DeviceInfo]:
        """Of one device, or of all by minor number."""
        return msgspec.convert(self.call(m.GetInfo(device=device)), list[DeviceInfo])

    def table(self, device: m.DeviceKey, *, inactive: bool = False) -> str:
        """The table's text; "" if the slot is empty."""
        return str(self.call(m.GetTable(device=device, inactive=inactive)))

    def status(self, device: m.DeviceKey) -> list[tuple[int, int, str, str]]:
        """(start, length, target, status) a segment; sectors."""
        return msgspec.convert(self.call(m.GetStatus(device=device)), list[tuple[int, int, str, str]])

    def files(self, device: m.DeviceKey) -> list[OpenedFile]:
        """Those that the live table has open, each path once; none of a device that has failed."""
        return msgspec.convert(self.call(m.GetFiles(device=device)), list[OpenedFile])

    def stats(self, device: m.DeviceKey = "") -> dict[str, Any]:
        """See `messages.GetStats`."""
        return msgspec.convert(self.call(m.GetStats(device=device)), dict[str, Any])

    def version(self) -> dict[str, Any]:
        """See `messages.GetVersion`."""
        return msgspec.convert(self.call(m.GetVersion()), dict[str, Any])

    def wait(self, device: m.DeviceKey, event: int | None = None) -> int:
        """Blocks until the device's event number is above `event`; the number."""
        return int(self.call(m.Wait(device=device, event=event), bounded=False))

    # Life

    def create(
        self,
        name: str,
        *,
        table: str | None = None,
        uuid: str = "",
        minor: int | None = None,
        source: str = "table",
        read_only: bool = False,
        shared: bool = False,
        suspended: bool = False,
        autoclear: bool = False,
        loop: LoopNotes | None = None,
    ) -> DeviceInfo:
        """Created, loaded and live; without a table created only. autoclear: removed when its last user leaves."""
        call = m.Create(
            name=name,
            uuid=uuid,
            minor=minor,
            table=table,
            source=source,
            read_only=read_only,
            shared=shared,
            suspended=suspended,
            autoclear=autoclear,
            loop=loop,
        )
        return msgspec.convert(self.call(call), DeviceInfo)

    def load(
        self,
        device: m.DeviceKey,
        table: str,
        *,
        source: str = "table",
        read_only: bool = False,
        shared: bool = False,
        same_files: bool = False,
    ) -> None:
        """Into the inactive slot. same_files: paths that the live table has, too, mean the files it has open, wherever
        they lead now.
        """
        call = m.Load(
            device=device, table=table, source=source, read_only=read_only, shared=shared, same_files=same_files
        )
        self.call(call)

    def clear(self, device: m.DeviceKey) -> None:
        """Empties the inactive slot."""
        self.call(m.Clear(device=device))

    def suspend(self, device: m.DeviceKey, *, flush: bool = True, timeout: float | None = None) -> None:
        """Drains, flushes, and parks what comes. timeout: seconds for what is in flight to end."""
        self.call(m.Suspend(device=device, flush=flush, timeout=timeout))

    def resume(self, device: m.DeviceKey, *, flush: bool = True, timeout: float | None = None) -> None:
        """Swaps the inactive table in, if there is one, and goes live."""
        self.call(m.Resume(device=device, flush=flush, timeout=timeout))

    def remove(self, device: m.DeviceKey, *, force: bool = False, deferred: bool = False, retry: bool = False) -> None:
        """Ends the device. Raises BusyError while it is open."""
        self.call(m.Remove(device=device, force=force, deferred=deferred, retry=retry))

    def remove_all(self, *, force: bool = False, deferred: bool = False) -> list[tuple[str, str]]:
        """(name, why) of those that could not be removed."""
        return msgspec.convert(self.call(m.RemoveAll(force=force, deferred=deferred)), list[tuple[str, str]])

    def retain(self, device: m.DeviceKey) -> None:
        """The device stays when its last user leaves: no autoclear, no deferred removal."""
        self.call(m.Retain(device=device))

    def rename(self, device: m.DeviceKey, *, name: str = "", uuid: str = "") -> None:
        """A new name, or a uuid for one that has none."""
        self.call(m.Rename(device=device, name=name, uuid=uuid))

    def message(self, device: m.DeviceKey, sector: int, text: str) -> str | None:
        """Sends `text` to the target at `sector`; its answer."""
        return msgspec.convert(self.call(m.SendMessage(device=device, sector=sector, text=text)), str | None)

    def read(self, device: m.DeviceKey, offset: int, length: int) -> bytes:
        """What a client would read there, without being one: `messages.MOST_READ` bytes at most."""
        return base64.b64decode(self.call(m.ReadDevice(device=device, offset=offset, length=length)))

    # Ways in

    def export(
        self,
        device: m.DeviceKey,
        *,
        name: str = "",
        unix: str = "",
        host: str = "",
        port: int = 0,
        read_only: bool = False,
        allow_remote: bool = False,
    ) -> ExportState:
        """One more NBD export; where it listens. host: of this machine, "" for localhost if there is a port.
        allow_remote: it may be an address that other hosts reach.
        """
        call = m.AddExport(
            device=device,
            name=name,
            unix=unix,
            host=host,
            port=port,
            read_only=read_only,
            allow_remote=allow_remote,
        )
        return msgspec.convert(self.call(call), ExportState)

    def unexport(self, device: m.DeviceKey, export: str) -> None:
        """Ends an export, by id or socket path."""
        self.call(m.RemoveExport(device=device, id=export))

    # The supervisor itself

    def upgrade(self) -> int:
        """Supervisor and workers become what is installed now; how many workers."""
        result = msgspec.convert(self.call(m.Upgrade()), dict[str, int])
        return result["workers"]

    def reap(self) -> list[str]:
        """Removes what belongs to nobody; what that was."""
        return msgspec.convert(self.call(m.Reap()), list[str])

    def stop(self, *, force: bool = False) -> None:
        """Every device drained, flushed and removed; the supervisor ends. Raises DeviceBusy while clients are
        connected to devices, unless `force` cuts them off.
        """
        self.call(m.Stop(force=force))
        with suppress(ChannelClosed):  # which is when the process ends, and another may be started
            while True:
                self._channel.receive()

    # The conversation

    def call(self, call: m.ClientCall, *, bounded: bool = True) -> Any:
        """Asks and waits for the answer, opening files meanwhile. bounded: by the client's timeout. Raises ForkedError
        in a fork, whose questions would mix with its parent's.
        """
        self._process.check()
        seconds = self._timeout if bounded else None
        number = next(self._numbers)
        self._channel.send(m.ClientRequest(id=number, call=call))
        while True:
            message, descriptors = self._channel.receive(seconds)
            try:
                if isinstance(message, m.OpenFile):
                    self._open(message, *descriptors)
                    continue
            finally:
                for descriptor in descriptors:  # none of the answers has any
                    os.close(descriptor)
            match message:
                case m.Reply(id=answered) if answered == number:
                    return message.result
                case m.Failure(id=answered) if answered in (number, 0):
                    raise to_exception(message)
                case m.Reply(id=answered) | m.Failure(id=answered) if answered < number:
                    continue  # of a call that was given up
                case _:
                    raise ChannelClosed(f"the supervisor answers what was not asked: {message!r:.200}")

    def _open(self, asked: m.OpenFile, opened: int | None = None) -> None:
        try:
            descriptor = open_within(asked, OPEN_SECONDS, opened)
        except (OSError, ValueError) as error:
            number = error.errno if isinstance(error, OSError) else errno.EINVAL
            self._channel.send(m.OpenRefused(id=asked.id, errno=number or errno.EIO))
            return
        try:
            self._channel.send(m.Opened(id=asked.id), [descriptor])
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Ends the connection; what was asked goes on."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_within(asked: m.OpenFile, seconds: float, opened: int | None = None) -> int:
    """Opens on a thread of its own, because some file systems never answer. opened: what rode along, the caller's.
    Raises OSError (ETIMEDOUT).
    """
    known = None if opened is None else os.dup(opened)  # the thread's: its caller may not wait for it
    path = asked.path if known is None else descriptor_path(known)
    outcome: list[int | BaseException] = []
    decided = threading.Lock()
    late = False

    def attempt() -> None:
        try:
            found: int | BaseException = open_file(
                path, writable=asked.writable, direct=asked.direct, exclusive=asked.exclusive
            )
        except BaseException as error:
            found = error
        finally:
            if known is not None:
                os.close(known)
        with decided:
            if late and isinstance(found, int):
                os.close(found)
            outcome.append(found)

    thread = threading.Thread(target=attempt, name=f"open {asked.path}", daemon=True)
    thread.start()
    thread.join(seconds)
    with decided:
        if not outcome:
            late = True
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), asked.path)
    (found,) = outcome
    if isinstance(found, BaseException):
        raise found
    return found
