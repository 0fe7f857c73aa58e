"""A device on an image, maintained with an administrator's commands, and a client that stays connected and checks what
it reads.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from conformance.nbd_client import FLUSH, READ, WRITE, NbdClient
from qcow2 import qemu
from qcow2.attached import first_difference
from qcow2.shapes import Shape, make

from .conftest import Life

MIB = 1 << 20
NAME = "disk"


@dataclass
class Disk:
    """`blkloom create disk PATH`. content: what the client must read; it follows `write`, the rest is the test's."""

    blkloom: str
    life: Life
    path: Path
    content: bytearray = field(default_factory=bytearray)
    nbd: NbdClient = field(init=False)

    def __post_init__(self) -> None:
        self.content[:] = qemu.content(self.path)
        assert not self.command("create", NAME, self.path)
        self.nbd = NbdClient.unix(self.life.socket(NAME))
        assert self.nbd.size == len(self.content)
        self.verify()

    def command(self, *words: str | Path) -> str:
        """A blkloom command; what it complained of, "" when it succeeded."""
        command = [self.blkloom, "--run-dir", str(self.life.run_dir), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert bool(done.returncode) == bool(done.stderr), done
        return done.stderr

    @contextmanager
    def suspended(self) -> Iterator[Path]:
        """The image, whole and free for others."""
        assert not self.command("suspend", NAME)
        assert (checked := qemu.check(self.path)).whole, checked.said
        yield self.path
        assert not self.command("resume", NAME)

    @property
    def state(self) -> str:
        """ACTIVE or SUSPENDED."""
        with self.life.client() as client:
            return client.info(NAME)[0].state

    @property
    def size(self) -> int:
        """Bytes, as the device says."""
        with self.life.client() as client:
            return client.info(NAME)[0].size

    @property
    def status(self) -> dict[str, str]:
        """The words `name=value` of the target's status."""
        with self.life.client() as client:
            (segment,) = client.status(NAME)
        return dict(word.split("=") for word in segment[3].split() if "=" in word)

    def write(self, byte: int, at: int, length: int) -> None:
        """By the client, and flushed."""
        self._ask(WRITE, at, payload=bytes([byte]) * length)
        self._ask(FLUSH)
        self.content[at : at + length] = bytes([byte]) * length

    def read(self, offset: int, length: int) -> bytes:
        """What the client reads."""
        found = b""
        for at in range(offset, offset + length, MIB):
            reply = self.nbd.ask(READ, at, min(MIB, offset + length - at))
            assert reply.error == 0, reply.message
            found += reply.data
        return found

    def verify(self) -> None:
        """The client reads what it must."""
        found = self.read(0, len(self.content))
        assert not (difference := first_difference(found, bytes(self.content))), difference

    def end(self) -> None:
        """The client leaves, the device is removed, and QEMU finds in the image what the client read."""
        self.verify()
        self.nbd.close()
        with self.life.client() as client:
            client.remove(NAME, retry=True)
        assert (checked := qemu.check(self.path)).whole, checked.said
        assert not (difference := first_difference(qemu.content(self.path), bytes(self.content))), difference

    def _ask(self, command: int, offset: int = 0, *, payload: bytes = b"") -> None:
        reply = self.nbd.ask(command, offset, payload=payload)
        assert reply.error == 0, reply.message


@contextmanager
def disks(blkloom: str, life: Life, folder: Path, *, size: int) -> Iterator[Callable[..., Disk]]:
    """`made(shape)`: a device on an image of that shape, with data everywhere in it; its client leaves at the end."""
    with ExitStack() as stack:

        def made(shape: Shape | None = None, **below: str) -> Disk:
            path = make(folder, shape or Shape(cluster_bits=12), size=size, **below).path
            disk = Disk(blkloom, life, path)
            stack.callback(disk.nbd.close)
            return disk

        yield made
