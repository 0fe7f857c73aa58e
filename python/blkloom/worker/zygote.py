"""The zygote: a process that has imported everything a worker needs, and forks workers in milliseconds.

The supervisor runs it as `python -m blkloom.worker FD`; FD is a Unix stream socket with lines of JSON, like every
control socket. The supervisor sends `Fork` with the worker's end of a channel. The zygote answers with `Forked` and a
pidfd (opened before the process can be reaped), or with `ForkRefused`, and sends `Exited` when a worker has ended. At
end of file the zygote ends; its workers continue. It always has one thread: a fork copies no other thread, and a lock
that another thread holds would stay locked. SIGCHLD only wakes it.

Before the first fork it does only what the first worker needs. Modules that targets import late (`TargetSpec.modules`)
are imported when the first worker needs such a target. The rest of the warm-up (all targets, more runs of it) is done
when there was no request for some time: later workers then start faster and share that memory.
"""

from __future__ import annotations

import errno
import gc
import importlib
import logging
import os
import select
import signal
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from blkloom import open_files
from blkloom.control.channel import Channel
from blkloom.control.framing import ChannelClosed
from blkloom.control.zygote_messages import Exited, Fork, Forked, ForkRefused, ToZygote
from blkloom.device import engine_log
from blkloom.printing import LineFormatter, log_to_stderr
from blkloom.targets.registry import BUILTIN, Targets, all_targets
from blkloom.worker.main import run
from blkloom.worker.process import become_worker
from blkloom.worker.warm_up import warm_up

_log = logging.getLogger(__name__)
_FIRST_WARM_UPS: Final = 2
_WARM_UPS: Final = 10
_IDLE_SECONDS: Final = 0.5
"""Seconds without a request before the warm-up continues."""
_LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s[%(process)d]: %(message)s"


class Zygote:
    """Forks workers for one supervisor. targets: the targets for the tables of workers."""

    def __init__(self, channel: Channel, targets: Targets) -> None:
        self._channel = channel
        self._targets = targets
        self._workers: dict[int, str] = {}
        self._prepared: set[str] = set()
        self._warm_ups_left = _WARM_UPS - _FIRST_WARM_UPS

    def serve(self) -> Callable[[], int] | None:
        """Forks workers until the supervisor disconnects, then returns None. In a new worker, returns its main
        function.
        """
        waking, woken = socket.socketpair()
        for end in (waking, woken):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
        waiting = select.poll()
        for descriptor in (woken.fileno(), self._channel.fileno()):
            waiting.register(descriptor, select.POLLIN)
        try:
            while True:
                idle = _IDLE_SECONDS * 1000 if self._warm_ups_left else None
                if not (ready := {descriptor for descriptor, _ in waiting.poll(idle)}):
                    self._warm_up()
                    signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)  # the warm-up has replaced it
                    self._reap()
                if woken.fileno() in ready:
                    woken.recv(4096)
                    self._reap()
                if self._channel.fileno() in ready and (worker_main := self._take_requests()):
                    return worker_main
        except ChannelClosed:
            return None
        finally:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            waking.close()
            woken.close()

    def _take_requests(self) -> Callable[[], int] | None:
        while True:
            try:
                message, descriptors = self._channel.receive(timeout=0)
            except TimeoutError:
                return None
            if not descriptors:  # the descriptor was lost: this process had no free one
                self._channel.send(ForkRefused(worker=message.worker, errno=errno.EMFILE))
                continue
            connection = socket.socket(fileno=descriptors[0])
            if worker_main := self._fork(message, connection):
                return worker_main
            connection.close()

    def _warm_up(self) -> None:
        """Runs one part of the warm-up; a request meanwhile waits for some milliseconds."""
        for name in BUILTIN:
            self._targets.find(name)
        warm_up(self._targets)
        self._warm_ups_left -= 1
        if not self._warm_ups_left:
            share()

    def _prepare(self, names: Sequence[str]) -> None:
        """Imports the modules of built-in targets. Other targets are imported only in workers."""
        new = [name for name in names if name in BUILTIN and name not in self._prepared]
        self._prepared.update(new)
        modules = [module for name in new for module in self._targets.find(name).modules]
        for module in modules:
            try:
                importlib.import_module(module)
            except Exception:  # the worker will report the error to its client
                _log.exception("%s cannot be imported", module)
        if modules:
            share()
            if (threads := len(os.listdir("/proc/self/task"))) > 1:
                _log.error("importing %s has started threads (%d): workers are without them", modules, threads - 1)

    def _fork(self, asked: Fork, connection: socket.socket) -> Callable[[], int] | None:
        logging.getLogger().setLevel(asked.level)
        self._prepare(asked.targets)
        try:
            pid = os.fork()
        except OSError as error:
            _log.error("worker %s: no process can be had: %s", asked.worker, error)
            self._channel.send(ForkRefused(worker=asked.worker, errno=error.errno or 0))
            return None
        if pid == 0:
            return partial(self._run_worker, asked, connection)
        self._workers[pid] = asked.worker
        watched = os.pidfd_open(pid)
        try:
            self._channel.send(Forked(worker=asked.worker, pid=pid), [watched])
        finally:
            os.close(watched)
        return None

    def _run_worker(self, asked: Fork, connection: socket.socket) -> int:
        """Runs in the new process."""
        self._channel.close()
        become_worker(asked.worker)
        return run(connection, asked.worker, asked.run_dir, targets=self._targets, client_memory=asked.client_memory)

    def _reap(self) -> None:
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            if worker := self._workers.pop(pid, ""):
                self._channel.send(Exited(worker=worker, pid=pid, status=code))


def share() -> None:
    """Excludes all present objects from garbage collection (gc.freeze), so that workers share their memory."""
    gc.collect()
    gc.freeze()


def main(arguments: Sequence[str]) -> int:
    """Runs the zygote; in the forked processes, runs the worker. Returns the exit status."""
    log_to_stderr(LineFormatter(_LOG_FORMAT))
    channel = Channel(socket.socket(fileno=int(arguments[1])), ToZygote)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    open_files.raise_limit()
    targets = all_targets()
    for _ in range(_FIRST_WARM_UPS):
        warm_up(targets)
    gc.enable()
    share()
    worker_main = Zygote(channel, targets).serve()
    # Both end with _exit: no exit handler of the zygote may run in a worker, and the zygote has none.
    status = 1
    try:
        status = worker_main() if worker_main else 0
    except BaseException:
        _log.critical("the worker failed", exc_info=True)
    finally:
        engine_log.end()
        logging.shutdown()
        os._exit(status)
