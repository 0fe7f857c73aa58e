"""Commands to the kernel's NBD client, each a function, and what sysfs tells about its devices.

The functions may wait for I/O of the device (a change of its size waits for all requests in flight), and are called on
threads that serve nothing. Source: Linux drivers/block/nbd.c, include/uapi/linux/nbd-netlink.h, nbd.h.

- A device has its sockets from CONNECT on, one for each of its queues. RECONFIGURE replaces only sockets that the
  kernel has found dead, one by one; further sockets are closed without an error.
- A request that was sent through a socket that is dead now is sent again when its time-out expires, which was fixed
  when it was sent. A request that finds all sockets dead waits, at most for the dead-connection time-out.
- If a request is not answered within its time-out, the kernel closes its socket and sends it again through another one.
- DISCONNECT makes all requests fail. The device stays until its last user has closed it.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Final

from blkloom.errors import AttachError
from blkloom.export.kernel_nbd.netlink import Attribute, GenericNetlink, attribute, attributes
from blkloom.units import SECTOR

FAMILY: Final = "nbd"
MODULE: Final = Path("/sys/module/nbd")
_VERSION: Final = 1
_BLOCK_DEVICES: Final = Path("/sys/block")
_MOST_BLOCK: Final = 4096
"""Bytes of a logical block that every kernel takes."""


class Command(IntEnum):
    """Commands of the family."""

    CONNECT = 1
    DISCONNECT = 2
    RECONFIGURE = 3


class _Attribute(IntEnum):
    INDEX = 1
    SIZE_BYTES = 2
    BLOCK_SIZE_BYTES = 3
    TIMEOUT = 4
    SERVER_FLAGS = 5
    SOCKETS = 7
    DEAD_CONN_TIMEOUT = 8
    BACKEND_IDENTIFIER = 10


_SOCKET_ITEM, _SOCKET_DESCRIPTOR = 1, 1


class Flag(IntFlag):
    """What the server can do: transmission flags of the NBD protocol. The kernel ignores those it does not know."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    CAN_MULTI_CONN = 1 << 8


WRITABLE: Final = (
    Flag.HAS_FLAGS | Flag.SEND_FLUSH | Flag.SEND_FUA | Flag.SEND_TRIM | Flag.SEND_WRITE_ZEROES | Flag.CAN_MULTI_CONN
)
READ_ONLY: Final = Flag.HAS_FLAGS | Flag.READ_ONLY | Flag.CAN_MULTI_CONN


def given(
    *,
    number: int | None = None,
    tag: str = "",
    size: int | None = None,
    block_size: int | None = None,
    flags: Flag | None = None,
    timeout: int | None = None,
    dead_timeout: int | None = None,
    sockets: Sequence[int] = (),
) -> list[Attribute]:
    """The attributes of a command. size, block_size: bytes. timeout: of a request, seconds. dead_timeout: seconds that
    requests wait while all sockets are dead. tag: identifies the device's server. sockets: descriptors of this process.
    """
    found: list[Attribute] = []
    if number is not None:
        found.append((_Attribute.INDEX, struct.pack("=I", number)))
    for kind, value in (
        (_Attribute.SIZE_BYTES, size),
        (_Attribute.BLOCK_SIZE_BYTES, block_size),
        (_Attribute.TIMEOUT, timeout),
        (_Attribute.SERVER_FLAGS, flags),
        (_Attribute.DEAD_CONN_TIMEOUT, dead_timeout),
    ):
        if value is not None:
            found.append((kind, struct.pack("=Q", value)))
    if tag:
        found.append((_Attribute.BACKEND_IDENTIFIER, tag.encode() + b"\0"))
    if sockets:
        items = [(_SOCKET_ITEM, attribute(_SOCKET_DESCRIPTOR, struct.pack("=I", descriptor))) for descriptor in sockets]
        found.append((_Attribute.SOCKETS, attributes(items)))
    return found


def path_of(number: int) -> str:
    """Of the block device."""
    return f"/dev/nbd{number}"


def check() -> None:
    """Raises AttachError if this process cannot command the driver."""
    if not MODULE.exists():
        what, cure = "the kernel's NBD client is not loaded", "modprobe nbd"
        raise AttachError(what, path=path_of(0), errno=errno.ENODEV, cure=cure)
    try:
        with GenericNetlink() as kernel:
            kernel.family(FAMILY)
    except OSError as error:
        what = f"the kernel's NBD client cannot be used: {error.strerror}"
        cure = "it takes commands in the first network namespace only, not in that of a container"
        raise AttachError(what, path=path_of(0), errno=error.errno or errno.EIO, cure=cure) from error


def connect(
    *, tag: str, flags: Flag, timeout: int, dead_timeout: int, sockets: Sequence[int], number: int | None = None
) -> int:
    """Makes an empty block device of a free number, or of `number`, whose size `reconfigure` sets. Returns its number.
    Raises AttachError.
    """
    wanted = given(
        number=number,
        tag=tag,
        size=0,
        block_size=SECTOR,  # the kernel keeps the granularity of discards of larger blocks
        flags=flags,
        timeout=timeout,
        dead_timeout=dead_timeout,
        sockets=sockets,
    )
    for reply in _send(Command.CONNECT, number, wanted):
        if _Attribute.INDEX in reply:
            return int(struct.unpack("=I", reply[_Attribute.INDEX])[0])
    raise AttachError("the kernel did not tell the number of the device", path=path_of(0), errno=errno.EPROTO)


def reconfigure(
    number: int,
    *,
    tag: str,
    size: int | None = None,
    block_size: int | None = None,
    timeout: int | None = None,
    dead_timeout: int | None = None,
    sockets: Sequence[int] = (),
) -> None:
    """Changes the size, or time-outs, or replaces dead sockets. Raises AttachError: EINVAL if the device is not
    connected any more, or is another server's.
    """
    wanted = given(
        number=number,
        tag=tag,
        size=size,
        block_size=block_size,
        timeout=timeout,
        dead_timeout=dead_timeout,
        sockets=sockets,
    )
    _send(Command.RECONFIGURE, number, wanted)


def disconnect(number: int) -> None:
    """Makes all requests fail, and removes the device after its last user. Raises AttachError."""
    _send(Command.DISCONNECT, number, given(number=number))


def tag_of(number: int) -> str:
    """The tag of a connected device; "" for one that is not connected."""
    try:
        return (_BLOCK_DEVICES / f"nbd{number}" / "backend").read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError):
        return ""


def sectors_of(number: int) -> int:
    """Size of the block device in sectors. Raises OSError."""
    return int((_BLOCK_DEVICES / f"nbd{number}" / "size").read_text(encoding="ascii"))


def connected() -> list[tuple[int, str]]:
    """Number and tag of each connected device."""
    numbers = [int(name) for path in _BLOCK_DEVICES.glob("nbd*") if (name := path.name.removeprefix("nbd")).isdecimal()]
    return [(number, tag) for number in sorted(numbers) if (tag := tag_of(number))]


def check_block_size(block_size: int) -> None:
    """Raises AttachError if the kernel takes no such logical blocks."""
    if not SECTOR <= block_size <= _MOST_BLOCK:
        what = f"a kernel NBD device has blocks of {_MOST_BLOCK} bytes at most, and this one wants {block_size}"
        raise AttachError(what, path=path_of(0), errno=errno.EINVAL, cure="attach it in another way")


def _send(command: Command, number: int | None, wanted: Sequence[Attribute]) -> list[dict[int, bytes]]:
    path = path_of(number or 0)
    try:
        with GenericNetlink() as kernel:
            return kernel.call(kernel.family(FAMILY), command, wanted, version=_VERSION)
    except OSError as error:
        found = error.errno or errno.EIO
        what = f"the kernel's NBD client refuses the command {command.name}: {os.strerror(found)}"
        cure = {errno.ENOENT: "modprobe nbd", errno.EPERM: "only root may use it"}.get(found, "dmesg may say why")
        raise AttachError(what, path=path, errno=found, cure=cure) from error
