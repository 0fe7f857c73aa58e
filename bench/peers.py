"""The contenders: blkloom and its peers, each with the settings that may be its best.

One class for each kind of server. All serve the same backing: `Ground.size` bytes of the same file (or memory of that
size, written once before the measurement). This module does not choose the best setting of a peer: it has all settings
that were the best in any run, and the report uses the best one. Source: qemu-nbd(8), nbdkit(1), nbdkit-file-plugin(1),
nbdkit-memory-plugin(1), losetup(8), fio(1).
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal, Self
from urllib.parse import quote

import kernel_loop
from ground import Ground
from idle import idle_connections
from jobs import Client, Job, JobError, Outcome
from measuring import NBD_CLIENTS, ClientSession, Meter, counts_of
from results import Sample
from servers import Server, activated, announcing
from tables import table_text

_NULL_SERVER: Final = Path(__file__).parents[1] / "engine/target/release/examples/null_server"
_SLACK = 4  # connections beyond the job's, for those that have not quite ended


def need(program: str, package: str) -> str:
    """The message if the program is not installed; "" if it is."""
    return "" if shutil.which(program) else f"{program} is not installed (Debian: apt install {package})"


def unbuilt(program: str) -> str:
    """The message if a program of blkloom is not built; "" if it is."""
    return "" if shutil.which(program) else f"{program} does not exist; `make setup` makes it, --blkloom names another"


def socket_of(path: Path, export: str = "") -> list[str]:
    """Options of fio for an NBD server at that socket."""
    return ["--ioengine=nbd", f"--uri=nbd+unix:///{quote(export)}?socket={quote(str(path))}"]


@dataclass(frozen=True)
class Blkloom:
    """`blkloom serve` with default settings. segments: lines of the table over the backing file. idle: number of idle
    connections. on_disk: the file on the disk; direct: with direct I/O on it. stacked: number of linear devices stacked
    on each other and on the first one. segment: target and arguments of the only segment, over the file `{path}`.
    """

    clients: ClassVar[tuple[Client, ...]] = NBD_CLIENTS
    command: str
    family: str
    target: Literal["loop", "ram"] = "loop"
    setting: str = ""
    on_disk: bool = False
    direct: bool = False
    segments: int = 1
    idle: int = 0
    stacked: int = 0
    segment: str = ""

    def missing(self) -> str:
        return unbuilt(self.command)

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ClientSession]:
        socket = ground.scratch / "blkloom.sock"
        connections = str(max(1024, self.idle + job.connections + _SLACK))
        command = [self.command, "serve", "--table", "-", "--socket", str(socket), "--max-connections", connections]
        below = [self._table(ground), *(f"0 {ground.size // 512} linear blkloom:d{n} 0" for n in range(self.stacked))]
        if self.stacked:
            command[2:4] = [word for n, table in enumerate(below) for word in ("--device", f"d{n}={table}")]
        export = f"d{self.stacked}" if self.stacked else ""
        with ExitStack() as stack:
            log = ground.scratch / "blkloom.log"
            server = stack.enter_context(announcing(command, ready="nbd", log=log, text=self._table(ground)))
            extra = {}
            if self.idle:
                before = server.status("VmRSS")
                stack.enter_context(idle_connections(socket, self.idle))
                extra = {
                    "memory_before": before * 1024.0,
                    "memory_idle": server.status("VmRSS") * 1024.0,
                    "idle_connections": float(self.idle),
                    "threads": float(server.status("Threads")),
                }
            session = ClientSession(ground, job, socket_of(socket, export), who="server", server=server, extra=extra)
            if self.target == "ram":
                session.fill()
            yield session

    def _table(self, ground: Ground) -> str:
        if self.target == "ram":
            return f"0 {ground.size // 512} ram\n"
        if self.segment:
            return f"0 {ground.size // 512} {self.segment.format(path=ground.tmpfs_file())}\n"
        if self.on_disk or self.direct:
            return f"0 {ground.size // 512} loop {ground.disk_file()}{' 0 1 direct_io' if self.direct else ''}\n"
        return table_text(ground.tmpfs_file(), ground.size, self.segments)


@dataclass(frozen=True)
class QemuNbd:
    """qemu-nbd on the raw file; it allows as many clients as there are connections."""

    clients: ClassVar[tuple[Client, ...]] = NBD_CLIENTS
    aio: Literal["threads", "io_uring"]
    on_disk: bool = False
    family: str = "qemu-nbd"

    @property
    def setting(self) -> str:
        return f"--aio={self.aio} --cache=writeback"

    def missing(self) -> str:
        return need("qemu-nbd", "qemu-utils")

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ClientSession]:
        socket = ground.scratch / "qemu-nbd.sock"
        command = ["qemu-nbd", "-t", "-f", "raw"]
        command += ["-e", str(job.connections + _SLACK), f"--aio={self.aio}", "--cache=writeback"]
        command += [str(ground.disk_file() if self.on_disk else ground.tmpfs_file())]
        with activated(command, path=socket, log=ground.scratch / "qemu-nbd.log") as server:
            yield ClientSession(ground, job, socket_of(socket), who="server", server=server)


@dataclass(frozen=True)
class Nbdkit:
    """nbdkit's file or memory plugin. threads: requests served at the same time on a connection."""

    clients: ClassVar[tuple[Client, ...]] = NBD_CLIENTS
    plugin: Literal["file", "memory"]
    threads: int
    allocator: Literal["sparse", "malloc"] = "sparse"
    on_disk: bool = False

    @property
    def family(self) -> str:
        return f"nbdkit {self.plugin}"

    @property
    def setting(self) -> str:
        return f"-t {self.threads}" + (f" allocator={self.allocator}" if self.plugin == "memory" else "")

    def missing(self) -> str:
        if lack := need("nbdkit", "nbdkit"):
            return lack
        known = subprocess.run(["nbdkit", "--dump-plugin", self.plugin], capture_output=True, check=False)
        return "" if known.returncode == 0 else f"nbdkit has no plugin {self.plugin}"

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ClientSession]:
        socket = ground.scratch / "nbdkit.sock"
        command = ["nbdkit", "-t", str(self.threads), self.plugin]
        if self.plugin == "file":
            command += [str(ground.disk_file() if self.on_disk else ground.tmpfs_file())]
        else:
            command += [str(ground.size), f"allocator={self.allocator}"]
        with activated(command, path=socket, log=ground.scratch / "nbdkit.log") as server:
            session = ClientSession(ground, job, socket_of(socket), who="server", server=server)
            if self.plugin == "memory":
                session.fill()
            yield session


@dataclass(frozen=True)
class NullServer:
    """NBD server without data (engine/core/examples/null_server.rs): the limit of client, socket and machine. `make
    bench` builds it. moves: the same server moves the data of the file on tmpfs or of memory, with one call or copy per
    request: the limit for a disk of that kind.
    """

    clients: ClassVar[tuple[Client, ...]] = NBD_CLIENTS
    moves: Literal["", "file", "memory"] = ""
    setting: str = ""

    @property
    def family(self) -> str:
        return {"": "null server", "file": "bare pread and pwrite", "memory": "bare memcpy"}[self.moves]

    def missing(self) -> str:
        return "" if _NULL_SERVER.exists() else f"{_NULL_SERVER} is not built; `make bench` builds it"

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ClientSession]:
        socket = ground.scratch / "null.sock"
        behind = {"": [], "file": [str(ground.tmpfs_file())], "memory": ["memory"]}[self.moves]
        command = [str(_NULL_SERVER), str(ground.size), *behind]
        log = ground.scratch / "null.log"
        with activated(command, path=socket, log=log, status=-signal.SIGTERM) as server:
            yield ClientSession(ground, job, socket_of(socket), who="server", server=server)


@dataclass(frozen=True)
class KernelLoop:
    """The kernel's loop device on the file, used with direct I/O by one of fio's engines."""

    clients: ClassVar[tuple[Client, ...]] = ("fio",)
    direct: bool
    family: str = "/dev/loop"
    engine: Literal["libaio", "io_uring"] = "libaio"

    @property
    def setting(self) -> str:
        return f"--direct-io={'on' if self.direct else 'off'}"

    def missing(self) -> str:
        return kernel_loop.lack()

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ClientSession]:
        with kernel_loop.attached(ground.tmpfs_file(), direct=self.direct) as device:
            where = [f"--ioengine={self.engine}", "--direct=1", f"--filename={device}"]
            yield ClientSession(ground, job, where, who="kernel")


@dataclass(frozen=True)
class FioOnFile:
    """fio's io_uring engine on the file on the disk, with direct I/O or through the page cache, without a server."""

    clients: ClassVar[tuple[Client, ...]] = ("fio",)
    family: str = "fio io_uring on the file"
    direct: bool = True

    @property
    def setting(self) -> str:
        return f"--direct={self.direct:d}"

    def missing(self) -> str:
        return ""

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ClientSession]:
        where = ["--ioengine=io_uring", self.setting, f"--filename={ground.disk_file()}"]
        yield ClientSession(ground, job, where, who="none")


@dataclass(frozen=True)
class InProcess:
    """Python program that does the I/O itself (inprocess.py); it counts as the server.

    python: the interpreter with the blkloom to measure.
    """

    clients: ClassVar[tuple[Client, ...]] = ("",)
    python: str
    side: Literal["preadv", "ram", "map", "delayed"]
    family: str
    number: int = 1
    setting: str = ""

    def missing(self) -> str:
        return unbuilt(self.python)

    @contextmanager
    def session(self, ground: Ground, job: Job) -> Iterator[ProgramSession]:
        subject = "-" if self.side in ("ram", "delayed") else str(ground.tmpfs_file())
        program = [self.python, str(Path(__file__).with_name("inprocess.py"))]
        command = [*program, self.side, subject, str(ground.size), str(self.number)]
        with ProgramSession.started(command, seconds_wanted=self.side in ("map", "delayed")) as session:
            yield session


class ProgramSession:
    """Session with a program of `inprocess.py`, which reads one request per line. seconds_wanted: the figure is the
    time, not the rate.
    """

    def __init__(self, process: subprocess.Popen[str], *, seconds_wanted: bool) -> None:
        self._process, self._seconds_wanted = process, seconds_wanted
        self._server = Server(process.pid)

    @classmethod
    @contextmanager
    def started(cls, command: list[str], *, seconds_wanted: bool = False) -> Iterator[Self]:
        """Ready, and ended afterwards. Raises JobError with its last words."""
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        with process:
            session = cls(process, seconds_wanted=seconds_wanted)
            if session._read() != "ready":
                raise JobError("the in-process program does not say it is ready")
            yield session

    def warm_up(self, seconds: float, client: Client, *, again: bool) -> Sample | None:
        return self._sample(seconds, counting_too=True)

    def measure(self, seconds: float, client: Client) -> Sample:
        return self._sample(seconds)

    def _sample(self, seconds: float, *, counting_too: bool = False) -> Sample:
        assert self._process.stdin
        meter = Meter(self._server, "server")
        with counts_of(self._server if counting_too else None) as counts:
            self._process.stdin.write(f"{seconds}\n")
            self._process.stdin.flush()
            answer = json.loads(self._read())
        outcome = Outcome(int(answer["operations"]), answer["seconds"], errors=0, p50_us=0, p99_us=0)
        return meter.sample(outcome, value=outcome.seconds if self._seconds_wanted else None, counts=counts)

    def _read(self) -> str:
        assert self._process.stdout
        if line := self._process.stdout.readline().strip():
            return line
        assert self._process.stderr
        raise JobError(f"the in-process program ended: {self._process.stderr.read()[-400:].strip()}")
