"""Contenders that serve a FUSE file: blkloom, QEMU's storage daemon, and a null server.

fio uses each with io_uring and direct I/O, like the kernel's loop device on the same backing file. Source:
qemu-storage-daemon(1), engine/fuse-wire/examples/fuse_null_server.rs.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal

from blkloom.export.fuse.mount import clone, mount, unmount
from blkloom.export.fuse.uring import ENABLE

from ground import Ground
from jobs import Client, Job
from measuring import ClientSession
from peers import unbuilt
from servers import Server, announcing, daemonized

_ROOT: Final = Path(__file__).parents[1]
_NULL_SERVER: Final = _ROOT / "engine/target/release/examples/fuse_null_server"
_QEMU: Final = _ROOT / ".cache/qemu/qemu-storage-daemon"
_STOP_SECONDS: Final = 20.0


def driven(path: Path) -> list[str]:
    """Options of fio for a file or block device."""
    return ["--ioengine=io_uring", "--direct=1", f"--filename={path}"]


def _lack() -> str:
    return "" if os.access("/dev/fuse", os.R_OK | os.W_OK) else "/dev/fuse is missing or may not be opened"


def _lack_of_uring() -> str:
    enabled = ENABLE.exists() and ENABLE.read_text().strip() == "Y"
    return "" if enabled else f"the kernel has no FUSE over io_uring, or {ENABLE} is not Y"


@dataclass(frozen=True)
class BlkloomFuse:
    """A blkloom device as a FUSE file. descriptors: number of the connection's descriptors that are read, default one.
    uring: over io_uring.
    """

    clients: ClassVar[tuple[Client, ...]] = ("fio",)
    command: str
    family: str
    target: Literal["loop", "ram"] = "loop"
    setting: str = ""
    descriptors: int = 1
    uring: bool = False

    def missing(self) -> str:
        return unbuilt(self.command) or _lack() or (_lack_of_uring() if self.uring else "")

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ClientSession]:
        node = ground.scratch / "blkloom.node"
        python = str(Path(self.command).with_name("python"))
        program = [python, str(Path(__file__).with_name("fuse_serving.py")), str(node), str(self.descriptors)]
        program += ["uring"] * self.uring
        sectors = ground.size // 512
        table = f"0 {sectors} ram\n" if self.target == "ram" else f"0 {sectors} loop {ground.tmpfs_file()}\n"
        with announcing(program, ready="fuse", log=ground.scratch / "blkloom.log", text=table) as server:
            session = ClientSession(ground, job, driven(node), who="server", server=server)
            if self.target == "ram":
                session.fill("fio")
            yield session


@dataclass(frozen=True)
class FuseNull:
    """A FUSE file whose server moves no data: the limit of the client, the kernel's FUSE and the machine. `make bench`
    builds it. descriptors: number of the connection's descriptors, each read by a thread.
    """

    clients: ClassVar[tuple[Client, ...]] = ("fio",)
    descriptors: int = 1
    family: str = "FUSE null server"

    @property
    def setting(self) -> str:
        """As the report shows it."""
        return f"{self.descriptors} descriptors" if self.descriptors > 1 else ""

    def missing(self) -> str:
        built = "" if _NULL_SERVER.exists() else f"{_NULL_SERVER} is not built; `make bench` builds it"
        return built or _lack()

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ClientSession]:
        mounted, first = mount(ground.scratch / "null.node", source="bench")
        connection = [first, *(clone(first) for _ in range(self.descriptors - 1))]
        command = [str(_NULL_SERVER), str(ground.size), *map(str, connection)]
        with subprocess.Popen(command, pass_fds=connection) as process:
            for descriptor in connection:
                os.close(descriptor)
            try:
                where = driven(Path(mounted.path))
                yield ClientSession(ground, job, where, who="server", server=Server(process.pid))
            finally:
                unmount(mounted, lazy=True)
                try:
                    process.wait(_STOP_SECONDS)
                finally:
                    process.kill()


@dataclass(frozen=True)
class QemuFuse:
    """The FUSE export of QEMU's storage daemon, in a version that does not corrupt data (`scripts/qemu_peer.py` unpacks
    it).
    """

    clients: ClassVar[tuple[Client, ...]] = ("fio",)
    aio: Literal["threads", "io_uring"]
    family: str = "qemu-storage-daemon"

    @property
    def setting(self) -> str:
        """As the report shows it."""
        return f"aio={self.aio}"

    def missing(self) -> str:
        return _lack() if _QEMU.exists() else f"{_QEMU} is missing; `make bench` unpacks it"

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ClientSession]:
        node, pid = ground.scratch / "qemu.node", ground.scratch / "qemu.pid"
        node.touch()
        backing = f"driver=file,node-name=disk,filename={ground.tmpfs_file()},aio={self.aio}"
        export = f"type=fuse,id=export,node-name=disk,mountpoint={node},writable=on"
        command = [str(_QEMU), "--blockdev", backing, "--export", export]
        with daemonized(command, pid=pid) as server:
            yield ClientSession(ground, job, driven(node), who="server", server=server)
