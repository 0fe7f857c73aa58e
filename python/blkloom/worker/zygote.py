"""The zygote: a process that has imported all a worker needs, and forks one in milliseconds.

Run by the supervisor as `python -m blkloom.worker FD`; FD is a Unix stream socket. Lines of JSON go over it, as on
every control socket: the supervisor sends `Fork` with the worker's end of its channel, the zygote answers `Forked` with
a pidfd (taken before the process can be reaped) or `ForkRefused`, and says `Exited` when one has ended. At end of file
the zygote ends; its workers go on. It has one thread, always: a fork copies no other, and a lock another held stays
locked. SIGCHLD does nothing but wake it.

Until it has forked its first worker it does no more than that one needs. What targets import late (`Target.modules`)
it imports when the first worker is wanted for one of them. The rest of the warm-up (all targets, more rehearsals) is
done when nothing has been asked for some time: workers that follow have it at once, and share its memory.
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
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from blkloom import open_files
from blkloom.control.channel import Channel
from blkloom.control.framing import ChannelClosed
from blkloom.control.zygote_messages import Exited, Fork, Forked, ForkRefused, ToZygote
from blkloom.target.registry import BUILTIN, Targets, all_targets
from blkloom.worker.main import run
from blkloom.worker.process import become_worker
from blkloom.worker.rehearsal import rehearse

_log = logging.getLogger(__name__)
_FIRST_REHEARSALS: Final = 2
_REHEARSALS: Final = 10
_IDLE_SECONDS: Final = 0.5
"""Without a request, before the warm-up goes on."""
_LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s[%(process)d]: %(message)s"


class Zygote:
    """Serves one supervisor. targets: what tables of workers may name."""

    def __init__(self, channel: Channel, targets: Targets) -> None:
        self._channel = channel
        self._targets = targets
        self._workers: dict[int, str] = {}
        self._prepared: set[str] = set()
        self._rehearsals_left = _REHEARSALS - _FIRST_REHEARSALS

    def serve(self) -> Callable[[], int] | None:
        """Forks until the supervisor has gone: None then; in a new worker, the rest of its life."""
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
                idle = _IDLE_SECONDS * 1000 if self._rehearsals_left else None
                if not (ready := {descriptor for descriptor, _ in waiting.poll(idle)}):
                    self._warm_up()
                    signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)  # the rehearsal had its own
                    self._reap()
                if woken.fileno() in ready:
                    woken.recv(4096)
                    self._reap()
                if self._channel.fileno() in ready and (life := self._take_requests()):
                    return life
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
            if not descriptors:  # they were lost on the way, for want of free ones here
                self._channel.send(ForkRefused(worker=message.worker, errno=errno.EMFILE))
                continue
            connection = socket.socket(fileno=descriptors[0])
            if life := self._fork(message, connection):
                return life
            connection.close()

    def _warm_up(self) -> None:
        """A part of it; what is asked meanwhile waits for some milliseconds."""
        for name in BUILTIN:
            self._targets.find(name)
        rehearse(self._targets)
        self._rehearsals_left -= 1
        if not self._rehearsals_left:
            share()

    def _prepare(self, names: Sequence[str]) -> None:
        """Imports what targets of blkloom's own need; code of others runs in workers only."""
        new = [name for name in names if name in BUILTIN and name not in self._prepared]
        self._prepared.update(new)
        modules = [module for name in new for module in self._targets.find(name).modules]
        for module in modules:
            try:
                importlib.import_module(module)
            except Exception:  # a worker will say so to whom it concerns
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
            return partial(self._live, asked, connection)
        self._workers[pid] = asked.worker
        watched = os.pidfd_open(pid)
        try:
            self._channel.send(Forked(worker=asked.worker, pid=pid), [watched])
        finally:
            os.close(watched)
        return None

    def _live(self, asked: Fork, connection: socket.socket) -> int:
        """In the new process."""
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
    """Leaves what there is out of collections in workers, so that its memory stays shared."""
    gc.collect()
    gc.freeze()


def main(arguments: Sequence[str]) -> int:
    """The zygote's life, and in the processes it forks, the worker's. Returns the exit status."""
    logging.basicConfig(format=_LOG_FORMAT, stream=sys.stderr)
    channel = Channel(socket.socket(fileno=int(arguments[1])), ToZygote)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    open_files.raise_limit()
    targets = all_targets()
    for _ in range(_FIRST_REHEARSALS):
        rehearse(targets)
    gc.enable()
    share()
    life = Zygote(channel, targets).serve()
    if life is None:
        return 0
    # From here on this is a worker. What it leaves behind belongs to nobody but the kernel: no
    # exit handler of the zygote's may run.
    status = 1
    try:
        status = life()
    except BaseException:
        _log.critical("the worker failed", exc_info=True)
    finally:
        logging.shutdown()
        os._exit(status)
