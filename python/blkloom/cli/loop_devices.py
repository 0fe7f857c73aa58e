"""Loop devices in the supervisor: their tables, their notes, and how the command line names them.

A loop device is a device that `blkloom loop` has made (it has `LoopNotes` and is not a partition). Its table is one
segment of the target `loop`, unless another table was loaded since.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from blkloom.cli.loop_options import LoopFailed
from blkloom.errors import BackingError, NoSuchDevice, Place
from blkloom.table.places import LinePlaces
from blkloom.table.words import join_words, raw_word, skip_blanks, split_words
from blkloom.units import SECTOR, Sectors

if TYPE_CHECKING:
    from blkloom.cli.session import Session
    from blkloom.control.states import DeviceInfo, LoopNotes, OpenedFile

_BLOCK_SIZE: Final = "block_size="
_NUMBERED: Final = re.compile(r"loop([0-9]+)")
_MODES: Final = ("file", "direct_io", "block_map")


@dataclass(frozen=True)
class LoopTable:
    """`0 <length> loop <path> <offset> <#opts> <opts>`. length: sectors. offset: bytes."""

    length: Sectors
    path: str
    offset: int = 0
    options: tuple[str, ...] = ()

    @classmethod
    def read(cls, text: str) -> LoopTable | None:
        """Parses the table of a device; None if it is not the table of a loop device."""
        at, head = 0, []
        for _ in range(3):
            head.append(raw_word(text, at, len(text)))
            at = skip_blanks(text, at + len(head[-1]), len(text))
        if head[0] != "0" or head[2] != "loop" or "\n" in text:
            return None
        words, behind = split_words(text, at, len(text), LinePlaces(text, "table"))
        if not words or text[behind:].strip():
            return None
        path, *rest = (word.text for word in words)
        return cls(Sectors(int(head[1])), path, int(rest[0]) if rest else 0, tuple(rest[2:]))

    def text(self) -> str:
        """The table line. Raises TableError for a path that a table cannot hold."""
        options = [str(len(self.options)), *self.options] if self.options else []
        offset = [str(self.offset)] if self.offset or options else []
        return f"0 {self.length} loop {join_words([self.path, *offset, *options], Place(self.path))}"

    @property
    def block_size(self) -> int:
        """Bytes of a logical block."""
        given = [option.removeprefix(_BLOCK_SIZE) for option in self.options if option.startswith(_BLOCK_SIZE)]
        return int(given[0]) if given else SECTOR

    @property
    def read_only(self) -> bool:
        """Whether the file is opened for reading only."""
        return "read_only" in self.options

    def with_options(
        self,
        *,
        mode: str | None = None,
        read_only: bool | None = None,
        block_size: int | None = None,
    ) -> LoopTable:
        """A copy with other values; None: unchanged. mode: the option for the I/O mode, "" for none."""
        options = list(self.options)
        if mode is not None:
            gone = {"direct_io", "block_map"} | (set() if mode.startswith("block_map") else {"immutable"})
            options = [one for one in options if one.partition("=")[0] not in gone]
            options = [*([mode] if mode else []), *options]
        if read_only is not None:
            options = [one for one in options if one != "read_only"] + (["read_only"] if read_only else [])
        if block_size is not None:
            options = [one for one in options if not one.startswith(_BLOCK_SIZE)]
            options += [f"{_BLOCK_SIZE}{block_size}"] if block_size != SECTOR else []
        return replace(self, options=tuple(sorted(options, key=_rank)))

    def size_of(self, size: int, sizelimit: int) -> Sectors:
        """Number of sectors of a device on a file of `size` bytes: whole blocks from the offset on."""
        room = max(0, size - self.offset)
        return Sectors((min(room, sizelimit) if sizelimit else room) // self.block_size * self.block_size // SECTOR)


def _rank(option: str) -> int:
    """Sort key of an option: the order in which tables print options."""
    order = ("direct_io", "block_map", "read_only", "block_size", "immutable", "round_up")
    word = option.partition("=")[0]
    return order.index(word) if word in order else len(order)


@dataclass(frozen=True)
class LoopDevice:
    """A loop device. table: None if its table is not one segment of a file. file: the open file; None if the device
    has failed.
    """

    info: DeviceInfo
    notes: LoopNotes
    table: LoopTable | None
    file: OpenedFile | None

    @property
    def name(self) -> str:
        """The device's."""
        return self.info.name

    @property
    def autoclear(self) -> bool:
        """Whether the device is removed after its last user has left."""
        return self.info.autoclear or self.info.deferred

    @property
    def socket(self) -> str:
        """Path of its NBD socket; "" if it has no Unix socket."""
        return next((export.unix for export in self.info.exports if export.unix), "")

    @property
    def backing_name(self) -> str | None:
        """Path of its file: the present one, or the one in its table. None if there is no file."""
        return self.file.name if self.file else self.table.path if self.table else None

    def is_backed_by(self, path: str, status: os.stat_result | None) -> bool:
        """Whether this is its file. status: of that file, if it exists."""
        if status is not None and self.file is not None:
            return (self.file.device, self.file.inode) == (status.st_dev, status.st_ino)
        return self.backing_name == path


def loop_devices(session: Session) -> list[LoopDevice]:
    """All loop devices; those with a number in their name come in its order."""
    infos = [info for info in session.client.info() if info.loop is not None and not info.loop.partition]
    found = []
    for info in sorted(infos, key=lambda info: _order(info.name)):
        try:
            found.append(_device(session, info))
        except NoSuchDevice:
            continue  # the device was removed meanwhile
    return found


def _order(name: str) -> tuple[int, str]:
    numbered = _NUMBERED.fullmatch(name)
    return (int(numbered[1]), "") if numbered else (1 << 32, name)


def _device(session: Session, info: DeviceInfo) -> LoopDevice:
    assert info.loop is not None, "the caller has looked"
    table = LoopTable.read(session.client.table(info.name))
    files = session.client.files(info.name) if table else []
    return LoopDevice(info, info.loop, table, next((file for file in files if table and file.path == table.path), None))


def loop_name(session: Session, text: str) -> str:
    """Name of the device for an argument: a name, the path of its node or socket, or /dev/NAME as in losetup."""
    folder, _, last = text.rpartition("/")
    if folder == "/dev":
        return session.at_node(text) or session.name(last)
    return session.named(text).name


def find_loop(session: Session, text: str) -> LoopDevice:
    """The loop device for an argument. Raises LoopFailed."""
    name = loop_name(session, text)
    try:
        (info,) = session.client.info(name)
    except NoSuchDevice as error:
        why = f"{text}: failed to use device: {os.strerror(errno.ENODEV)}"
        raise LoopFailed(why, what="`blkloom loop -a` lists the loop devices") from error
    if info.loop is None or info.loop.partition:
        kind = "a partition" if info.loop else "no loop device"
        why = f"{text}: failed to use device: {os.strerror(errno.ENOTTY)}"
        raise LoopFailed(why, what=f"it is {kind}; `blkloom remove {name}` removes it")
    return _device(session, info)


def of_file(devices: list[LoopDevice], file: str) -> list[LoopDevice]:
    """The loop devices of a file."""
    path = os.path.realpath(file)
    try:
        status = os.stat(file)
    except OSError:
        status = None
    return [device for device in devices if device.is_backed_by(path, status)]


def free_names(session: Session) -> Iterable[str]:
    """Unused names: loop0, loop1, ..."""
    taken = {info.name for info in session.client.info()}
    return (name for number in range(len(taken) + 4096) if (name := f"loop{number}") not in taken)


def mode_of(session: Session, device: LoopDevice) -> str:
    """Its present I/O mode: file, direct_io or block_map; "" if unknown."""
    if device.table is None or device.info.state == "FAILED":
        return ""
    for _, _, target, status in session.client.status(device.name):
        if target == "loop":
            word = status.split(" ", 1)[0]
            return word if word in _MODES else "direct_io" if "direct_io" in device.table.options else "file"
    return ""


def backing_path(file: str) -> str:
    """The path of a file for a table: without symbolic links, as in losetup. If that path has a newline, which a table
    cannot hold, the path as it was given.
    """
    path = os.path.realpath(file)
    return os.path.abspath(file) if "\n" in path else path


def backing_size(path: str) -> int:
    """Bytes of a file or block device. Raises OSError."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    if not stat.S_ISBLK(status.st_mode):
        what = "must be a regular file or a block device"
        raise BackingError(what, path=path, errno=errno.EINVAL, cure="check the path")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)
