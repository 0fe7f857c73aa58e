"""Contenders that serve the disk of a virtual machine over vhost-user: blkloom, and QEMU's storage daemon with the
settings that may be its best. The client is a driver, `engine/core/examples/vhost_user_load.rs`. Source:
qemu-storage-daemon(1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from ground import Ground
from jobs import Client, Job
from measuring import ClientSession
from peers import need, unbuilt
from qcow2_images import Qcow2Image
from servers import announcing, daemonized

_QEMU: Final = Path(__file__).parents[1] / ".cache/qemu/qemu-storage-daemon"
_IMAGES: Final = {"raw": Qcow2Image(filled=True, raw=True), "qcow2": Qcow2Image(filled=True)}
"""Each session has one of its own: memory that was written long ago may be slower in a virtual machine."""


@dataclass(frozen=True)
class _OverVhostUser:
    """disk: a raw or QCOW2 image on tmpfs that is full of data, or nothing: reads give zeros, writes do nothing.
    polling: the client looks at the rings all the time, and sleeps never.
    """

    family: str
    disk: Literal["raw", "qcow2", "zero"] = "raw"
    polling: bool = False

    @property
    def clients(self) -> tuple[Client, ...]:
        return ("vhost_user_load --poll" if self.polling else "vhost_user_load",)

    @contextmanager
    def _path(self, ground: Ground) -> Iterator[Path]:
        with _IMAGES[self.disk].made(ground) if self.disk in _IMAGES else nullcontext(Path()) as path:
            yield path


@dataclass(frozen=True)
class BlkloomVhostUser(_OverVhostUser):
    """`blkloom serve --vhost-user` with default settings. command: the one to measure."""

    command: str = ""
    setting: str = ""

    def missing(self) -> str:
        return unbuilt(self.command) or need("qemu-img", "qemu-utils")

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ClientSession]:
        socket = ground.scratch / "blkloom.sock"
        with self._path(ground) as path:
            table = ["--table", f"0 {ground.size // 512} zero"] if self.disk == "zero" else [str(path)]
            command = [self.command, "serve", *table, "--vhost-user", str(socket)]
            with announcing(command, ready=str(socket), log=ground.scratch / "blkloom.log") as server:
                yield ClientSession(ground, job, [str(socket)], who="server", server=server)


@dataclass(frozen=True)
class QemuVhostUser(_OverVhostUser):
    """The vhost-user-blk export of QEMU's storage daemon, which `scripts/qemu_peer.py` unpacks. It serves in a thread
    of its own and has one queue for each connection of the job.
    """

    aio: Literal["threads", "native", "io_uring"] = "threads"

    @property
    def setting(self) -> str:
        """As the report shows it."""
        return f"aio={self.aio}"

    def missing(self) -> str:
        return "" if _QEMU.exists() else f"{_QEMU} is missing; `make bench` unpacks it"

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ClientSession]:
        socket, pid = ground.scratch / "qemu.sock", ground.scratch / "qemu.pid"
        with self._path(ground) as path:
            direct = ",cache.direct=on" if self.aio == "native" else ""
            options = ["--object", "iothread,id=thread"]
            options += ["--blockdev", f"driver=file,node-name=file,filename={path},aio={self.aio}{direct}"]
            if self.disk == "qcow2":
                options += ["--blockdev", "driver=qcow2,node-name=image,file=file"]
            node = "image" if self.disk == "qcow2" else "file"
            export = f"type=vhost-user-blk,id=export,node-name={node},iothread=thread,writable=on"
            options += ["--export", f"{export},num-queues={job.connections},addr.type=unix,addr.path={socket}"]
            with daemonized([str(_QEMU), *options], pid=pid) as server:
                yield ClientSession(ground, job, [str(socket)], who="server", server=server)
