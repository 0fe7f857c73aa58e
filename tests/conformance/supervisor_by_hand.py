"""The supervisor's side of the protocol with zygote and workers, driven by a test: it stores and sends, and nothing
else.

A `Zygote` is a real zygote. A `Worker` is a process forked from it, with the real channel. `Store` keeps descriptors by
label, like the supervisor, so that tests can pass them to the next worker.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from blkloom.control.channel import Channel
from blkloom.control.failures import to_exception
from blkloom.control.framing import ChannelClosed
from blkloom.control.messages import (
    MOST_DESCRIPTORS,
    DeviceChanged,
    Drop,
    Failure,
    FromWorker,
    Hello,
    Hold,
    Keep,
    Opened,
    OpenFile,
    OpenRefused,
    Reply,
    Serve,
    WorkerLoad,
    WorkerRequest,
    WorkerResume,
)
from blkloom.control.states import DeviceState, ExportState, Label, Loaded
from blkloom.control.zygote_messages import Exited, Fork, Forked, FromZygote
from blkloom.open_files import open_file

PATIENCE = 60.0
"""Seconds after which a worker is taken to hang."""


class Store:
    """Descriptors by label."""

    def __init__(self) -> None:
        self.kept: dict[Label, int] = {}

    def put(self, label: Label, fd: int) -> None:
        self.drop([label])
        self.kept[label] = fd

    def drop(self, labels: Sequence[Label]) -> None:
        for label in labels:
            if (fd := self.kept.pop(label, None)) is not None:
                os.close(fd)

    def roles(self) -> set[tuple[int, str, str]]:
        return {(label.load, label.role, label.key) for label in self.kept}

    def close(self) -> None:
        self.drop(list(self.kept))


class Worker:
    """A worker process as its supervisor sees it."""

    def __init__(self, id: str, connected: socket.socket, store: Store, pid: int = 0, pidfd: int = -1) -> None:
        self.id = id
        self.pid = pid
        self.pidfd = pidfd
        self.store = store
        self.channel = Channel(connected, FromWorker)
        self.numbers = count(1)
        self.happened: dict[int, DeviceChanged] = {}
        self.opened: list[OpenFile] = []
        self.refuse: int | None = None
        self.channel.send(Hello(pid=os.getpid()))
        greeting, _ = self.channel.receive(PATIENCE)
        assert isinstance(greeting, Hello)
        self.greeting = greeting

    def call(self, call: Any, fds: Sequence[int] = ()) -> Any:
        """The result. Raises what the worker raised."""
        number = next(self.numbers)
        self.channel.send(WorkerRequest(id=number, call=call), fds)
        while True:
            message, received = self.channel.receive(PATIENCE)
            match message:
                case Reply() if message.id == number:
                    return message.result
                case Failure() if message.id == number:
                    raise to_exception(message)
                case _:
                    self.take(message, received, number)

    def take(self, message: Any, received: list[int], request: int = 0) -> None:
        match message:
            case OpenFile():
                assert message.request == request
                self.opened.append(message)
                self._open(message)
            case Keep():
                assert len(received) == len(message.labels) <= MOST_DESCRIPTORS
                for label, fd in zip(message.labels, received, strict=True):
                    self.store.put(label, fd)
            case Drop():
                self.store.drop(message.labels)
            case DeviceChanged():
                self.happened[message.minor] = message
            case _:
                raise AssertionError(f"unexpected: {message}")

    def _open(self, wish: OpenFile) -> None:
        try:
            if self.refuse is not None:
                raise OSError(self.refuse, "")
            fd = open_file(wish.path, writable=wish.writable, direct=wish.direct, exclusive=wish.exclusive)
        except OSError as error:
            self.channel.send(OpenRefused(id=wish.id, errno=error.errno or 0))
            return
        self.channel.send(Opened(id=wish.id), [fd])
        os.close(fd)

    def until(self, minor: int, *, connections: int) -> None:
        """Waits until the device has that many clients."""
        while (said := self.happened.get(minor)) is None or said.connections != connections:
            self.take(*self.channel.receive(PATIENCE))

    # shorthands

    def create(self, minor: int, name: str, table: str, *, load: int, **kinds: bool) -> None:
        """Holds a new device, loads `table` and resumes."""
        self.call(Hold(devices=[DeviceState(name=name, minor=minor)]))
        self.call(WorkerLoad(minor=minor, loaded=Loaded(load=load, table=table, **kinds)))
        self.call(WorkerResume(minor=minor))

    def serve(self, minor: int, path: Path, id: str = "e1") -> ExportState:
        """Binds a socket, stores it and has it served."""
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        listening.listen(64)
        export = ExportState(id=id, name="x", unix=str(path))
        self.call(Serve(minor=minor, export=export), [listening.fileno()])
        self.store.put(Label(device=minor, load=0, role="listen", key=id), listening.detach())
        return export

    def hold(self, devices: Sequence[DeviceState]) -> None:
        """Gives it these devices with all that is stored of them."""
        minors = {device.minor for device in devices}
        kept = [(label, fd) for label, fd in self.store.kept.items() if label.device in minors]
        pieces = [kept[at : at + MOST_DESCRIPTORS] for at in range(0, len(kept), MOST_DESCRIPTORS)] or [[]]
        for piece in pieces:
            labels, fds = [label for label, _ in piece], [fd for _, fd in piece]
            self.call(Hold(devices=list(devices), labels=labels, more=piece is not pieces[-1]), fds)

    def kill(self) -> None:
        """Ends it as a crash would, and waits for the end."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        """Waits until the process has ended."""
        ended = select.poll()
        ended.register(self.pidfd, select.POLLIN)
        assert ended.poll(PATIENCE * 1000), "the worker does not end"
        while True:
            try:
                self.take(*self.channel.receive(PATIENCE))
            except ChannelClosed:
                break
        self.close()

    def close(self) -> None:
        self.channel.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class Zygote:
    """A real zygote, and what it said of workers that ended."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        (run_dir / "workers").mkdir(parents=True, exist_ok=True)
        (run_dir / "dev").mkdir(exist_ok=True)
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "blkloom.worker", str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        self.channel = Channel(ours, FromZygote)
        self.exited: dict[str, int] = {}

    def fork(self, id: str, store: Store) -> Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            self.channel.send(Fork(worker=id, run_dir=str(self.run_dir), client_memory=64 << 20), [theirs.fileno()])
        while True:
            message, received = self.channel.receive(PATIENCE)
            if isinstance(message, Exited):
                self.exited[message.worker] = message.status
                continue
            assert isinstance(message, Forked)
            assert message.worker == id
            return Worker(id, ours, store, message.pid, received[0])

    def status(self, id: str) -> int:
        """How the worker ended, as soon as the zygote has said it."""
        while id not in self.exited:
            message, _ = self.channel.receive(PATIENCE)
            assert isinstance(message, Exited)
            self.exited[message.worker] = message.status
        return self.exited[id]

    def close(self) -> None:
        """Ends it; its workers live on."""
        self.channel.close()
        assert self.process.wait(PATIENCE) == 0


@contextmanager
def zygote(run_dir: Path) -> Iterator[Zygote]:
    """A zygote that ends with the block."""
    started = Zygote(run_dir)
    try:
        yield started
    finally:
        started.close()
