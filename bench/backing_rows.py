"""The rows of NBD servers as backing: the target `nbd`, nbdkit's plugin and QEMU's driver over the same source, and the
source alone. The source is memory of another `blkloom serve`, or a file that answers after 1 ms.

Source: nbdkit-nbd-plugin(1), qemu-nbd(8).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Final, Literal
from urllib.parse import quote

from ground import Ground
from jobs import Client, Job, Pattern
from measuring import ClientSession, Workload
from peers import need, socket_of, unbuilt
from results import Goal
from servers import activated, announcing

_OURS: Final = "blkloom nbd"
_NBDKIT: Final = "nbdkit nbd"
_QEMU: Final = "qemu-nbd nbd"


@dataclass(frozen=True)
class OverSource:
    """A server over a source, which is another `blkloom serve` with one segment, or the source alone. segment: target
    and arguments of the source, over the file `{path}`.
    """

    clients: ClassVar[tuple[Client, ...]] = ("nbd_load",)
    setting: ClassVar[str] = ""
    command: str
    family: str
    over: Literal["blkloom", "nbdkit", "qemu-nbd", "nothing"]
    segment: str

    def missing(self) -> str:
        lack = unbuilt(self.command)
        if self.over in ("nbdkit", "qemu-nbd"):
            lack = lack or need(self.over, "nbdkit" if self.over == "nbdkit" else "qemu-utils")
        return lack

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ClientSession]:
        source, socket = ground.scratch / "source.sock", ground.scratch / "over.sock"
        uri = f"nbd+unix:///?socket={quote(str(source))}"
        serve = [self.command, "serve", "--table", "-", "--max-connections", "1024", "--socket"]
        sectors = ground.size // 512
        table = f"0 {sectors} {self.segment.format(path=ground.tmpfs_file())}\n"
        log = ground.scratch / "over.log"
        with announcing([*serve, str(source)], ready="nbd", log=ground.scratch / "source.log", text=table) as alone:
            if self.segment == "ram":
                ClientSession(ground, job, socket_of(source), who="server", server=alone).fill()
            if self.over == "nothing":
                yield ClientSession(ground, job, socket_of(source), who="server", server=alone)
                return
            if self.over == "blkloom":
                text = f"0 {sectors} nbd {uri}\n"
                with announcing([*serve, str(socket)], ready="nbd", log=log, text=text) as server:
                    yield ClientSession(ground, job, socket_of(socket), who="server", server=server)
                return
            command = ["nbdkit", "-f", "nbd", f"uri={uri}", "shared=1"]
            if self.over == "qemu-nbd":
                command = ["qemu-nbd", "-t", "-f", "raw", "-e", str(job.connections + 4), uri]
            with activated(command, path=socket, log=log) as server:
                yield ClientSession(ground, job, socket_of(socket), who="server", server=server)


def backing_workloads(blkloom: str) -> list[Workload]:
    """The workloads. blkloom: the command to measure."""
    patterns: tuple[Pattern, ...] = ("randread", "randwrite")
    local = [_row(blkloom, pattern, ahead=2.0) for pattern in patterns]
    return [*local, *(_row(blkloom, pattern, delayed=True) for pattern in patterns)]


def _row(blkloom: str, pattern: Pattern, *, ahead: float | None = None, delayed: bool = False) -> Workload:
    segment = "delay {path} 0 1" if delayed else "ram"
    bare = "the source alone"
    servers: tuple[tuple[str, Literal["blkloom", "nbdkit", "qemu-nbd", "nothing"]], ...] = (
        (_OURS, "blkloom"),
        (_NBDKIT, "nbdkit"),
        (_QEMU, "qemu-nbd"),
        (bare, "nothing"),
    )
    return Workload(
        f"backing-{pattern}-4k-q32{'-1ms' * delayed}",
        f"4K {pattern}, qd 32{', a source with 1 ms latency' * delayed}",
        Job(pattern, 4096, depth=32),
        tuple(OverSource(blkloom, family, over, segment) for family, over in servers),
        (
            Goal(_OURS, _NBDKIT, ahead, floor=bare),
            Goal(_OURS, _QEMU, ahead, floor=bare),
            Goal(_OURS, bare, 0.95 if delayed else None, floor=bare),
        ),
        "backing",
    )
