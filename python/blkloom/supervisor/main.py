"""The supervisor process: start, event loop, upgrade and end.

There is one supervisor for each run directory (flock on `lock`). It binds or inherits the control socket, recovers the
devices of a former supervisor, then answers clients of the same user, or root. SIGTERM, SIGINT and `stop` end it
cleanly: it drains, flushes and removes every device. If it is killed, its workers continue to serve; so they do after
SIGTERM with `keep_devices`, as a service whose restart leaves the devices in use. `upgrade` replaces the program in
place (execve(2), same process) and then every worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Sequence
from typing import Any, Final

from blkloom import open_files
from blkloom.control import messages as m
from blkloom.control.async_channel import AsyncChannel
from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.endpoint import Opener
from blkloom.control.failures import to_failure
from blkloom.control.rundir import RunDir
from blkloom.control.states import ExportState
from blkloom.errors import ResourceError, UsageError
from blkloom.export.nbd.listening import listen_unix
from blkloom.export.systemd import PassedDescriptor, ServiceNotifier, adopt_socket, passed_descriptors
from blkloom.peer_credentials import peer_credentials
from blkloom.printing import described
from blkloom.supervisor.change_notifier import ChangeNotifier
from blkloom.supervisor.device_verbs import DeviceVerbs
from blkloom.supervisor.devices import Devices
from blkloom.supervisor.export_verbs import ExportVerbs
from blkloom.supervisor.faults import Faults
from blkloom.supervisor.handover import HandOver
from blkloom.supervisor.idling import Idling
from blkloom.supervisor.layers import Layers
from blkloom.supervisor.limits import Inherited, Limits
from blkloom.supervisor.nodes import Nodes
from blkloom.supervisor.queries import Queries
from blkloom.supervisor.reaping import reap, reap_endpoints, release_files
from blkloom.supervisor.recovery import Recovery
from blkloom.supervisor.registry import Registry
from blkloom.supervisor.removal import Removal
from blkloom.supervisor.service_store import ServiceStore, close_unused, drop_unknown, stored_label, take_stored
from blkloom.supervisor.session import STALL_SECONDS, Session
from blkloom.supervisor.snapshots import Snapshots
from blkloom.supervisor.table_verbs import TableVerbs
from blkloom.supervisor.tables import Tables
from blkloom.supervisor.workers import Workers
from blkloom.supervisor.writers import Writers
from blkloom.supervisor.zygote_process import ZygoteProcess
from blkloom.targets.registry import all_targets
from blkloom.version import VERSION

_log = logging.getLogger(__name__)
_ACCEPT_RETRY: Final = 1.0
"""Seconds before the next try to accept clients when no descriptor is free."""
_ENDING: Final = (signal.SIGTERM, signal.SIGINT)


class Supervisor:
    """The supervisor of one run directory."""

    def __init__(
        self,
        run_dir: RunDir,
        limits: Limits,
        again: Sequence[str],
        zygote: ZygoteProcess,
        service_store: ServiceStore | None = None,
    ) -> None:
        """again: the command line to start it again, for `upgrade`. service_store: gets copies of descriptors that are
        to outlive this process and its workers.
        """
        self._run_dir = run_dir
        self._limits = limits
        self._again = again
        self._hello = m.Hello(version=VERSION, pid=os.getpid())
        self._registry = Registry(limits.devices)
        self._store = DescriptorStore(service_store)
        changes = ChangeNotifier()
        self._workers = Workers(
            run_dir,
            self._registry,
            self._store,
            changed=lambda entry: self._removal.look_at(entry),
            gone=lambda minor, ids: self._export_verbs.gone(minor, ids),
            deaths=limits.deaths,
            recovery=limits.recovery,
            client_memory=limits.client_memory,
            zygote=zygote,
        )
        self._hand_over = HandOver(self._workers)
        tables = Tables(all_targets(), self._registry, run_dir.devices, memory=limits.memory)
        self._tables = tables
        self._idling = Idling(run_dir, limits.idle, self._is_idle, self._end)
        self._devices = devices = Devices(run_dir, self._registry, self._workers)
        self._export_verbs = ExportVerbs(run_dir, self._registry, self._store, self._workers, devices)
        writers = Writers(self._registry, devices, self._export_verbs)
        self._nodes = Nodes(run_dir, self._registry, self._workers, devices, self._export_verbs, writers)
        self._table_verbs = TableVerbs(
            self._registry,
            self._store,
            self._workers,
            self._hand_over,
            tables,
            devices,
            self._nodes,
            changes,
            released=lambda entry: self._removal.look_at(entry),
        )
        self._removal = Removal(
            run_dir,
            self._registry,
            self._store,
            self._workers,
            devices,
            self._table_verbs,
            self._export_verbs,
            self._nodes,
            changes,
            gone=self._idling.look,
        )
        self._device_verbs = DeviceVerbs(
            run_dir,
            self._registry,
            self._store,
            self._workers,
            tables,
            devices,
            self._table_verbs,
            self._nodes,
            writers,
            self._removal,
        )
        layers = Layers(run_dir, self._registry, self._store, self._hand_over, devices, self._table_verbs, changes)
        self._faults = Faults(devices, tables, self._table_verbs, self._device_verbs, layers)
        self._queries = Queries(self._registry, tables, changes)
        self._snapshots = Snapshots(
            self._registry,
            devices,
            tables,
            self._table_verbs,
            self._device_verbs,
            self._removal,
            self._nodes,
            self._queries,
            layers,
        )
        self._sessions: set[asyncio.Task[None]] = set()
        self._ending: asyncio.Future[None]
        self._ended: asyncio.Future[list[str]]
        self._upgrading = False
        self._leaving = False
        """It ends, and its devices stay."""
        self._ours = True
        self._lock = -1
        self._control: socket.socket

    async def run(
        self,
        lock: int,
        control: socket.socket,
        ours: bool,
        inherited: Inherited | None,
        ready: Ready,
        passed: Sequence[PassedDescriptor] = (),
    ) -> int:
        """Runs until the supervisor is told to end. passed: descriptors from systemd's store. Returns the exit
        status.
        """
        loop = asyncio.get_running_loop()
        self._ending, self._ended = loop.create_future(), loop.create_future()
        self._lock, self._control, self._ours = lock, control, ours
        for number in _ENDING:
            loop.add_signal_handler(number, self._leave if self._limits.keep_devices else self._end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)  # signals may be pending from the program before an upgrade
        if inherited is not None:
            self._store.read(inherited.stored)
        close_unused(take_stored(self._store, passed))
        await self._release_files()
        recovery = Recovery(self._run_dir, self._registry, self._store, self._workers, self._tables)
        failed_before = recovery.failed_before
        await recovery.run()
        drop_unknown(self._store, self._registry)
        await self._reap_endpoints()
        self._nodes.recover(self._registry)
        accepting = asyncio.create_task(self._accept(control), name="accept")
        if inherited is not None:
            upgrade = self._finish_upgrade(inherited, failed_before)
            self._serve(upgrade, "upgrade")
        ready.report(f"{len(self._registry)} devices in {self._run_dir.path}")
        self._idling.begin(control, ours=ours)
        await self._ending
        ready.stopping()
        if self._leaving:
            return await self._rest(accepting)
        errors = await self._removal.stop()
        for error in errors:
            _log.error("%s", error)
        self._ended.set_result(errors)
        accepting.cancel()
        current = [task for task in self._sessions if not task.done()]
        await self._workers.close()
        if current:  # their last answers
            await asyncio.wait(current, timeout=0.2)
        for task in current:
            task.cancel()
        await asyncio.gather(accepting, *current, return_exceptions=True)
        await self._reap_nodes()  # which the calls have perhaps left that were cancelled
        return 1 if errors else 0

    async def _rest(self, accepting: asyncio.Task[None]) -> int:
        """Ends the supervisor after the running verbs, and leaves the workers to the next one. Returns the exit
        status.
        """
        await self._nodes.settled()
        async with self._workers.all_locked():
            for task in (accepting, *self._sessions):
                task.cancel()
            await asyncio.gather(accepting, *self._sessions, return_exceptions=True)
            await self._workers.rest()
        _log.warning("ended; %d devices stay, and their workers serve on", len(self._registry))
        return 0

    async def _release_files(self) -> None:
        """Clears immutable flags, before devices without a worker open their files again."""
        try:
            for line in await asyncio.to_thread(release_files):
                _log.warning("%s", line)
        except OSError as error:
            _log.error("files that were left immutable: %s; `blkloom reap` tries again", error)

    async def _reap_endpoints(self) -> None:
        """Removes the stale endpoints of a supervisor that was killed with its workers, before new ones are made."""
        try:
            for line in await asyncio.to_thread(reap_endpoints, self._run_dir, self._all_exports(), alone=True):
                _log.warning("a stale endpoint was removed: %s", line)
        except OSError as error:
            _log.error("stale endpoints cannot be removed: %s; `blkloom reap` tries again", error)
        await self._reap_nodes()

    async def _reap_nodes(self) -> None:
        try:
            for line in await self._nodes.reap():
                _log.warning("a stale node was removed: %s", line)
        except OSError as error:
            _log.error("stale nodes cannot be removed: %s; `blkloom reap` tries again", error)

    def _all_exports(self) -> list[ExportState]:
        return [export for entry in self._registry for export in entry.exports]

    def _end(self) -> None:
        if not self._ending.done():
            self._ending.set_result(None)

    def _leave(self) -> None:
        """Ends the supervisor; its devices stay, and verbs that come now are refused."""
        if not self._ending.done():
            self._leaving = self._upgrading = True
            self._end()

    def _is_idle(self) -> bool:
        return not (len(self._registry) or self._sessions)

    # clients

    async def _accept(self, control: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        logged = False
        while True:
            try:
                if open_files.are_scarce(open_files.SUPERVISOR_RESERVE):
                    raise OSError(errno.EMFILE, f"too few descriptors are left; {open_files.advice()}")
                connected, _ = await loop.sock_accept(control)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    raise
                if not logged:
                    _log.error("commands must wait, no descriptor is free to accept them: %s", error)
                logged = True
                await asyncio.sleep(_ACCEPT_RETRY)
                continue
            logged = False
            self._serve(self._welcome(connected), "client")

    def _serve(self, session: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(session, name=name)
        self._sessions.add(task)
        task.add_done_callback(self._gone)

    def _gone(self, task: asyncio.Task[None]) -> None:
        self._sessions.discard(task)
        self._idling.look()

    async def _welcome(self, connected: socket.socket) -> None:
        peer = peer_credentials(connected)
        channel = AsyncChannel(connected, m.FromClient, stall=STALL_SECONDS)
        if not peer.may_command:
            _log.warning("process %d of user %d was refused", peer.pid, peer.uid)
            what = f"this supervisor is of user {os.geteuid()}, you are user {peer.uid}"
            try:
                await channel.send(to_failure(0, UsageError(what, cure="start your own with --run-dir")))
            finally:
                await channel.close()
            return
        await Session(channel, self._hello, self._answer).run()

    async def _answer(self, call: m.ClientCall, opener: Opener, session: Session, request: int) -> Any:
        devices, tables, removal, queries = self._device_verbs, self._table_verbs, self._removal, self._queries
        if self._upgrading:
            raise ResourceError("the supervisor is being replaced", cure="try again", errno=errno.EAGAIN)
        match call:
            case m.Create():
                return await devices.create(call, opener)
            case m.Load():
                return await tables.load(call, opener)
            case m.Clear():
                return await tables.clear(call)
            case m.Suspend():
                return await tables.suspend(call)
            case m.Resume():
                return await tables.resume(call, opener)
            case m.Remove():
                return await removal.remove(call)
            case m.RemoveAll():
                return await removal.remove_all(call)
            case m.Retain():
                return await removal.retain(call)
            case m.Rename():
                return await devices.rename(call)
            case m.GetTable():
                return queries.table(call)
            case m.GetStatus():
                return await queries.status(call)
            case m.GetFiles():
                return await queries.files(call)
            case m.GetInfo():
                return queries.info(call)
            case m.SendMessage():
                return await devices.message(call)
            case m.SetFault():
                return await self._faults.set(call, opener)
            case m.TakeSnapshot():
                return await self._snapshots.take(call, opener)
            case m.DeleteSnapshot():
                return await self._snapshots.delete(call, opener)
            case m.MergeSnapshot():
                return await self._snapshots.merge(call, opener)
            case m.FinishMerge():
                return await self._snapshots.finish(call, opener)
            case m.ListSnapshots():
                return self._snapshots.listed(call)
            case m.ReadDevice():
                return await devices.read(call)
            case m.Wait():
                return await queries.wait(call)
            case m.GetStats():
                return await queries.stats(call)
            case m.AddExport():
                return await self._export_verbs.add(call)
            case m.ReloadTls():
                return await self._export_verbs.reload_tls(call)
            case m.RemoveExport():
                return await self._export_verbs.remove(call)
            case m.Attach():
                return await self._nodes.attach(call)
            case m.Detach():
                return await self._nodes.detach(call)
            case m.ScanPartitions():
                return await self._nodes.scan_partitions(call)
            case m.MakeNodes():
                return self._nodes.correct_links(call.device)
            case m.GetVersion():
                return self._version()
            case m.Reap():
                removed = reap(self._run_dir, self._registry, self._workers.groups)
                removed += await self._nodes.reap()
                removed += await asyncio.to_thread(reap_endpoints, self._run_dir, self._all_exports(), alone=False)
                return removed + await asyncio.to_thread(release_files)
            case m.Upgrade():
                return await self._upgrade(session, request)
            case m.Stop():
                return await self._stop(session, call)

    def _version(self) -> dict[str, Any]:
        return {
            "version": self._hello.version,
            "protocol": m.PROTOCOL,
            "pid": os.getpid(),
            "devices": len(self._registry),
            "workers": sum(group.pid > 0 for group in self._workers.groups.values()),
            "run_dir": str(self._run_dir.path),
            "limits": {
                "devices": self._limits.devices,
                "ram": self._limits.memory,
                "deaths": self._limits.deaths,
                "idle": self._limits.idle,
                "recovery": self._limits.recovery,
            },
        }

    async def _stop(self, session: Session, call: m.Stop) -> None:
        """Answers when all devices are removed. The connection of the client ends with the process, not before."""
        if not (call.force or self._ending.done()):
            self._registry.check_no_clients()
            await self._nodes.check_unused()
        self._end()
        with contextlib.suppress(OSError):  # it has left already
            os.dup(session.fileno())
        if errors := await asyncio.shield(self._ended):
            what = f"not everything was written: {'; '.join(errors)}"
            raise ResourceError(what, cure="see the supervisor's log", errno=errno.EIO)

    # upgrade

    async def _upgrade(self, session: Session, request: int) -> None:
        """Replaces the program, so it does not return: the next program answers."""
        await self._nodes.settled()
        async with self._workers.all_locked():
            if self._ending.done():
                raise ResourceError("the supervisor is stopping", cure="start another", errno=errno.ESHUTDOWN)
            await self._workers.check_reachable()
            client = os.dup(session.fileno())  # it may disconnect while the links to the workers are closed
            self._upgrading = True
            signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
            await self._workers.rest()
            kept = [self._lock, self._control.fileno(), client]
            stored = self._store.write()
            for descriptor in [*kept, stored]:
                os.set_inheritable(descriptor, True)
            numbers = [*kept, request, stored, int(self._ours)]
            arguments = [*self._again, "--inherited", ",".join(map(str, numbers))]
            _log.warning("upgrading from version %s", self._hello.version)
            if self._ending.done():  # signals stay pending for the next program
                os.kill(os.getpid(), signal.SIGTERM)
            try:
                os.execv(sys.executable, arguments)
            except OSError as error:
                _log.critical("%s cannot be executed: %s; workers serve on", sys.executable, error)
                os._exit(ResourceError.exit_code)

    async def _finish_upgrade(self, inherited: Inherited, failed_before: frozenset[int]) -> None:
        """Replaces the workers. failed_before: devices that had no worker when the upgrade began."""
        channel = AsyncChannel(socket.socket(fileno=inherited.client), m.FromClient, stall=STALL_SECONDS)
        session = Session(channel, self._hello, self._answer, greet=False)
        running = asyncio.create_task(session.run(), name="client")
        replaced, errors = 0, []
        for identifier in list(self._workers.groups):
            group = self._workers.groups.get(identifier)
            if group is None:
                continue
            async with group.lock:
                entries = self._registry.lower_first(group.minors)
                names = ", ".join(entry.name for entry in entries)
                if group.link is None:
                    if lost := [entry for entry in entries if entry.minor not in failed_before]:
                        errors.append(f"{names}: {lost[0].failed or 'its worker has ended'}")
                    continue
                if not entries:
                    continue
                try:
                    await self._hand_over.replace(group)
                    replaced += 1
                except (OSError, ValueError) as error:
                    errors.append(f"{names}: {described(error)}")
        self._devices.save_all()
        try:
            if errors:
                what = f"{replaced} workers were replaced, but not those of these devices: {'; '.join(errors)}"
                cure = "a worker that could not be replaced goes on as it was: see `blkloom info`"
                await channel.send(to_failure(inherited.request, ResourceError(what, cure=cure)))
            else:
                await session.reply(inherited.request, {"workers": replaced})
        except ConnectionError as error:
            _log.warning("the client that asked for the upgrade has disconnected: %s", error)
        await running


class Ready:
    """Reports readiness to the process that started the supervisor."""

    def __init__(self, notifier: ServiceNotifier, descriptor: int | None) -> None:
        self._notifier = notifier
        self._descriptor = descriptor

    def report(self, status: str) -> None:
        """Reports that clients are answered from now on."""
        self._notifier.ready(status)
        if self._descriptor is not None:
            with contextlib.suppress(BrokenPipeError):  # the process has not waited
                os.write(self._descriptor, b"1")
            os.close(self._descriptor)
            self._descriptor = None

    def stopping(self) -> None:
        """Reports that clients are no longer answered."""
        self._notifier.stopping()


def _take_lock(run_dir: RunDir) -> int:
    """Takes the lock. Raises UsageError if another supervisor has it."""
    descriptor = os.open(run_dir.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = os.read(descriptor, 32).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise UsageError(
            f"{run_dir.path} has a supervisor already, process {pid or 'unknown'}",
            cure="use that one",
            errno=errno.EBUSY,
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _take_passed() -> list[PassedDescriptor]:
    """The descriptors that systemd has passed. Raises ListenError."""
    passed = passed_descriptors(os.environ, pid=os.getpid())
    for variable in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)
    return passed


def _control_socket(run_dir: RunDir, passed: list[PassedDescriptor]) -> tuple[socket.socket, bool]:
    """The listening control socket, and whether the supervisor owns its file. passed: the socket, if it is there, is
    the first without a name of the store; it is removed from the list.
    """
    for at, descriptor in enumerate(passed):
        if stored_label(descriptor.name) is None:
            del passed[at]
            return adopt_socket(descriptor.fd), False
    return listen_unix(run_dir.control).socket, True


def run(
    run_dir: RunDir,
    limits: Limits,
    zygote: ZygoteProcess,
    *,
    ready_fd: int | None,
    inherited: Inherited | None,
    again: list[str],
) -> int:
    """Runs the supervisor. Returns the exit status. Raises UsageError, ListenError, OSError."""
    open_files.raise_limit()
    run_dir.make()
    ours = True
    passed: list[PassedDescriptor] = []
    if inherited is None:
        passed = _take_passed()
        lock = _take_lock(run_dir)
        run_dir.make_sockets()
        control, ours = _control_socket(run_dir, passed)
    else:
        lock, control = inherited.lock, socket.socket(fileno=inherited.control)
        control.setblocking(False)
        ours = bool(inherited.ours)
        for descriptor in (inherited.lock, inherited.control, inherited.client, inherited.stored):
            os.set_inheritable(descriptor, False)
    notifier = ServiceNotifier(os.environ)
    try:
        ready = Ready(notifier, ready_fd)
        service_store = ServiceStore(notifier) if limits.keep_devices else None
        supervisor = Supervisor(run_dir, limits, again, zygote, service_store)
        return asyncio.run(supervisor.run(lock, control, ours, inherited, ready, passed))
    finally:
        if ours:
            run_dir.control.unlink(missing_ok=True)
        control.close()
        run_dir.remove_sockets()
        os.close(lock)
