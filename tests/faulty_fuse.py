"""Server process of `faulty_fs.FaultyFileSystem`: FUSE's kernel protocol over a directory, with errors on command.

Run it as `python faulty_fuse.py <directory> <mount point>`. It mounts itself: as root by mount(2), otherwise by
fusermount3, which passes the descriptor back. Then it reads commands from standard input and writes answers to standard
output, one line of JSON each. Its first line says that the file system is mounted. When its input ends, it unmounts and
ends, even if files are open.

The file system is one flat directory of regular files, stored in files of the same names in the directory. The kernel
caches writes (FUSE_WRITEBACK_CACHE): write(2) succeeds, and the WRITE request that an fdatasync or the flusher sends
later fails. No other program may change the files of the directory while it is mounted. One thread.

Source: Linux include/uapi/linux/fuse.h, protocol 7.31; fusermount3's _FUSE_COMMFD.
"""

from __future__ import annotations

import array
import ctypes
import errno
import json
import os
import select
import socket
import stat
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

IN_HEADER = struct.Struct("<IIQQIIIHH")
OUT_HEADER = struct.Struct("<IiQ")
ATTRIBUTES = struct.Struct("<6Q10I")
LONGEST_WRITE = 1 << 20
BUFFER = LONGEST_WRITE + 4096
ROOT = 1
FOR_EVER = 1 << 30
"""Seconds for which the kernel may cache attributes: no other program changes the files."""


class Op(IntEnum):
    """Requests, by their opcodes."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    UNLINK = 10
    RENAME = 12
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    RENAME2 = 45


ASYNC_READ, BIG_WRITES, ASYNC_DIO, WRITEBACK_CACHE, MAX_PAGES = 1, 1 << 5, 1 << 15, 1 << 16, 1 << 22
SET_MODE, SET_SIZE = 1, 8
MS_NOSUID, MS_NODEV, MNT_DETACH = 2, 4, 2

HELD = 0
"""The errno of a rule whose requests are not answered."""

FAILING = {"read": Op.READ, "write": Op.WRITE, "fsync": Op.FSYNC, "fallocate": Op.FALLOCATE}
"""What can be made to fail, by the word that commands have for it."""

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@dataclass
class Rule:
    """Requests of one kind fail. name: of the file, "" for any. left: so many more, None: all."""

    opcode: int
    name: str
    number: int
    left: int | None


class Refused(Exception):
    """The errno of the answer."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


class Server:
    """Answers the kernel on `device`, out of the files in `directory`."""

    def __init__(self, device: int, directory: Path) -> None:
        self._device = device
        self._directory = directory
        self._names: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        self._files: dict[int, int] = {}
        self._rules: list[Rule] = []
        self._held: list[bytes] = []
        """Requests that are answered at the next `mend`."""
        self._seen: Counter[int] = Counter()

    # commands

    def command(self, words: dict[str, object]) -> object:
        """Does what a line asks for; the answer."""
        match words:
            case {"fail": str(what), "errno": int(number), "name": str(name), "count": int() | None as count}:
                self._rules.append(Rule(FAILING[what], name, number, count))
                return None
            case {"mend": True}:
                self._rules.clear()
                held, self._held = self._held, []
                for request in held:
                    self._serve(request)
                return None
            case {"held": True}:
                return len(self._held)
            case {"count": str(what)}:
                return self._seen[FAILING[what]]
        raise ValueError(f"no such command: {words}")

    # requests

    def serve_one(self) -> bool:
        """Takes the next request and answers it; False once the file system is unmounted."""
        try:
            request = os.read(self._device, BUFFER)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return False
            if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # it was interrupted before it was read
                return True
            raise
        return self._serve(request)

    def _serve(self, request: bytes) -> bool:
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(request)
        if opcode in (Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT):  # the kernel expects no answer
            return True
        number, answer = 0, b""
        try:
            self._seen[opcode] += 1
            self._meet(opcode, node)
            answer = self._answer(opcode, node, request[IN_HEADER.size :])
        except Refused as refused:
            number = refused.number
            if number == HELD:
                self._held.append(request)
                return True
        except OSError as error:
            number = error.errno or errno.EIO
        try:
            os.write(self._device, OUT_HEADER.pack(OUT_HEADER.size + len(answer), -number, unique) + answer)
        except OSError as error:
            if error.errno != errno.ENOENT:  # the request was interrupted
                raise
        return opcode != Op.DESTROY

    def _meet(self, opcode: int, node: int) -> None:
        for rule in self._rules:
            if rule.opcode == opcode and rule.name in ("", self._names.get(node)) and rule.left != 0:
                if rule.left is not None:
                    rule.left -= 1
                raise Refused(rule.number)

    def _answer(self, opcode: int, node: int, body: bytes) -> bytes:
        match opcode:
            case Op.INIT:
                flags = ASYNC_READ | BIG_WRITES | ASYNC_DIO | WRITEBACK_CACHE | MAX_PAGES
                _, _, ahead, offered = struct.unpack_from("<4I", body)
                numbers = (7, 31, ahead, flags & offered, 16, 12, LONGEST_WRITE, 1, LONGEST_WRITE >> 12, 0, 0)
                return struct.pack("<4I2H2I2HI", *numbers) + bytes(28)
            case Op.LOOKUP:
                return self._entry(_name(body))
            case Op.GETATTR:
                return struct.pack("<QII", FOR_EVER, 0, 0) + self._attributes(node)
            case Op.SETATTR:
                valid, _, _, size = struct.unpack_from("<IIQQ", body)
                (mode,) = struct.unpack_from("<I", body, 68)
                if valid & SET_SIZE:
                    os.ftruncate(self._file(node), size)
                if valid & SET_MODE:
                    os.fchmod(self._file(node), stat.S_IMODE(mode))
                return struct.pack("<QII", FOR_EVER, 0, 0) + self._attributes(node)
            case Op.UNLINK:
                (self._directory / _name(body)).unlink()
                return b""
            case Op.RENAME | Op.RENAME2:
                old, new = body[8 if opcode == Op.RENAME else 16 :].rstrip(b"\0").split(b"\0")
                self._rename(os.fsdecode(old), os.fsdecode(new))
                return b""
            case Op.OPEN | Op.OPENDIR:
                if opcode == Op.OPEN:
                    self._file(node)
                return struct.pack("<QII", node, 0, 0)
            case Op.READ:
                _, offset, size = struct.unpack_from("<QQI", body)
                return os.pread(self._file(node), size, offset)
            case Op.WRITE:
                _, offset, size = struct.unpack_from("<QQI", body)
                return struct.pack("<II", os.pwrite(self._file(node), body[40 : 40 + size], offset), 0)
            case Op.STATFS:
                found = os.statvfs(self._directory)
                counts = (found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree)
                return struct.pack("<5Q4I", *counts, found.f_bsize, 255, found.f_frsize, 0) + bytes(24)
            case Op.READDIR:
                _, offset, size = struct.unpack_from("<QQI", body)
                return self._listing(offset, size)
            case Op.CREATE:
                _, mode = struct.unpack_from("<II", body)
                name = _name(body[16:])
                os.close(os.open(self._directory / name, os.O_CREAT | os.O_RDWR, stat.S_IMODE(mode)))
                return self._entry(name) + struct.pack("<QII", self._numbers[name], 0, 0)
            case Op.FALLOCATE:
                _, offset, length, mode = struct.unpack_from("<QQQI", body)
                if libc.fallocate(self._file(node), mode, offset, length):
                    raise Refused(ctypes.get_errno())
                return b""
            case Op.FSYNC | Op.FLUSH | Op.RELEASE | Op.RELEASEDIR | Op.FSYNCDIR | Op.DESTROY:
                return b""
        raise Refused(errno.ENOSYS)

    # files

    def _file(self, node: int) -> int:
        """The descriptor of a file, open as long as this process runs: also when the file was removed."""
        if node not in self._names:
            raise Refused(errno.EISDIR)
        if node not in self._files:
            self._files[node] = os.open(self._directory / self._names[node], os.O_RDWR)
        return self._files[node]

    def _entry(self, name: str) -> bytes:
        number = os.stat(self._directory / name).st_ino << 1 | 1  # never that of the root
        self._names[number], self._numbers[name] = name, number
        return struct.pack("<4Q2I", number, 0, 0, FOR_EVER, 0, 0) + self._attributes(number)

    def _attributes(self, node: int) -> bytes:
        found = os.stat(self._directory) if node == ROOT else os.fstat(self._file(node))
        kind = stat.S_IFDIR if node == ROOT else stat.S_IFREG
        times = [int(found.st_atime), int(found.st_mtime), int(found.st_ctime)]
        mode = kind | stat.S_IMODE(found.st_mode)
        owner = (mode, 1, found.st_uid, found.st_gid, 0, 4096, 0)
        return ATTRIBUTES.pack(node, found.st_size, found.st_blocks, *times, 0, 0, 0, *owner)

    def _rename(self, old: str, new: str) -> None:
        os.rename(self._directory / old, self._directory / new)
        number = self._numbers.pop(old)
        self._names[number], self._numbers[new] = new, number

    def _listing(self, offset: int, size: int) -> bytes:
        out = b""
        for index, name in enumerate(sorted(os.listdir(self._directory))[offset:], offset + 1):
            raw = os.fsencode(name)
            entry = struct.pack("<QQII", index + 1, index, len(raw), stat.S_IFREG >> 12) + raw
            entry += bytes(-len(entry) % 8)
            if len(out) + len(entry) > size:
                break
            out += entry
        return out


def _name(body: bytes) -> str:
    return os.fsdecode(body.split(b"\0", 1)[0])


def mount(where: str) -> int:
    """The file system's descriptor. Raises OSError, CalledProcessError."""
    if os.geteuid() == 0:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        if libc.mount(b"faulty", os.fsencode(where), b"fuse", MS_NOSUID | MS_NODEV, options.encode()):
            raise OSError(ctypes.get_errno(), f"mount: {os.strerror(ctypes.get_errno())}", where)
        return device
    ours, theirs = socket.socketpair()
    with ours, theirs:
        environment = os.environ | {"_FUSE_COMMFD": str(theirs.fileno())}
        command = ["fusermount3", "-o", "fsname=faulty,default_permissions", "--", where]
        subprocess.run(command, check=True, env=environment, pass_fds=[theirs.fileno()])
        _, ancillary, *_ = ours.recvmsg(1, socket.CMSG_SPACE(4))
    (device,) = array.array("i", ancillary[0][2])
    os.set_inheritable(device, False)
    return device


def unmount(where: str) -> None:
    """Also while files of it are open."""
    if os.geteuid() == 0:
        libc.umount2(os.fsencode(where), MNT_DETACH)
    else:
        subprocess.run(["fusermount3", "-u", "-z", "--", where], check=True)


def main(directory: str, where: str) -> None:
    """Serves until standard input ends. After that, programs with open files get ENOTCONN."""
    device = mount(where)
    server = Server(device, Path(directory))
    print(json.dumps("mounted"), flush=True)
    poll = select.poll()
    poll.register(device, select.POLLIN)
    poll.register(sys.stdin, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready == device:
                if not server.serve_one():
                    return
            elif line := sys.stdin.buffer.raw.readline():  # type: ignore[attr-defined]
                print(json.dumps(server.command(json.loads(line))), flush=True)
            else:
                os.close(device)  # before that unmounting might wait for an answer of this process
                unmount(where)
                return


if __name__ == "__main__":
    main(*sys.argv[1:])
