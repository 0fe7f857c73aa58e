"""The contenders on the run's own disk: a file on it three ways, the kernel's loop driver, bare blocks.

A `Place` is what is driven: the file as blkloom's `loop` target takes it, the kernel's loop device over
it, or as many bare blocks of the same disk. A class here is a client that drives it: the NBD clients
through `blkloom serve`, fio's io_uring engine with direct I/O, blkloom in process, plain system calls.
A place that is a block device is served by blkloom as `loop DEVICE 0 1 direct_io`, so that the
client, the protocol and the server are the same for all places and only what is behind differs.
Source: fio(1), losetup(8).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal

import kernel_loop
import own_disk
from ground import Ground
from jobs import Client, Job
from measuring import NBD_CLIENTS, ClientSession
from peers import ProgramSession, socket_of, unbuilt
from servers import announcing

Mode = Literal["file", "direct_io", "block_map"]


@dataclass(frozen=True)
class FileMode:
    """The file, by blkloom's own target in one of its modes, or it is an error. In `file` mode the file
    is in the page cache to begin with, in the others nothing of it.
    """

    mode: Mode

    @contextmanager
    def table(self, ground: Ground) -> Iterator[str]:
        """The table that serves it."""
        options = {"file": "", "direct_io": " 0 1 direct_io=require", "block_map": " 0 1 block_map"}[self.mode]
        with ground.own_disk().file_at_hand(cached=self.mode == "file") as file:
            yield f"0 {ground.size // 512} loop {file}{options}\n"


@dataclass(frozen=True)
class LoopDevice:
    """The kernel's loop device over the file: buffered, over a file that is in the page cache to begin
    with, or with direct I/O.
    """

    direct: bool

    @contextmanager
    def device(self, ground: Ground) -> Iterator[Path]:
        with (
            ground.own_disk().file_at_hand(cached=not self.direct) as file,
            kernel_loop.attached(file, direct=self.direct) as device,
        ):
            yield device

    def table(self, ground: Ground) -> AbstractContextManager[str]:
        return _table_over(self, ground)


@dataclass(frozen=True)
class BareBlocks:
    """As many blocks of the disk as the file has, with no file system."""

    @contextmanager
    def device(self, ground: Ground) -> Iterator[Path]:
        yield ground.own_disk().raw

    def table(self, ground: Ground) -> AbstractContextManager[str]:
        return _table_over(self, ground)


BlockDevice = LoopDevice | BareBlocks
Place = FileMode | BlockDevice


@contextmanager
def _table_over(place: BlockDevice, ground: Ground) -> Iterator[str]:
    with place.device(ground) as device:
        yield f"0 {ground.size // 512} loop {device} 0 1 direct_io\n"


_PROGRAM: Final = Path(__file__).with_name("inprocess.py")


@dataclass(frozen=True)
class Served:
    """The NBD clients against `blkloom serve`."""

    clients: ClassVar[tuple[Client, ...]] = NBD_CLIENTS
    command: str
    family: str
    place: Place
    setting: str = "over NBD"

    def missing(self) -> str:
        return own_disk.lack() or unbuilt(self.command)

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ClientSession]:
        socket, log = ground.scratch / "blkloom.sock", ground.scratch / "blkloom.log"
        command = [self.command, "serve", "--table", "-", "--socket", str(socket)]
        with self.place.table(ground) as text, announcing(command, ready="nbd", log=log, text=text) as server:
            yield ClientSession(ground, job, socket_of(socket), who="server", server=server)


@dataclass(frozen=True)
class Driven:
    """fio's io_uring engine with direct I/O on a block device; no blkloom."""

    clients: ClassVar[tuple[Client, ...]] = ("fio",)
    family: str
    place: BlockDevice
    setting: str = "fio io_uring, direct=1"

    def missing(self) -> str:
        return own_disk.lack()

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ClientSession]:
        with self.place.device(ground) as device:
            where = ["--ioengine=io_uring", "--direct=1", f"--filename={device}"]
            yield ClientSession(ground, job, where, who="kernel")


@dataclass(frozen=True)
class Opened:
    """A Python program with blkloom in process: a request a call at depth 1, else batches of as many
    requests as the job is deep.

    python: the interpreter that has the blkloom to measure.
    """

    clients: ClassVar[tuple[Client, ...]] = ("",)
    python: str
    family: str
    place: Place
    setting: str = "in process"

    def missing(self) -> str:
        return own_disk.lack() or unbuilt(self.python)

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ProgramSession]:
        with self.place.table(ground) as text, _program(self.python, "table", text, ground, job) as session:
            yield session


@dataclass(frozen=True)
class Called:
    """A Python program that calls preadv and pwritev on a block device with O_DIRECT, one after the other;
    no blkloom.
    """

    clients: ClassVar[tuple[Client, ...]] = ("",)
    python: str
    family: str
    place: BlockDevice
    setting: str = "os.preadv, os.pwritev"

    def missing(self) -> str:
        return own_disk.lack() or unbuilt(self.python)

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ProgramSession]:
        with (
            self.place.device(ground) as device,
            _program(self.python, "calls", str(device), ground, job) as session,
        ):
            yield session


@contextmanager
def _program(python: str, side: str, subject: str, ground: Ground, job: Job) -> Iterator[ProgramSession]:
    command = [python, str(_PROGRAM), side, subject, str(ground.size), str(job.depth), job.pattern]
    with ProgramSession.started(command) as session:
        yield session
