"""Access paths to a device, with the same methods for each; a failed request raises OSError.

Over NBD, errnos are NBD's: `errnos` maps the errnos of the device to those of the access path. Reads and writes may be
split into pieces that are sent together (a batch, coroutines, a pipeline); the pieces must not overlap.
"""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from blkloom import Device
from blkloom.testing import NbdThread
from fuse_served import FuseServed
from long_runs import LONG
from rust_driver import RustDriver
from vhost_user_driver import Machine
from vhost_user_served import VhostUserServed

from . import nbd_client as nbd
from .fuse_way import FuseWay
from .vhost_user_way import VhostUserWay

T = TypeVar("T")
Extents = list[tuple[int, int, int]]


class WayIn(Protocol):
    """What the suite does to a device. pieces: (offset, data) or (offset, length), in bytes."""

    def read(self, pieces: list[tuple[int, int]], *, df: bool) -> bytes: ...
    def write(self, pieces: list[tuple[int, bytes]], *, fua: bool) -> None: ...
    def discard(self, offset: int, length: int, *, fua: bool) -> None: ...
    def write_zeroes(self, offset: int, length: int, *, unmap: bool, fast: bool, fua: bool) -> None: ...
    def flush(self) -> None: ...
    def cache(self, offset: int, length: int) -> None: ...
    def extents(self, offset: int, length: int, *, one: bool) -> Extents | None:
        """(offset, length, flags); None where the way knows none."""

    def errnos(self, own: set[int]) -> set[int]: ...
    def close(self) -> None: ...


class InProcess:
    """The device's own methods."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def read(self, pieces: list[tuple[int, int]], *, df: bool) -> bytes:
        found = []
        for offset, length in pieces:
            if df:  # no such thing here: the other method instead
                buffer = bytearray(length)
                assert self.device.pread_into(buffer, offset) == length
                found.append(bytes(buffer))
            else:
                found.append(self.device.pread(length, offset))
        return b"".join(found)

    def write(self, pieces: list[tuple[int, bytes]], *, fua: bool) -> None:
        for offset, data in pieces:
            assert self.device.pwrite(data, offset, fua=fua) == len(data)

    def discard(self, offset: int, length: int, *, fua: bool) -> None:
        self.device.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool, fast: bool, fua: bool) -> None:
        self.device.write_zeroes(offset, length, unmap=unmap, fast=fast, fua=fua)

    def flush(self) -> None:
        self.device.flush()

    def cache(self, offset: int, length: int) -> None:
        if offset + length > self.device.size:
            raise OSError(errno.EINVAL, "there is no cache in process")

    def extents(self, offset: int, length: int, *, one: bool) -> Extents | None:
        found = self.device.extents(offset, length)
        assert [start for start, _, _ in found] == _starts(offset, found), "in order and without gaps"
        assert sum(count for _, count, _ in found) == length
        return found

    def errnos(self, own: set[int]) -> set[int]:
        return own

    def close(self) -> None:
        return


class Batch(InProcess):
    """All pieces in one call."""

    def read(self, pieces: list[tuple[int, int]], *, df: bool) -> bytes:
        buffers = [bytearray(length) for _, length in pieces]
        self._run([("r", buffer, offset) for buffer, (offset, _) in zip(buffers, pieces, strict=True)])
        return b"".join(buffers)

    def write(self, pieces: list[tuple[int, bytes]], *, fua: bool) -> None:
        self._run([("w", data, offset) for offset, data in pieces])
        if fua:
            self.device.flush()

    def _run(self, requests: list[Any]) -> None:
        results = self.device.batch(requests)
        assert len(results) == len(requests)
        for (_, buffer, _), result in zip(requests, results, strict=True):
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            assert result == len(buffer)


class Coroutines(InProcess):
    """Through asyncio; pieces at the same time."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._runner = asyncio.Runner()
        self._view = self._run(self._open())

    async def _open(self) -> Any:
        return self.device.asyncio()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(coroutine)

    async def _together(self, *coroutines: Coroutine[Any, Any, T]) -> list[T]:
        outcomes = await asyncio.gather(*coroutines, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes  # type: ignore[return-value]

    def read(self, pieces: list[tuple[int, int]], *, df: bool) -> bytes:
        return b"".join(self._run(self._together(*(self._view.pread(length, offset) for offset, length in pieces))))

    def write(self, pieces: list[tuple[int, bytes]], *, fua: bool) -> None:
        self._run(self._together(*(self._view.pwrite(data, offset, fua=fua) for offset, data in pieces)))

    def discard(self, offset: int, length: int, *, fua: bool) -> None:
        self._run(self._view.discard(offset, length))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool, fast: bool, fua: bool) -> None:
        self._run(self._view.write_zeroes(offset, length, unmap=unmap, fast=fast, fua=fua))

    def flush(self) -> None:
        self._run(self._view.flush())

    def extents(self, offset: int, length: int, *, one: bool) -> Extents | None:
        found: Extents = self._run(self._view.extents(offset, length))
        assert [start for start, _, _ in found] == _starts(offset, found), "in order and without gaps"
        assert sum(count for _, count, _ in found) == length
        return found

    def close(self) -> None:
        self._run(self._view.aclose())
        self._runner.close()


class Nbd:
    """Through a server and a socket; pieces in a pipeline."""

    def __init__(self, client: nbd.NbdClient) -> None:
        self.client = client

    def read(self, pieces: list[tuple[int, int]], *, df: bool) -> bytes:
        flags = nbd.DF if df and self.client.flags & nbd.SEND_DF else 0
        cookies = [self.client.send(nbd.READ, offset, length, flags=flags) for offset, length in pieces]
        replies = self._replies(cookies)
        for reply in replies:
            assert not any(any(reply.data[at : at + length]) for at, length in reply.holes)
        return b"".join(reply.data for reply in replies)

    def write(self, pieces: list[tuple[int, bytes]], *, fua: bool) -> None:
        flags = nbd.FUA if fua else 0
        self._replies([self.client.send(nbd.WRITE, at, flags=flags, payload=data) for at, data in pieces])

    def discard(self, offset: int, length: int, *, fua: bool) -> None:
        self._ask(nbd.TRIM, offset, length, nbd.FUA if fua else 0)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool, fast: bool, fua: bool) -> None:
        flags = (0 if unmap else nbd.NO_HOLE) | (nbd.FAST_ZERO if fast else 0) | (nbd.FUA if fua else 0)
        self._ask(nbd.WRITE_ZEROES, offset, length, flags)

    def flush(self) -> None:
        self._ask(nbd.FLUSH, 0, 0, 0)

    def cache(self, offset: int, length: int) -> None:
        self._ask(nbd.CACHE, offset, length, 0)

    def extents(self, offset: int, length: int, *, one: bool) -> Extents | None:
        if self.client.style is nbd.Style.SIMPLE:
            return None
        found, end = [], offset + length
        while offset < end:
            reply = self._ask(nbd.BLOCK_STATUS, offset, end - offset, nbd.REQ_ONE if one else 0)
            assert len(reply.extents) == 1 or not one
            assert sum(count for count, _ in reply.extents) <= end - offset
            for count, flags in reply.extents:
                found.append((offset, count, flags))
                offset += count
        return found

    def errnos(self, own: set[int]) -> set[int]:
        if own and self.client.flags & nbd.READ_ONLY and not own <= {errno.EIO, errno.EINVAL}:
            return {errno.EPERM}
        return {errno.EPERM if number == errno.EROFS else number for number in own}

    def close(self) -> None:
        self.client.disconnect()

    def _ask(self, command: int, offset: int, length: int, flags: int) -> nbd.Reply:
        (reply,) = self._replies([self.client.send(command, offset, length, flags=flags)])
        return reply

    def _replies(self, cookies: list[int]) -> list[nbd.Reply]:
        replies = dict(self.client.receive() for _ in cookies)
        for reply in replies.values():
            if reply.error:
                raise OSError(reply.error, reply.message or os.strerror(reply.error))
        return [replies[cookie] for cookie in cookies]


def _starts(offset: int, found: Extents) -> list[int]:
    starts = []
    for _, length, _ in found:
        starts.append(offset)
        offset += length
    return starts


Enter = Callable[[Device, NbdThread], AbstractContextManager[WayIn]]


def _directly(way: type[InProcess]) -> Enter:
    return lambda device, host: closing(way(device))


def _over_nbd(style: nbd.Style) -> Enter:
    @contextmanager
    def enter(device: Device, host: NbdThread) -> Iterator[WayIn]:
        name = f"disk-{style.value}"
        with host.exported(device, name), closing(Nbd(nbd.NbdClient.unix(host.path, name, style))) as way:
            assert way.client.size == device.size
            yield way

    return enter


def _as_a_file(*, moves: bool = False, uring: bool = False) -> Enter:
    @contextmanager
    def enter(device: Device, host: NbdThread) -> Iterator[WayIn]:
        read_only = device.read_only
        with (
            # Of its own: several ways may be in use at once.
            tempfile.TemporaryDirectory(dir=host.path.parent) as folder,
            FuseServed(Path(folder) / "file", device, read_only=read_only, keep=True, uring=uring) as served,
            closing(FuseWay(served, read_only=read_only, moves=moves)) as way,
        ):
            assert served.path.stat().st_size == device.size
            yield way

    return enter


def _as_a_disk(*, moves: bool = False, rust: bool = False) -> Enter:
    @contextmanager
    def enter(device: Device, host: NbdThread) -> Iterator[WayIn]:
        with (
            tempfile.TemporaryDirectory(dir=host.path.parent) as folder,
            VhostUserServed(Path(folder) / "socket", device, read_only=device.read_only) as served,
            closing(RustDriver(served.path, queues=2) if rust else Machine.connected(served.path, queues=2)) as machine,
            closing(VhostUserWay(served, machine, moves=moves)) as way,
        ):
            yield way

    return enter


WAYS_IN: dict[str, Enter] = {
    "in-process": _directly(InProcess),
    "batch": _directly(Batch),
    "asyncio": _directly(Coroutines),
    "nbd-simple": _over_nbd(nbd.Style.SIMPLE),
    "nbd-structured": _over_nbd(nbd.Style.STRUCTURED),
    "nbd-extended": _over_nbd(nbd.Style.EXTENDED),
    "fuse": _as_a_file(),
    "fuse-handed-over": _as_a_file(moves=True),
    "fuse-uring": _as_a_file(uring=True),
    "vhost-user": _as_a_disk(),
    "vhost-user-handed-over": _as_a_disk(moves=True),
}
if LONG or "BLKLOOM_FUZZ_CASES" in os.environ:
    WAYS_IN["vhost-user-libblkio"] = _as_a_disk(rust=True, moves=True)
