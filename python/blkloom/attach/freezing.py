"""Freezes and thaws the file systems on block devices, like lockfs of dmsetup. Source: ioctl_fsfreeze(2).

A freeze writes dirty data to the device and waits for it, so these functions run as tasks of `process.py`.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from typing import Final

from blkloom.attach.users import MountPlace, mount_places
from blkloom.errors import AttachError

_FIFREEZE: Final = 0xC0045877
_FITHAW: Final = 0xC0045878
_NOT_FREEZABLE: Final = frozenset({errno.EOPNOTSUPP, errno.ENOTTY})


def freeze(devices: Sequence[str], link: str) -> list[str]:
    """Freezes every file system that is mounted from these devices; returns their mount points. link: another path of
    a device. A file system that is already frozen is skipped. After an error, all are thawed. Raises AttachError.
    """
    frozen: list[str] = []
    try:
        for places in _file_systems(devices, link):
            for place in places:
                number = _ioctl(place, _FIFREEZE)
                if not number:
                    frozen.append(place.path)
                elif number not in (errno.EBUSY, *_NOT_FREEZABLE):
                    what = f"the file system cannot be frozen: {os.strerror(number)}"
                    cure = "unmount it, or suspend with --nolockfs"
                    raise AttachError(what, path=place.path, errno=number, cure=cure)
                break
    except BaseException:
        thaw(devices, link)
        raise
    return frozen


def write_back(devices: Sequence[str], link: str) -> None:
    """Writes the dirty data of the file systems on these devices. Raises AttachError."""
    if freeze(devices, link):
        thaw(devices, link)


def thaw(devices: Sequence[str], link: str) -> None:
    """Thaws every frozen file system that is mounted from these devices. Raises AttachError."""
    for places in _file_systems(devices, link):
        number = _ioctl(places[0], _FITHAW)
        if number not in (0, errno.EINVAL, *_NOT_FREEZABLE):  # INVAL: it is not frozen
            what = f"the file system cannot be thawed: {os.strerror(number)}"
            cure = f"fsfreeze --unfreeze {places[0].path}"
            raise AttachError(what, path=places[0].path, errno=number, cure=cure)


def _file_systems(devices: Sequence[str], link: str) -> Iterator[list[MountPlace]]:
    """The mount places of each file system."""
    places: dict[str, list[MountPlace]] = {}
    for device in devices:
        for place in mount_places(device, link):
            places.setdefault(place.number, []).append(place)
    yield from places.values()


def _ioctl(place: MountPlace, command: int) -> int:
    """Runs an ioctl on a mount place; returns its errno, 0 for success."""
    try:
        descriptor = os.open(place.reached, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return error.errno or errno.EIO
    try:
        fcntl.ioctl(descriptor, command, 0)
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        os.close(descriptor)
    return 0
