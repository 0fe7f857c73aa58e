"""Contenders on the run's private disk: blkloom in three I/O modes, the kernel's loop driver, and the raw disk.

A `Place` says where the data is: in the file, through a mode of blkloom's `loop` target; in the kernel's loop device on
the file; or in bare blocks of the same disk, as many as the file has. The other classes are clients of a place: the NBD
clients through `blkloom serve`, fio's io_uring engine with direct I/O, blkloom in process, plain system calls. blkloom
serves a place that is a block device as `loop DEVICE 0 1 direct_io`, so that client, protocol and server are the same
for all places. Source: fio(1), losetup(8).
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
    """The file, through one mode of blkloom's loop target; another mode is an error. In `file` mode, all of the file is
    in the page cache at the start; in the other modes, none of it.
    """

    mode: Mode

    @contextmanager
    def table(self, ground: Ground) -> Iterator[str]:
        """The table that serves the place."""
        options = {"file": "", "direct_io": " 0 1 direct_io=require", "block_map": " 0 1 block_map"}[self.mode]
        with ground.own_disk().file_at_hand(cached=self.mode == "file") as file:
            yield f"0 {ground.size // 512} loop {file}{options}\n"


@dataclass(frozen=True)
class LoopDevice:
    """The kernel's loop device on the file: buffered, with the file in the page cache at the start, or with direct
    I/O.
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
    """Blocks of the disk without a file system, as many as the file has."""

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
    """fio's io_uring engine with direct I/O on a block device, without blkloom."""

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
    """Python program with blkloom in process: one request per call at depth 1, otherwise batches of `depth` requests.

    python: the interpreter with the blkloom to measure.
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
    """Python program that calls preadv and pwritev on a block device with O_DIRECT, one after the other, without
    blkloom.
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
