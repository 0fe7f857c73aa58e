"""The descriptors that outlive workers: by device and label. One thread."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Sequence

import msgspec

from blkloom import open_files
from blkloom.control.states import Label

_log = logging.getLogger(__name__)


class Store:
    """Owns what it is given."""

    def __init__(self) -> None:
        self._kept: dict[int, dict[Label, int]] = {}

    def put(self, label: Label, fd: int) -> None:
        """Keeps `fd`; one of that label makes way."""
        self.drop([label])
        self._kept.setdefault(label.device, {})[label] = fd

    def drop(self, labels: Iterable[Label]) -> None:
        """Closes those of these labels that there are."""
        for label in labels:
            kept = self._kept.get(label.device, {})
            if (fd := kept.pop(label, None)) is not None:
                open_files.close(fd)
            if not kept:
                self._kept.pop(label.device, None)

    def find(self, label: Label) -> int | None:
        """The descriptor; it stays the store's."""
        return self._kept.get(label.device, {}).get(label)

    def of(self, devices: Collection[int]) -> tuple[list[Label], list[int]]:
        """Labels and descriptors of these devices, in one order; they stay the store's."""
        found = [pair for device in devices for pair in self._kept.get(device, {}).items()]
        return [label for label, _ in found], [fd for _, fd in found]

    def passing(self, device: int) -> list[Label]:
        """Labels that have a meaning only while a device is handed over."""
        return [
            label
            for label in self._kept.get(device, {})
            if label.role == "connection" or (label.role == "memory" and label.load == 0)
        ]

    def keep_only(self, device: int, loads: Collection[int]) -> None:
        """Closes what belongs to other loads; load 0, the device itself, stays."""
        self.drop([label for label in self._kept.get(device, {}) if label.load and label.load not in loads])

    def forget(self, device: int) -> None:
        """All of a device that has gone."""
        self.drop(list(self._kept.get(device, {})))

    def take(self, labels: Sequence[Label], fds: list[int]) -> None:
        """What a worker says to keep, in the order of the labels; the descriptors become the store's. They are
        fewer where this process had no more free: then the log says what is lost if the worker ends.
        """
        for label in labels:
            if not fds:
                what = f"{label.role} {label.key} of device {label.device}"
                _log.error("%s could not be stored and is lost if its worker ends: %s", what, open_files.advice())
                continue
            self.put(label, fds.pop(0))
        while fds:
            open_files.close(fds.pop())

    def write(self) -> int:
        """For a program that is executed in place of this one: a memfd that `read` understands. The
        descriptors are inherited from now on.
        """
        pairs = [pair for kept in self._kept.values() for pair in kept.items()]
        for _, fd in pairs:
            os.set_inheritable(fd, True)
        memory = os.memfd_create("blkloom-store", os.MFD_CLOEXEC)
        with open(memory, "wb", closefd=False) as file:
            file.write(msgspec.json.encode(pairs))
        return memory

    def read(self, memory: int) -> None:
        """Takes what `write` left; closes the memfd."""
        with open(memory, "rb") as file:
            file.seek(0)
            pairs = msgspec.json.decode(file.read(), type=list[tuple[Label, int]])
        for label, fd in pairs:
            os.set_inheritable(fd, False)
            self.put(label, fd)

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))
