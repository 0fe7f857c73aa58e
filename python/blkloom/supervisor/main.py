"""The supervisor process: from its lock to its last word.

One a run directory (flock on `lock`). It binds or is handed the control socket, takes up what a former
supervisor left, then answers clients of the same user, or root. SIGTERM, SIGINT and `stop` end it
cleanly, every device drained, flushed and removed; killed, it leaves its workers serving. `upgrade`
replaces the program in place (execve(2), same process) and then every worker.
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
from blkloom.control.failures import to_failure
from blkloom.control.rundir import RunDir
from blkloom.errors import ResourceError, UsageError
from blkloom.export.nbd.listening import listen_unix
from blkloom.export.systemd import ServiceNotifier, adopt_socket, passed_descriptors
from blkloom.peer import peer_of
from blkloom.supervisor.adoption import Adoption
from blkloom.supervisor.idling import Idling
from blkloom.supervisor.limits import Inherited, Limits
from blkloom.supervisor.looking import Looking
from blkloom.supervisor.news import News
from blkloom.supervisor.reaping import reap, release_files
from blkloom.supervisor.registry import Registry
from blkloom.supervisor.session import STALL_SECONDS, Session
from blkloom.supervisor.store import Store
from blkloom.supervisor.tables import Tables
from blkloom.supervisor.verbs import Caller, Verbs
from blkloom.supervisor.workers import Workers
from blkloom.supervisor.zygote_process import ZygoteProcess
from blkloom.target.registry import all_targets
from blkloom.version import VERSION

_log = logging.getLogger(__name__)
_ACCEPT_RETRY: Final = 1.0
"""Seconds before it is tried again to accept clients with no descriptor free."""
_ENDING: Final = (signal.SIGTERM, signal.SIGINT)


class Supervisor:
    """One run directory's."""

    def __init__(self, run_dir: RunDir, limits: Limits, again: Sequence[str], zygote: ZygoteProcess) -> None:
        """again: the command line that starts it once more."""
        self._run_dir = run_dir
        self._limits = limits
        self._again = again
        self._hello = m.Hello(version=VERSION, pid=os.getpid())
        self._registry = Registry(limits.devices)
        self._store = Store()
        self._news = News()
        self._workers = Workers(
            run_dir,
            self._registry,
            self._store,
            changed=lambda entry: self._verbs.look_at(entry),
            deaths=limits.deaths,
            recovery=limits.recovery,
            client_memory=limits.client_memory,
            zygote=zygote,
        )
        tables = Tables(all_targets(), self._registry, run_dir.devices, memory=limits.memory)
        self._tables = tables
        self._idling = Idling(run_dir, limits.idle, self._is_idle, self._end)
        self._verbs = Verbs(
            run_dir, self._registry, self._store, self._workers, tables, self._news, gone=self._idling.look
        )
        self._looking = Looking(self._registry, tables, self._news)
        self._sessions: set[asyncio.Task[None]] = set()
        self._ending: asyncio.Future[None]
        self._ended: asyncio.Future[list[str]]
        self._upgrading = False
        self._ours = True
        self._lock = -1
        self._control: socket.socket

    async def live(
        self, lock: int, control: socket.socket, ours: bool, inherited: Inherited | None, ready: Ready
    ) -> int:
        """Until it is told to end. Returns the exit status."""
        loop = asyncio.get_running_loop()
        self._ending, self._ended = loop.create_future(), loop.create_future()
        self._lock, self._control, self._ours = lock, control, ours
        for number in _ENDING:
            loop.add_signal_handler(number, self._end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)  # the program before this one may have got some
        if inherited is not None:
            self._store.read(inherited.stored)
        await self._release_files()
        adoption = Adoption(self._run_dir, self._registry, self._store, self._workers, self._tables)
        failed_before = adoption.failed_before
        await adoption.run()
        accepting = asyncio.create_task(self._accept(control), name="accept")
        if inherited is not None:
            upgrade = self._finish_upgrade(inherited, failed_before)
            self._serve(upgrade, "upgrade")
        ready.say(f"{len(self._registry)} devices in {self._run_dir.path}")
        self._idling.begin(control, ours=ours)
        await self._ending
        ready.stopping()
        errors = await self._verbs.stop()
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
        return 1 if errors else 0

    async def _release_files(self) -> None:
        """Before devices whose workers have died open their files again."""
        try:
            for line in await asyncio.to_thread(release_files):
                _log.warning("%s", line)
        except OSError as error:
            _log.error("files that were left immutable: %s; `blkloom reap` tries again", error)

    def _end(self) -> None:
        if not self._ending.done():
            self._ending.set_result(None)

    def _is_idle(self) -> bool:
        return not (len(self._registry) or self._sessions)

    # clients

    async def _accept(self, control: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        said = False
        while True:
            try:
                if open_files.are_scarce(open_files.SUPERVISOR_RESERVE):
                    raise OSError(errno.EMFILE, f"too few descriptors are left; {open_files.advice()}")
                connected, _ = await loop.sock_accept(control)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    raise
                if not said:
                    _log.error("commands wait, nothing is left to accept them with: %s", error)
                said = True
                await asyncio.sleep(_ACCEPT_RETRY)
                continue
            said = False
            self._serve(self._welcome(connected), "client")

    def _serve(self, session: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(session, name=name)
        self._sessions.add(task)
        task.add_done_callback(self._gone)

    def _gone(self, task: asyncio.Task[None]) -> None:
        self._sessions.discard(task)
        self._idling.look()

    async def _welcome(self, connected: socket.socket) -> None:
        peer = peer_of(connected)
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

    async def _answer(self, call: m.ClientCall, caller: Caller, session: Session, request: int) -> Any:
        verbs, looking = self._verbs, self._looking
        if self._upgrading:
            raise ResourceError("the supervisor is being replaced", cure="try again", errno=errno.EAGAIN)
        match call:
            case m.Create():
                return await verbs.create(call, caller)
            case m.Load():
                return await verbs.load(call, caller)
            case m.Clear():
                return await verbs.clear(call)
            case m.Suspend():
                return await verbs.suspend(call)
            case m.Resume():
                return await verbs.resume(call, caller)
            case m.Remove():
                return await verbs.remove(call)
            case m.RemoveAll():
                return await verbs.remove_all(call)
            case m.Retain():
                return await verbs.retain(call)
            case m.Rename():
                return await verbs.rename(call)
            case m.GetTable():
                return looking.table(call)
            case m.GetStatus():
                return await looking.status(call)
            case m.GetFiles():
                return await looking.files(call)
            case m.GetInfo():
                return looking.info(call)
            case m.SendMessage():
                return await verbs.message(call)
            case m.ReadDevice():
                return await verbs.read(call)
            case m.Wait():
                return await looking.wait(call)
            case m.GetStats():
                return await looking.stats(call)
            case m.AddExport():
                return await verbs.add_export(call)
            case m.RemoveExport():
                return await verbs.remove_export(call)
            case m.GetVersion():
                return self._version()
            case m.Reap():
                removed = reap(self._run_dir, self._registry, self._workers.groups)
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
        """Answers when all is done. The client's connection ends with the process, not before."""
        if not (call.force or self._ending.done()):
            self._registry.check_no_clients()
        self._end()
        with contextlib.suppress(OSError):  # it has left already
            os.dup(session.fileno())
        if errors := await asyncio.shield(self._ended):
            what = f"not everything was written: {'; '.join(errors)}"
            raise ResourceError(what, cure="see the supervisor's log", errno=errno.EIO)

    # upgrade

    async def _upgrade(self, session: Session, request: int) -> None:
        """Does not return: the program is replaced, and its successor answers."""
        async with self._workers.all_locked():
            if self._ending.done():
                raise ResourceError("the supervisor is stopping", cure="start another", errno=errno.ESHUTDOWN)
            await self._workers.check_reachable()
            client = os.dup(session.fileno())  # it may leave while the workers are let go
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
            if self._ending.done():  # for the next program: signals stay pending
                os.kill(os.getpid(), signal.SIGTERM)
            try:
                os.execv(sys.executable, arguments)
            except OSError as error:
                _log.critical("%s cannot be executed: %s; workers serve on", sys.executable, error)
                os._exit(ResourceError.exit_code)

    async def _finish_upgrade(self, inherited: Inherited, failed_before: frozenset[int]) -> None:
        """failed_before: devices that had no worker to replace when the upgrade began."""
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
                    await self._workers.replace(group)
                    replaced += 1
                except (OSError, ValueError) as error:
                    errors.append(f"{names}: {error}")
        self._verbs.save_all()
        try:
            if errors:
                what = f"{replaced} workers were replaced, but not those of these devices: {'; '.join(errors)}"
                cure = "a worker that could not be replaced goes on as it was: see `blkloom info`"
                await channel.send(to_failure(inherited.request, ResourceError(what, cure=cure)))
            else:
                await session.reply(inherited.request, {"workers": replaced})
        except ConnectionError as error:
            _log.warning("who asked for the upgrade has gone: %s", error)
        await running


class Ready:
    """Tells whoever started the supervisor."""

    def __init__(self, notifier: ServiceNotifier, descriptor: int | None) -> None:
        self._notifier = notifier
        self._descriptor = descriptor

    def say(self, status: str) -> None:
        """Clients are answered from now on."""
        self._notifier.ready(status)
        if self._descriptor is not None:
            with contextlib.suppress(BrokenPipeError):  # it has not waited
                os.write(self._descriptor, b"1")
            os.close(self._descriptor)
            self._descriptor = None

    def stopping(self) -> None:
        """They are not any more."""
        self._notifier.stopping()


def _take_lock(run_dir: RunDir) -> int:
    """Raises UsageError when another supervisor has it."""
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


def _control_socket(run_dir: RunDir) -> tuple[socket.socket, bool]:
    """Listening, and whether it is ours to remove."""
    passed = passed_descriptors(os.environ, pid=os.getpid())
    for variable in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)
    if passed:
        return adopt_socket(passed[0].fd), False
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
    """The supervisor's life. Raises UsageError, ListenError, OSError."""
    open_files.raise_limit()
    run_dir.make()
    ours = True
    if inherited is None:
        lock = _take_lock(run_dir)
        control, ours = _control_socket(run_dir)
    else:
        lock, control = inherited.lock, socket.socket(fileno=inherited.control)
        control.setblocking(False)
        ours = bool(inherited.ours)
        for descriptor in (inherited.lock, inherited.control, inherited.client, inherited.stored):
            os.set_inheritable(descriptor, False)
    notifier = ServiceNotifier(os.environ)
    try:
        ready = Ready(notifier, ready_fd)
        return asyncio.run(Supervisor(run_dir, limits, again, zygote).live(lock, control, ours, inherited, ready))
    finally:
        if ours:
            run_dir.control.unlink(missing_ok=True)
        control.close()
        os.close(lock)
