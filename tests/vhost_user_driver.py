"""`Machine`: a vhost-user front-end with a virtio block driver, as a virtual machine and its monitor are together.

    with Machine.connected(path) as machine:
        machine.write(0, bytes(4096))

It knows nothing of blkloom: the numbers are those of QEMU's docs/interop/vhost-user.rst and of VIRTIO 1.2. `state` is
what the monitor keeps when the back-end dies: `Machine.again` connects with it.
"""

from __future__ import annotations

import array
import errno
import fcntl
import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

READ, WRITE, FLUSH, IDENTIFY, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
SECTOR = 512
GUEST, USER = 0x4000_0000, 0x7F00_0000_0000
PATIENCE = 60.0
F_FLUSH, F_CACHE_SWITCH, F_LOG, F_INDIRECT = 1 << 9, 1 << 11, 1 << 26, 1 << 28
F_EVENT_IDX, F_PROTOCOL, F_VERSION_1 = 1 << 29, 1 << 30, 1 << 32
F_OPTIONAL = F_FLUSH | F_CACHE_SWITCH | F_INDIRECT | F_EVENT_IDX
P_QUEUES, P_REPLY_ACK, P_BACKEND_REQ, P_CONFIG, P_INFLIGHT = 1 << 0, 1 << 3, 1 << 5, 1 << 9, 1 << 12
_HEADER = struct.Struct("=III")
_PAGE = 4096
_LOG_BYTE = 8 * _PAGE
"""Memory for which the log has a byte."""
_EACH = 1 << 20
"""Memory for the data of a request."""


class FrontEndError(Exception):
    """The back-end has refused a message, or has hung up."""


def shared_memory(size: int, *, sealed: bool = True) -> int:
    """A memfd."""
    made = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(made, size)
    if sealed:
        fcntl.fcntl(made, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return made


class FrontEnd:
    """The control socket: messages and their answers."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        try:
            self.socket.connect(os.fspath(path))
        except OSError:
            self.socket.close()
            raise
        self.acknowledges = False

    def send(self, number: int, payload: bytes = b"", descriptors: Sequence[int] = (), *, flags: int = 1) -> None:
        """One message."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.socket.sendmsg([_HEADER.pack(number, flags, len(payload)) + payload], ancillary)

    def answer(self, number: int) -> tuple[bytes, list[int]]:
        """The answer of a message: its payload, and descriptors."""
        data, descriptors, _, _ = socket.recv_fds(self.socket, _HEADER.size, 8)
        if not data:
            raise FrontEndError("the back-end has hung up")
        request, flags, size = _HEADER.unpack(data)
        assert (request, flags) == (number, 5), "an answer of version 1"
        payload = b""
        while len(payload) < size:
            payload += self.socket.recv(size - len(payload))
        return payload, list(descriptors)

    def ask(self, number: int, payload: bytes = b"", descriptors: Sequence[int] = ()) -> tuple[bytes, list[int]]:
        """A message that has an answer of its own."""
        self.send(number, payload, descriptors)
        return self.answer(number)

    def number(self, number: int) -> int:
        """A message whose answer is a number."""
        return int.from_bytes(self.ask(number)[0], "little")

    def tell(self, number: int, payload: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """A message without an answer; it is acknowledged, where that was negotiated."""
        self.send(number, payload, descriptors, flags=9 if self.acknowledges else 1)
        if self.acknowledges and int.from_bytes(self.answer(number)[0], "little"):
            raise FrontEndError(f"message {number} was refused")


class Queue:
    """A virtqueue of a driver. One request at a time uses a slot: three descriptors, or an indirect table."""

    def __init__(self, memory: mmap.mmap, at: int, size: int, slots: int, data: int, *, features: int) -> None:
        self.memory, self.size = memory, size
        self.features = features
        self.descriptors = at
        self.available = at + 16 * size
        self.used = -(-(self.available + 6 + 2 * size) // 4) * 4
        self.tables = -(-(self.used + 6 + 8 * size) // 16) * 16
        self.headers = self.tables + slots * 64
        self.data = data
        self.free = list(range(slots))
        self.next = self.seen = 0
        self._barrier = threading.Lock()
        self.kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.error = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def _half(self, at: int) -> int:
        return int.from_bytes(self.memory[at : at + 2], "little")

    def _put_half(self, at: int, value: int) -> None:
        self.memory[at : at + 2] = (value & 0xFFFF).to_bytes(2, "little")

    def submit(self, kind: int, sector: int, length: int, data: bytes = b"") -> int:
        """Makes a request available and kicks. length: of what the device writes. Returns the slot."""
        slot = self.free.pop()
        header = self.headers + slot * 32
        self.memory[header : header + 17] = struct.pack("<IIQB", kind, 0, sector, 0xFF)
        at = self.data + slot * _EACH
        self.memory[at : at + len(data)] = data
        pieces = [(header, 16, 0)]
        if data:
            pieces.append((at, len(data), 0))
        if length:
            pieces.append((at, length, 2))
        pieces.append((header + 16, 1, 2))
        first = 0 if self.features & F_INDIRECT else slot * 3
        last = len(pieces) - 1
        table = b"".join(
            struct.pack("<QIHH", GUEST + place, size, flags | (1 if index < last else 0), first + index + 1)
            for index, (place, size, flags) in enumerate(pieces)
        )
        head = slot * 3
        if self.features & F_INDIRECT:
            place = self.tables + slot * 64
            self.memory[place : place + len(table)] = table
            table = struct.pack("<QIHH", GUEST + place, len(table), 4, 0)
        place = self.descriptors + head * 16
        self.memory[place : place + len(table)] = table
        self._put_half(self.available + 4 + 2 * (self.next % self.size), head)
        self.next = self.next + 1 & 0xFFFF
        self._put_half(self.available + 2, self.next)
        os.eventfd_write(self.kick, 1)
        return slot

    def wait(self, patience: float = PATIENCE) -> tuple[int, int, int]:
        """The next request that is used: slot, status, bytes written. Raises TimeoutError."""
        while self._half(self.used + 2) == self.seen:
            self._put_half(self.available + 4 + 2 * self.size, self.seen)  # event index
            with self._barrier:  # the store before the load
                pass
            if self._half(self.used + 2) != self.seen:
                break
            if not select.select([self.call], [], [], patience)[0]:
                raise TimeoutError(errno.ETIMEDOUT, "no request was used")
            with suppress(BlockingIOError):
                os.eventfd_read(self.call)
        place = self.used + 4 + 8 * (self.seen % self.size)
        head, written = struct.unpack("<II", self.memory[place : place + 8])
        self.seen = self.seen + 1 & 0xFFFF
        slot = head // 3
        self.free.append(slot)
        return slot, self.memory[self.headers + slot * 32 + 16], written

    def data_at(self, slot: int) -> int:
        """Where the data of a request is in the memory."""
        return self.data + slot * _EACH

    def data_of(self, slot: int, length: int) -> bytes:
        """What the device has written."""
        return self.memory[self.data_at(slot) :][:length]

    def close(self) -> None:
        """Closes the eventfds."""
        for descriptor in (self.kick, self.call, self.error):
            os.close(descriptor)


class Machine:
    """A virtual machine. wanted: features, if they are offered. size: of its queues."""

    SLOTS = 8

    def __init__(self, *, queues: int = 1, size: int = 64, wanted: int = F_OPTIONAL, memory: int = -1) -> None:
        self.size, self.wanted = size, wanted
        each = 64 << 10
        start = queues * each
        length = start + queues * self.SLOTS * _EACH
        self.file = shared_memory(length) if memory < 0 else memory
        self.length = length
        self.memory = mmap.mmap(self.file, length)
        self.queues = [
            Queue(
                self.memory,
                index * each,
                size,
                self.SLOTS,
                start + index * self.SLOTS * _EACH,
                features=wanted,
            )
            for index in range(queues)
        ]
        self.inflight: tuple[int, bytes] | None = None
        self.control: FrontEnd
        self.backend: socket.socket | None = None
        self.features = self.protocol_features = 0
        self._log: mmap.mmap | None = None

    @classmethod
    def connected(cls, path: str | os.PathLike[str], **settings: int) -> Self:
        """A machine that has started its device."""
        machine = cls(**settings)
        machine.connect(path)
        return machine

    def connect(self, path: str | os.PathLike[str] | Path, *, start: bool = True) -> None:
        """Connects, for the first time or again, and starts the queues."""
        self.control = control = FrontEnd(path)
        offered = control.number(1)
        self.features = offered & (self.wanted | F_PROTOCOL | F_VERSION_1 | ~F_OPTIONAL) & ~F_LOG
        self.protocol_features = control.number(15)
        control.tell(16, struct.pack("=Q", self.protocol_features))
        control.acknowledges = bool(self.protocol_features & P_REPLY_ACK)
        control.tell(3)
        if self.protocol_features & P_BACKEND_REQ:
            self.backend, theirs = socket.socketpair()
            self.backend.settimeout(PATIENCE)
            with theirs:
                control.tell(21, b"", [theirs.fileno()])
        if start:
            self.start()

    def start(self) -> None:
        """As after the driver has said that it is ready."""
        control = self.control
        if self.inflight is None:
            wanted = struct.pack("=QQHHI", 0, 0, len(self.queues), self.size, 0)
            payload, descriptors = control.ask(31, wanted)
            self.inflight = (descriptors[0], payload)
        control.tell(32, self.inflight[1], [self.inflight[0]])
        control.tell(2, struct.pack("=Q", self.features))
        control.tell(5, struct.pack("=IIQQQQ", 1, 0, GUEST, self.length, USER, 0), [self.file])
        for index, queue in enumerate(self.queues):
            control.tell(8, struct.pack("=II", index, self.size))
            base = int.from_bytes(self.memory[queue.used + 2 : queue.used + 4], "little")
            control.tell(10, struct.pack("=II", index, base))
            self._set_addresses(index)
            control.tell(13, struct.pack("=Q", index), [queue.call])
            control.tell(14, struct.pack("=Q", index), [queue.error])
            control.tell(12, struct.pack("=Q", index), [queue.kick])
            control.tell(18, struct.pack("=II", index, 1))

    def _set_addresses(self, index: int, *, logs: bool = False) -> None:
        queue = self.queues[index]
        places = (USER + queue.descriptors, USER + queue.used, USER + queue.available, GUEST + queue.used)
        self.control.tell(9, struct.pack("=IIQQQQ", index, int(logs), *places))

    def set_log(self) -> None:
        """Gives the device a log of the pages that it writes."""
        size = -(-(GUEST + self.length) // _LOG_BYTE)
        file = shared_memory(-(-size // _PAGE) * _PAGE)
        self._log = mmap.mmap(file, size)
        answer, _ = self.control.ask(6, struct.pack("=QQ", size, 0), [file])
        os.close(file)
        assert answer == bytes(8)

    def keep_log(self, *, on: bool, rings: bool = True) -> None:
        """Lets the device mark pages, also those of the used rings. As at the beginning of a live migration."""
        self.control.tell(2, struct.pack("=Q", self.features | (F_LOG if on else 0)))
        for index in range(len(self.queues)):
            self._set_addresses(index, logs=on and rings)

    def take_log(self) -> set[int]:
        """Takes the marks: pages of the memory."""
        first, log = GUEST // _PAGE, self._log
        assert log is not None
        marked = ((byte, bits) for byte, bits in enumerate(log[:]) if bits)
        found = {byte * 8 + bit - first for byte, bits in marked for bit in range(8) if bits >> bit & 1}
        log[:] = bytes(len(log))
        return found

    def stop(self, index: int = 0) -> int:
        """GET_VRING_BASE: the index of the next request."""
        payload, _ = self.control.ask(11, struct.pack("=II", index, 0))
        return struct.unpack("=II", payload)[1]

    def configuration(self, offset: int = 0, size: int = 60) -> bytes:
        """A part of the configuration space."""
        payload, _ = self.control.ask(24, struct.pack("=III", offset, size, 0) + bytes(size))
        return payload[12:]

    @property
    def capacity(self) -> int:
        """Bytes of the device."""
        return int.from_bytes(self.configuration(0, 8), "little") * SECTOR

    def request(self, kind: int, sector: int, length: int = 0, data: bytes = b"", *, queue: int = 0) -> bytes:
        """One request. Raises OSError."""
        used = self.queues[queue]
        slot = used.submit(kind, sector, length, data)
        found, status, written = used.wait()
        assert found == slot
        if status:
            number = errno.EOPNOTSUPP if status == 2 else errno.EIO
            raise OSError(number, f"status {status}")
        assert written == length + 1
        return used.data_of(slot, length)

    def read(self, offset: int, length: int, *, queue: int = 0) -> bytes:
        """Bytes at an offset; both in sectors."""
        parts = range(offset, offset + length, _EACH)
        return b"".join(self.request(READ, at // SECTOR, min(_EACH, offset + length - at), queue=queue) for at in parts)

    def write(self, offset: int, data: bytes, *, queue: int = 0) -> None:
        """Writes bytes at an offset; both in sectors."""
        for at in range(0, len(data), _EACH):
            self.request(WRITE, (offset + at) // SECTOR, data=data[at : at + _EACH], queue=queue)

    def write_nothing(self, offset: int) -> None:
        """A write without data."""
        self.request(WRITE, offset // SECTOR)

    def flush(self) -> None:
        """All that was written is durable afterwards."""
        self.request(FLUSH, 0)

    def set_write_cache(self, *, on: bool) -> None:
        """Switches the write cache of the disk."""
        self.control.tell(25, struct.pack("=IIIB", 32, 1, 0, on))

    def clear(self, kind: int, offset: int, length: int, *, unmap: bool = False) -> None:
        """DISCARD or WRITE_ZEROES."""
        self.request(kind, 0, data=struct.pack("<QII", offset // SECTOR, length // SECTOR, int(unmap)))

    def hang_up(self) -> None:
        """As when the monitor loses its connection."""
        self.control.socket.close()
        if self.backend is not None:
            self.backend.close()
            self.backend = None

    def close(self) -> None:
        """Ends the machine."""
        self.hang_up()
        for queue in self.queues:
            queue.close()
        if self.inflight is not None:
            os.close(self.inflight[0])
        self.memory.close()
        if self._log is not None:
            self._log.close()
        os.close(self.file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
