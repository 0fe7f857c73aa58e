"""A service manager with a descriptor store: starts a supervisor as systemd does, and keeps what it is told to keep.

It passes the control socket and the stored descriptors (sd_listen_fds), and reads notifications (sd_notify) on an
AF_UNIX datagram socket: READY, FDSTORE, FDSTOREREMOVE. As systemd does, it closes a stored descriptor that reports an
error, and ignores one that it has already.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .conftest import STOP_TIMEOUT, Life, a_life

_START = """
import os, sys
names, descriptors, command = sys.argv[1], sys.argv[2].split(","), sys.argv[3:]
moved = [os.dup2(int(one), 1000 + at) for at, one in enumerate(descriptors)]
for at, one in enumerate(moved):
    os.dup2(one, 3 + at)
    os.close(one)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(moved)), "LISTEN_FDNAMES": names}
os.execv(command[0], command)
"""


class ServiceManager:
    """The manager of one service, whose run directory is that of a life."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.stored: list[tuple[str, int]] = []
        self._changed = threading.Condition()
        self._ready = 0
        self._control = socket.socket(socket.AF_UNIX)
        self._control.bind(str(run_dir / "control.sock"))
        self._control.listen()
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._address = str(run_dir.parent / "notify")
        self._notify.bind(self._address)
        self._end, self._ending = os.pipe()
        self._thread = threading.Thread(target=self._read, name="service manager")
        self._thread.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the supervisor with the socket and all stored descriptors; returns when it is ready."""
        with self._changed:
            passed = [("blkloom.socket", self._control.fileno()), *self.stored]
            before = self._ready
        names, descriptors = ":".join(name for name, _ in passed), [fd for _, fd in passed]
        command = [sys.executable, "-c", _START, names, ",".join(map(str, descriptors))]
        command += [sys.executable, "-m", "blkloom.supervisor", "--run-dir", str(self._run_dir), "--keep-devices"]
        environment = os.environ | {"NOTIFY_SOCKET": self._address, "BLKLOOM_TEST_RUN_DIR": str(self._run_dir)}
        with (self._run_dir.parent / "supervisor.log").open("ab") as log:
            process = subprocess.Popen(
                command, pass_fds=descriptors, env=environment, stdin=subprocess.DEVNULL, stderr=log
            )
        with self._changed:
            assert self._changed.wait_for(lambda: self._ready > before, STOP_TIMEOUT), process.poll()
        return process

    def wait_for(self, *names: str) -> None:
        """Until the names of the stored descriptors are these."""
        with self._changed:
            reached = self._changed.wait_for(lambda: sorted(self.names) == sorted(names), STOP_TIMEOUT)
            assert reached, self.names

    @property
    def names(self) -> list[str]:
        """Of the stored descriptors."""
        return [name for name, _ in self.stored]

    def close(self) -> None:
        """Ends it, with all that is stored."""
        os.close(self._ending)
        self._thread.join()
        self._forget(None)
        self._control.close()
        self._notify.close()
        os.close(self._end)

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._notify, select.POLLIN)
        poll.register(self._end, select.POLLIN)
        while True:
            with self._changed:
                watched = {fd for _, fd in self.stored}
            for fd in watched:
                poll.register(fd, 0)
            events = dict(poll.poll())
            for fd in watched:
                poll.unregister(fd)
            if self._end in events:
                return
            with self._changed:
                for fd in watched & events.keys():
                    self._close_if(lambda _name, one, fd=fd: one == fd)  # type: ignore[misc]
                if self._notify.fileno() in events:
                    self._take()
                self._changed.notify_all()

    def _take(self) -> None:
        data, fds, _, _ = socket.recv_fds(self._notify, 4096, 16)
        fields = dict(line.split("=", 1) for line in data.decode().split("\n"))
        name = fields.get("FDNAME", "stored")
        if fields.get("FDSTORE") == "1":
            self.stored += [(name, fd) for fd in fds]
            fds = []
        elif fields.get("FDSTOREREMOVE") == "1":
            self._forget(name)
        self._ready += fields.get("READY") == "1"
        for fd in fds:
            os.close(fd)

    def _forget(self, name: str | None) -> None:
        self._close_if(lambda one, _fd: name is None or one == name)

    def _close_if(self, is_meant: object) -> None:
        assert callable(is_meant)
        for stored in list(self.stored):
            if is_meant(*stored):
                self.stored.remove(stored)
                os.close(stored[1])


class Service(Life):
    """A life whose supervisor is a service of the manager."""

    manager: ServiceManager

    def start(self, *options: str) -> None:
        """Starts it, as systemd does."""
        assert not options
        self.process = self.manager.start()

    def restart(self) -> None:
        """`systemctl restart`."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(STOP_TIMEOUT) == 0
        self.start()

    def kill_all(self) -> None:
        """Kills the supervisor, then its workers; until they have ended."""
        self.kill()
        pidfds = []
        for pid in self.processes():
            try:
                pidfds.append(os.pidfd_open(pid))
            except ProcessLookupError:
                continue
            signal.pidfd_send_signal(pidfds[-1], signal.SIGKILL)
        for pidfd in pidfds:
            select.select([pidfd], [], [])
            os.close(pidfd)

    def stop(self) -> None:
        """`blkloom stop`."""
        with self.client() as client:
            client.stop(force=True)
        assert self.process.wait(STOP_TIMEOUT) == 0
        self.manager.wait_for()


@contextmanager
def a_service() -> Iterator[Service]:
    """A supervisor as a service. Afterwards: stopped cleanly, nothing left, nothing stored."""
    with a_life() as life:
        life.stop()
        service = Service(life.run_dir, life.process)
        service.manager = ServiceManager(life.run_dir)
        try:
            service.start()
            yield service
            if service.process.poll() is None:
                service.stop()
        finally:
            for pid in service.processes():
                os.kill(pid, signal.SIGKILL)
            service.manager.close()
            (life.run_dir / "control.sock").unlink()
