"""The client of a supervisor: one method for each verb. The `blkloom` command uses nothing else.

A device is selected by its name, `messages.Selector(uuid=...)` or `Selector(minor=...)`. Calls block; use a client from
one thread at a time. When the supervisor needs a file of a table, this process opens it, with its own rights, working
directory and mount namespace. Errors of the supervisor are raised here as the same class: a class of `blkloom.errors`,
OSError or TimeoutError.
"""

from __future__ import annotations

import base64
import errno
import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from blkloom.control import messages as m
from blkloom.control.channel import Channel
from blkloom.control.failures import to_exception
from blkloom.control.faults import Fault
from blkloom.control.framing import ChannelClosed
from blkloom.control.holders import name_holders
from blkloom.control.replies import Attached
from blkloom.control.rundir import RunDir
from blkloom.control.starting import connect
from blkloom.control.states import DeviceInfo, ExportState, LoopNotes, NodeOptions, OpenedFile, SocketPermissions
from blkloom.control.store_files import chunk_sectors, make_store, roomy_store
from blkloom.errors import BlkloomError, BusyError, ResourceError
from blkloom.forked import OwnProcess
from blkloom.open_files import descriptor_path, open_file
from blkloom.units import SECTOR

_PROGRESS_SECONDS: Final = 0.2

OPEN_SECONDS: Final = 10.0
"""Seconds for a file to open; after that its table is refused."""


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
            with suppress(ChannelClosed):  # a refusal: the connection may be closed, but its reason was sent
                self._channel.send(m.Hello(pid=os.getpid()))
            hello, _ = self._channel.receive(timeout)
            if isinstance(hello, m.Failure):
                raise to_exception(hello)
            self._check(hello)
            self._supervisor = hello.pid
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

    # queries

    def info(self, device: m.DeviceKey = "") -> list[DeviceInfo]:
        """State of one device, or of all devices by minor number."""
        return msgspec.convert(self.call(m.GetInfo(device=device)), list[DeviceInfo])

    def table(self, device: m.DeviceKey, *, inactive: bool = False) -> str:
        """Text of the live or inactive table; "" if the slot is empty."""
        return str(self.call(m.GetTable(device=device, inactive=inactive)))

    def status(self, device: m.DeviceKey) -> list[tuple[int, int, str, str]]:
        """(start, length, target, status) of each segment, in sectors."""
        return msgspec.convert(self.call(m.GetStatus(device=device)), list[tuple[int, int, str, str]])

    def files(self, device: m.DeviceKey) -> list[OpenedFile]:
        """Files that the live table has open, each path once; empty for a failed device."""
        return msgspec.convert(self.call(m.GetFiles(device=device)), list[OpenedFile])

    def stats(self, device: m.DeviceKey = "") -> dict[str, Any]:
        """See `messages.GetStats`."""
        return msgspec.convert(self.call(m.GetStats(device=device)), dict[str, Any])

    def version(self) -> dict[str, Any]:
        """See `messages.GetVersion`."""
        return msgspec.convert(self.call(m.GetVersion()), dict[str, Any])

    def wait(self, device: m.DeviceKey, event: int | None = None) -> int:
        """Blocks until the event number of the device is above `event`; returns the number."""
        return int(self.call(m.Wait(device=device, event=event), bounded=False))

    # devices

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
        node: NodeOptions | None = None,
        fault: str = "",
    ) -> DeviceInfo:
        """Makes a device, loads its table and resumes it; without a table, only makes it. autoclear: remove it after
        its last user has left. node: owner, permissions and other options of its nodes, which are made later. fault:
        what `blkloom fault` had made of it, if the table is that of a fault.
        """
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
            node=node or NodeOptions(),
            fault=fault,
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
        """Loads a table into the inactive slot. same_files: for paths that are also in the live table, use its open
        files, even if the paths lead to other files now.
        """
        call = m.Load(
            device=device, table=table, source=source, read_only=read_only, shared=shared, same_files=same_files
        )
        self.call(call)

    def clear(self, device: m.DeviceKey) -> None:
        """Empties the inactive slot."""
        self.call(m.Clear(device=device))

    def suspend(
        self, device: m.DeviceKey, *, flush: bool = True, lock_fs: bool = True, timeout: float | None = None
    ) -> None:
        """Finishes requests in flight and flushes; new requests wait. lock_fs: freeze file systems on its node first,
        unless `flush` is False. timeout: seconds for that, and for the requests in flight.
        """
        self.call(m.Suspend(device=device, flush=flush, lock_fs=lock_fs, timeout=timeout))

    def resume(
        self, device: m.DeviceKey, *, flush: bool = True, timeout: float | None = None, attach: bool = False
    ) -> None:
        """Makes the inactive table active, if there is one, and continues I/O. attach: then attaches the device, if it
        is not attached.
        """
        self.call(m.Resume(device=device, flush=flush, timeout=timeout, attach=attach))

    def remove(self, device: m.DeviceKey, *, force: bool = False, deferred: bool = False, retry: bool = False) -> None:
        """Removes the device. Raises BusyError while it is in use."""
        self.call(m.Remove(device=device, force=force, deferred=deferred, retry=retry))

    def remove_all(self, *, force: bool = False, deferred: bool = False) -> list[tuple[str, str]]:
        """Removes all devices. Returns (name, reason) of those that could not be removed."""
        return msgspec.convert(self.call(m.RemoveAll(force=force, deferred=deferred)), list[tuple[str, str]])

    def retain(self, device: m.DeviceKey) -> None:
        """Cancels autoclear and deferred removal: the device stays after its last user has left."""
        self.call(m.Retain(device=device))

    def rename(self, device: m.DeviceKey, *, name: str = "", uuid: str = "") -> None:
        """Renames a device, or sets the uuid of a device without one."""
        self.call(m.Rename(device=device, name=name, uuid=uuid))

    def message(self, device: m.DeviceKey, sector: int, text: str) -> str | None:
        """Sends `text` to the target at `sector`. Returns its answer."""
        return msgspec.convert(self.call(m.SendMessage(device=device, sector=sector, text=text)), str | None)

    def fault(self, device: m.DeviceKey, fault: Fault | None) -> None:
        """Makes a live device faulty, in place of a former fault; None: makes it well again, with the table that it
        had. Its clients and node stay. Raises UsageError if the device is suspended, has an inactive table or no fault.
        """
        self.call(m.SetFault(device=device, fault=fault))

    def snapshot(
        self,
        device: m.DeviceKey,
        name: str,
        *,
        file: str | os.PathLike[str] | None = None,
        size: int = 0,
        chunk: int = 0,
        lock_fs: bool = True,
        timeout: float | None = None,
    ) -> DeviceInfo:
        """Makes the device `name`: a writable snapshot of a live device, whose clients and node stay. File systems that
        are mounted from its node are frozen for the instant (not with lock_fs False). file: a new file for what
        changes; None: memory. size: bytes of that; 0: room for all. chunk: bytes that are copied together; 0: 16 KiB.
        Raises UsageError, ResourceError, FileExistsError.
        """
        path = "" if file is None else os.path.abspath(file)
        if path:
            info = self.info(device)[0]
            make_store(path, size or roomy_store(info.size))
        call = m.TakeSnapshot(
            device=device,
            name=name,
            store=path,
            size=size,
            chunk=chunk_sectors(chunk),
            lock_fs=lock_fs,
            timeout=timeout,
        )
        try:
            return msgspec.convert(self.call(call), DeviceInfo)
        except BaseException:
            if path:
                os.unlink(path)
            raise

    def snapshots(self, device: m.DeviceKey = "") -> list[m.SnapshotInfo]:
        """The snapshots of a device, or of all devices."""
        return msgspec.convert(self.call(m.ListSnapshots(device=device)), list[m.SnapshotInfo])

    def delete_snapshot(self, device: m.DeviceKey) -> None:
        """Removes a snapshot, or all snapshots of a device, and their memory; files are left. Raises DeviceBusy,
        UsageError if it is none and has none.
        """
        self.call(m.DeleteSnapshot(device=device))

    def merge_snapshot(self, device: m.DeviceKey) -> str:
        """Removes a snapshot and gives its origin what it contained: at once for clients, in the background in the
        files. Returns the name of the origin, for `finish_merge`. Raises DeviceBusy if one of the two is in use.
        """
        return str(self.call(m.MergeSnapshot(device=device)))

    def finish_merge(self, device: m.DeviceKey, progress: Callable[[int], None] | None = None) -> None:
        """Waits until a merge into a device is complete, and gives the device its former table again. progress: called
        a few times a second with the number of bytes that are left. Raises UsageError if none runs, or it has failed.
        """
        while True:
            event = self.info(device)[0].event
            if self.call(m.FinishMerge(device=device)):
                return
            if progress is None:
                self.wait(device, event)
                continue
            ((_, _, _, status),) = self.status(device)
            if "/" in status:
                used, _, metadata = status.replace("/", " ").split()
                progress((int(used) - int(metadata)) * SECTOR)
            time.sleep(_PROGRESS_SECONDS)

    def read(self, device: m.DeviceKey, offset: int, length: int) -> bytes:
        """Reads at most `messages.MOST_READ` bytes, without counting as a client of the device."""
        return base64.b64decode(self.call(m.ReadDevice(device=device, offset=offset, length=length)))

    # exports

    def export(
        self,
        device: m.DeviceKey,
        *,
        kind: str = "nbd",
        name: str = "",
        unix: str = "",
        host: str = "",
        port: int = 0,
        path: str = "",
        read_only: bool = False,
        allow_remote: bool = False,
        shared: bool = False,
        socket: SocketPermissions | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> ExportState:
        """Adds an export and returns its address. kind: `"nbd"`, `"fuse"` or `"vhost-user"`
        (`blkloom.export.registry`). socket: who may connect to a Unix socket; None: this user. host: of this
        machine, "" for localhost if there is a port. allow_remote: it may be an address that other hosts reach. shared:
        for writing even while the device is attached for writing as a block device.

        vhost-user: path: of the socket, absolute; "" for one in the run directory. Raises ListenError.

        fuse: path: of the file, absolute; "" for one in the run directory. options: `allow_other` (bool), `owner`
        ((user id, group id)), `mode` (permission bits), `uring` (bool: over io_uring; ends with its worker). Raises
        MountError.
        """
        call = m.AddExport(
            device=device,
            kind=kind,
            name=name,
            unix=unix,
            host=host,
            port=port,
            path=path,
            read_only=read_only,
            allow_remote=allow_remote,
            shared=shared,
            socket=socket or SocketPermissions(),
            options=dict(options or {}),
        )
        return msgspec.convert(self.call(call), ExportState)

    def reload_tls(self, device: m.DeviceKey) -> None:
        """Reads the TLS credentials of the exports of a device again, for clients that connect from now on. Raises
        UsageError if they cannot be used, or no export has TLS.
        """
        self.call(m.ReloadTls(device=device))

    def unexport(self, device: m.DeviceKey, export: str, *, force: bool = False) -> None:
        """Removes an export, by id, socket path or file path. force: also a file that is open; the I/O of its users
        then fails. Without it, raises MountError (EBUSY).
        """
        self.call(m.RemoveExport(device=device, id=export, force=force))

    def attach(
        self,
        device: m.DeviceKey,
        *,
        via: str = "auto",
        read_only: bool = False,
        partitions: bool = False,
        block_device: bool = False,
        shared: bool = False,
        options: Mapping[str, Any] | None = None,
        scan: bool | None = None,
    ) -> Attached:
        """Makes a node of the device. via: `"ublk"`, `"nbd"`, `"loop"`, `"fuse"`, or `"auto"` for the best that there
        is. partitions: make nodes of the partitions, too, if the node is a block device (`node.partitions`).
        block_device: with "auto", no file. shared: NBD clients may write while it is attached as a block device;
        without it they may read only. options: of the export that serves the node (`timeout` of a kernel NBD device,
        seconds; `on_failure` of a ublk device: "reissue" or "fail"). scan: False: udev does not look what
        is on it, so nothing of that is activated; None: as it was. Raises CannotAttach where nothing can be done here.
        """
        call = m.Attach(
            device=device,
            via=via,
            read_only=read_only,
            partitions=partitions,
            block_device=block_device,
            shared=shared,
            options=dict(options or {}),
            scan=scan,
        )
        return msgspec.convert(self.call(call), Attached)

    def detach(self, device: m.DeviceKey, *, lazy: bool = False, force: bool = False) -> None:
        """Removes the node. Raises DeviceBusy, which names the users, while it is in use; lazy: it goes after its last
        use; force: I/O of its users fails from now on.
        """
        self.call(m.Detach(device=device, lazy=lazy, force=force))

    def scan_partitions(self, device: m.DeviceKey, *, remove: bool = False) -> list[str]:
        """Makes nodes of the partitions of an attached block device, or updates them after a change of the partition
        table; remove: removes them. Returns warnings about the table. Raises DeviceBusy if a partition that must change
        is in use, UsageError if the device is not attached as a block device.
        """
        return msgspec.convert(self.call(m.ScanPartitions(device=device, remove=remove)), list[str])

    def make_nodes(self, device: m.DeviceKey = "") -> None:
        """Makes the stable names of nodes again where they are not as they should be: of one device, or of all. A name
        without a device gets no error, as in dmsetup.
        """
        self.call(m.MakeNodes(device=device))

    # the supervisor

    def upgrade(self) -> int:
        """Replaces the supervisor and all workers by the installed version. Returns the number of workers."""
        result = msgspec.convert(self.call(m.Upgrade()), dict[str, int])
        return result["workers"]

    def reap(self) -> list[str]:
        """Removes stale sockets, state files and immutable flags. Returns one line for each."""
        return msgspec.convert(self.call(m.Reap()), list[str])

    def stop(self, *, force: bool = False) -> None:
        """Drains, flushes and removes every device, and ends the supervisor. Raises DeviceBusy while clients are
        connected to devices, unless `force` disconnects them.
        """
        self.call(m.Stop(force=force))
        with suppress(ChannelClosed):  # that is when the process has ended, so that another can start
            while True:
                self._channel.receive()

    # requests

    def call(self, call: m.ClientCall, *, bounded: bool = True) -> Any:
        """Sends a request and waits for its answer; opens files meanwhile. bounded: use the timeout of the client.
        Raises ForkedError in a fork, whose requests would mix with those of its parent.
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
                for descriptor in descriptors:  # no answer has descriptors
                    os.close(descriptor)
            match message:
                case m.Reply(id=answered) if answered == number:
                    return message.result
                case m.Failure(id=answered) if answered in (number, 0):
                    error = to_exception(message)
                    raise self.with_holders(error) if isinstance(error, BusyError) else error
                case m.Reply(id=answered) | m.Failure(id=answered) if answered < number:
                    continue  # the answer to a call that was given up
                case _:
                    raise ChannelClosed(f"the supervisor answers what was not asked: {type(message).__name__}")

    def with_holders(self, error: BusyError) -> BusyError:
        """Replaces processes by device names in the error about a file in use."""
        try:
            return name_holders(error, self.info(), self._supervisor)
        except (BlkloomError, OSError):  # the supervisor no longer answers: keep the process numbers
            return error

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
        """Closes the connection. Running requests continue."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_within(asked: m.OpenFile, seconds: float, opened: int | None = None) -> int:
    """Opens a file on a new thread, because some file systems never answer. opened: descriptors of the request, owned
    by the caller. Raises OSError (ETIMEDOUT).
    """
    known = None if opened is None else os.dup(opened)  # owned by the thread: the caller may stop waiting for it
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
