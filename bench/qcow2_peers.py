"""Contenders for QCOW2 images: blkloom, and qemu-nbd with the settings that may be its best.

This module does not choose the best setting of qemu-nbd: several are measured, and the report uses the best one. They
are the settings that were within a tenth of the best one in an earlier run with all five. `--aio=native` needs
`--cache=none`. The larger L2 cache matters only if the metadata does not fit the default one, and is measured only
there. Source: qemu-nbd(8), qcow2's runtime options in qemu(1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Final, Literal

from ground import Ground
from jobs import Client, Job
from measuring import NBD_CLIENTS, ClientSession, Contender, Session
from peers import ProgramSession, need, socket_of, unbuilt
from qcow2_images import Qcow2Image
from reserve import reserve
from results import Sample
from servers import Server, activated, announcing

_SLACK: Final = 4  # connections beyond the job's, for those that have not quite ended
_OPENING: Final = Path(__file__).with_name("qcow2_opening.py")
_QEMU: Final = "qemu-nbd"
_COPIED_BLOCK: Final = 64 << 10
"""From here on copying it twice, through the page cache, costs more than it saves."""
_LARGE_BLOCK: Final = 1 << 20
_Aio = Literal["native", "threads", "io_uring"]
_Cache = Literal["none", "writeback"]
_Way = tuple[_Aio, _Cache]


class _Session(ClientSession):
    """Session measured with a load generator. weighed: every sample also has the server's memory, in bytes."""

    def __init__(self, ground: Ground, job: Job, *, server: Server, weighed: bool) -> None:
        super().__init__(ground, job, socket_of(_socket(ground)), who="server", server=server)
        self._process, self._weighed = server, weighed

    def measure(self, seconds: float, client: Client) -> Sample:
        found = super().measure(seconds, client)
        if not self._weighed:
            return found
        return replace(found, extra={**found.extra, "memory": self._process.status("VmRSS") * 1024.0})


class _Filling:
    """Session in which every measurement overwrites a new image once, so that clusters are allocated until its end. The
    requested number of seconds is ignored.
    """

    def __init__(
        self, image: Qcow2Image, ground: Ground, serve: Callable[[Path], AbstractContextManager[_Session]]
    ) -> None:
        self._image, self._ground, self._serve = image, ground, serve

    def warm_up(self, seconds: float, client: Client, *, again: bool) -> Sample | None:
        """Nothing is to be warmed up; the first round counts."""
        return None if again else self._sample(client, counting_too=True)

    def measure(self, seconds: float, client: Client) -> Sample:
        return self._sample(client)

    def _sample(self, client: Client, *, counting_too: bool = False) -> Sample:
        with self._image.made(self._ground) as path:
            if not self._image.on_disk:
                reserve(path, self._ground.size)
            with self._serve(path) as session:
                return session.once(client, counting_too=counting_too)


@dataclass(frozen=True)
class BlkloomQcow2:
    """`blkloom serve IMAGE` with default settings, or with direct I/O. anew: measured while it fills an image. weighed:
    its memory is measured, too.
    """

    clients: ClassVar[tuple[Client, ...]] = NBD_CLIENTS
    command: str
    family: str
    image: Qcow2Image
    anew: bool = False
    weighed: bool = False
    direct: bool = False

    @property
    def setting(self) -> str:
        return "--direct-io" if self.direct else ""

    def missing(self) -> str:
        return need("qemu-img", "qemu-utils") or unbuilt(self.command)

    def session(self, ground: Ground, job: Job) -> AbstractContextManager[Session]:
        return _session(self._up, self.image, ground, job, anew=self.anew, weighed=self.weighed)

    @contextmanager
    def _up(self, path: Path, ground: Ground, job: Job) -> Iterator[Server]:
        way = ["--direct-io"] if self.direct else []
        command = [self.command, "serve", *way, "--socket", str(_socket(ground)), str(path)]
        with announcing(command, ready="nbd", log=ground.scratch / "blkloom.log") as server:
            yield server


@dataclass(frozen=True)
class QemuNbdQcow2:
    """qemu-nbd with a persistent Unix socket. l2_cache: bytes, 0 for its default."""

    clients: ClassVar[tuple[Client, ...]] = NBD_CLIENTS
    aio: _Aio
    cache: _Cache
    image: Qcow2Image
    anew: bool = False
    l2_cache: int = 0
    weighed: bool = False
    family: str = _QEMU

    @property
    def setting(self) -> str:
        larger = f" l2-cache-size={self.l2_cache >> 20}M" if self.l2_cache else ""
        return f"--aio={self.aio} --cache={self.cache}{larger}"

    def missing(self) -> str:
        return need("qemu-nbd", "qemu-utils") or need("qemu-img", "qemu-utils")

    def session(self, ground: Ground, job: Job) -> AbstractContextManager[Session]:
        return _session(self._up, self.image, ground, job, anew=self.anew, weighed=self.weighed)

    @contextmanager
    def _up(self, path: Path, ground: Ground, job: Job) -> Iterator[Server]:
        words = f"driver=qcow2,file.driver=file,file.filename={path}"
        if self.l2_cache:
            words += f",l2-cache-size={self.l2_cache}"
        command = ["qemu-nbd", "-t", "-e", str(job.connections + _SLACK), f"--aio={self.aio}", f"--cache={self.cache}"]
        command += ["--image-opts", words]
        with activated(command, path=_socket(ground), log=ground.scratch / "qemu-nbd.log") as server:
            yield server


@dataclass(frozen=True)
class OpenedQcow2:
    """Python program that opens the image and reads a byte; the figure is the time for this."""

    clients: ClassVar[tuple[Client, ...]] = ("",)
    python: str
    family: str
    image: Qcow2Image
    setting: str = "in process"

    def missing(self) -> str:
        return need("qemu-img", "qemu-utils") or unbuilt(self.python)

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ProgramSession]:
        sized = self.image.sized(ground)
        with self.image.made(sized) as path:
            command = [self.python, str(_OPENING), str(path)]
            with ProgramSession.started(command, seconds_wanted=True) as session:
                yield session


_SMALL: Final[tuple[_Way, ...]] = (("native", "none"), ("io_uring", "writeback"))
_LARGE: Final[tuple[_Way, ...]] = (("threads", "none"), ("io_uring", "writeback"))
_BY_FAR: Final[tuple[_Way, ...]] = (("native", "none"),)
_COMPRESSED: Final[tuple[_Way, ...]] = (("io_uring", "writeback"),)
_ON_DISK_SMALL: Final[tuple[_Way, ...]] = (("io_uring", "writeback"), ("threads", "writeback"))
_ON_DISK_LARGE: Final[tuple[_Way, ...]] = (("io_uring", "none"), ("threads", "none"))


def qemu_nbd(
    image: Qcow2Image, block: int, *, anew: bool = False, l2_cache: int = 0, weighed: bool = False
) -> tuple[Contender, ...]:
    """The settings that may be qemu-nbd's best for requests of `block` bytes. l2_cache: size of the larger cache, if it
    is needed.
    """
    if image.on_disk:
        ways = _ON_DISK_SMALL if block < _COPIED_BLOCK else _ON_DISK_LARGE
    elif image.compression:
        ways = _COMPRESSED
    elif block >= _LARGE_BLOCK:
        ways = _LARGE
    else:
        ways = _SMALL if image.filled else _BY_FAR
    return tuple(QemuNbdQcow2(*way, image, anew, l2_cache, weighed) for way in ways)


@contextmanager
def _session(
    up: Callable[[Path, Ground, Job], AbstractContextManager[Server]],
    image: Qcow2Image,
    ground: Ground,
    job: Job,
    *,
    anew: bool,
    weighed: bool,
) -> Iterator[Session]:
    sized = image.sized(ground)

    @contextmanager
    def serve(path: Path) -> Iterator[_Session]:
        with up(path, ground, job) as server:
            yield _Session(sized, job, server=server, weighed=weighed)

    if anew:
        yield _Filling(image, sized, serve)
    else:
        with image.made(sized) as path, serve(path) as session:
            yield session


def _socket(ground: Ground) -> Path:
    return ground.scratch / "qcow2.sock"
