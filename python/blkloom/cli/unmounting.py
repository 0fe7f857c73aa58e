"""Unmounts the file systems on nodes and removes the devices, for `stop --unmount` at shutdown.

A device may have its file on a file system that is mounted from another one, so this goes round by round, as long as
one of them is unmounted or removed.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

from blkloom.attach.users import mount_places
from blkloom.cli.connecting import directory
from blkloom.control.client import Client
from blkloom.control.states import DeviceInfo
from blkloom.errors import BlkloomError, MountError
from blkloom.export.fuse.mount import Mount, unmount
from blkloom.printing import described, printable


def has_ended(run_dir: str | None) -> bool:
    """Whether there is no supervisor, and a former one has left no devices. Then nothing may connect to the socket:
    at shutdown systemd starts no supervisor for it, and the command would wait in vain.
    """
    where = directory(run_dir)
    try:
        lock = os.open(where.lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return not where.has_devices()
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return not where.has_devices()


def unmount_and_remove(client: Client) -> Iterator[str]:
    """Unmounts and removes as much as possible. Yields a line for each mount and device that is left."""
    left: list[str] = []
    while infos := client.info():
        left = [line for info in reversed(infos) for line in _unmount(info)]
        left += [f"device '{printable(name)}' stays: {why}" for name, why in client.remove_all()]
        if _state(client.info()) == _state(infos):
            break
    yield from left


def _unmount(info: DeviceInfo) -> Iterator[str]:
    if info.node is None or not info.node.path:
        return
    for place in reversed(mount_places(info.node.path, info.node.link)):
        if place.reached != place.path:  # in another mount namespace
            continue
        try:
            unmount(Mount(place.path))
        except (BlkloomError, OSError) as error:
            why = error.what if isinstance(error, MountError) else described(error)
            yield f"{printable(place.path)} (device '{printable(info.name)}') stays mounted: {why}"


def _state(infos: list[DeviceInfo]) -> list[tuple[str, int]]:
    """What changes in a round that gets further."""
    return [
        (info.name, len(mount_places(info.node.path, info.node.link)) if info.node is not None else 0) for info in infos
    ]
