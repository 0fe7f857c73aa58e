"""The descriptor store: open descriptors by device and label.

A worker keeps the descriptors of its devices in one. The supervisor keeps copies of them in another, so that they
outlive the worker. Any thread may call it; a thread that loads a table uses only the labels of its device.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Protocol

import msgspec

from blkloom import json_text, open_files
from blkloom.control.states import FailedSync, Label, file_path


class Mirror(Protocol):
    """Another process that also keeps descriptors of a store. Does not wait for it, and logs errors."""

    def keep(self, label: Label, fd: int) -> None:
        """Sends a copy of the descriptor. The caller still owns `fd`."""

    def forget(self, label: Label) -> None:
        """Makes the process close its copy."""


class DescriptorStore:
    """Owns its descriptors. For each label, it also records whether a sync through the descriptor has failed.

    mirror: is told of all descriptors that are added and removed.
    """

    def __init__(self, mirror: Mirror | None = None) -> None:
        self._mirror = mirror
        self._kept: dict[int, dict[Label, int]] = {}
        self._failed: dict[Label, int] = {}
        self._lock = threading.Lock()

    def put(self, label: Label, fd: int) -> None:
        """Adds `fd` and owns it; closes the former descriptor of the label."""
        if self._mirror is not None:
            if self.find(label) is not None:
                self._mirror.forget(label)
            self._mirror.keep(label, fd)
        self.adopt(label, fd)

    def adopt(self, label: Label, fd: int) -> None:
        """As `put`, for a descriptor of which the mirror has a copy already."""
        with self._lock:
            kept = self._kept.setdefault(label.device, {})
            former = kept.pop(label, None)
            kept[label] = fd
        if former is not None:
            open_files.close(former)

    def receive(self, labels: Sequence[Label], fds: list[int]) -> list[Label]:
        """Adds descriptors that have come in a message, in the order of the labels, and owns them; closes those without
        a label. Returns the labels without a descriptor: those were lost if this process had no free ones.
        """
        received = list(fds)
        fds.clear()
        for label, fd in zip(labels, received, strict=False):
            self.put(label, fd)
        for fd in received[len(labels) :]:
            open_files.close(fd)
        return list(labels[len(received) :])

    def find(self, label: Label) -> int | None:
        """Finds a descriptor; the store still owns it."""
        return self._kept.get(label.device, {}).get(label)

    def take(self, label: Label) -> int | None:
        """Takes a descriptor out of the store; the caller owns it."""
        with self._lock:
            kept = self._kept.get(label.device, {})
            fd = kept.pop(label, None)
            if not kept:
                self._kept.pop(label.device, None)
        if fd is not None and self._mirror is not None:
            self._mirror.forget(label)
        return fd

    def drop(self, labels: Iterable[Label]) -> None:
        """Closes the descriptors of these labels, if any, and drops their failed syncs."""
        for label in labels:
            self._failed.pop(label, None)
            if (fd := self.take(label)) is not None:
                open_files.close(fd)

    def labels(self, device: int) -> list[Label]:
        """Labels of a device (its minor number)."""
        return list(self._kept.get(device, {}))

    def of(self, devices: Iterable[int]) -> list[tuple[Label, int]]:
        """Labels and descriptors of these devices, in that order; the store still owns them."""
        return [pair for device in devices for pair in list(self._kept.get(device, {}).items())]

    def files(self, device: int, load: int) -> dict[str, int]:
        """One descriptor of each open file of a load, by path, without directories. The store still owns them."""
        return {
            file_path(label): fd
            for label, fd in self.of([device])
            if (label.load, label.role) == (load, "file") and not label.key.endswith("/")
        }

    def outlived(self, device: int, loads: Collection[int]) -> list[Label]:
        """Labels of the device that belong to other loads than `loads`, and not to the device itself (load 0)."""
        labels = dict.fromkeys([*self.labels(device), *(failed.label for failed in self.failed_syncs(device))])
        return [label for label in labels if label.load and label.load not in loads]

    def drop_unknown(self, is_known: Callable[[Label], bool]) -> list[Label]:
        """Drops the descriptors whose label is not known; returns these labels."""
        unknown = [label for label, _ in self if not is_known(label)]
        self.drop(unknown)
        return unknown

    def passing(self, device: int) -> list[Label]:
        """Labels that are used only during a hand-over."""
        return [
            label
            for label in self.labels(device)
            if label.role == "connection" or (label.role == "memory" and label.load == 0)
        ]

    def note_failed_sync(self, label: Label, number: int) -> None:
        """Records the errno of a sync that failed through the descriptor of this label."""
        self._failed[label] = number

    def sync_error(self, label: Label) -> int:
        """The errno of the failed sync; 0: none has failed."""
        return self._failed.get(label, 0)

    def failed_syncs(self, device: int) -> list[FailedSync]:
        """Failed syncs of a device."""
        failed = list(self._failed.items())
        return [FailedSync(label=label, errno=number) for label, number in failed if label.device == device]

    def write(self) -> int:
        """Writes the labels into a memfd for `read` in the next program (execve), and makes the descriptors
        inheritable. Failed syncs are not written.
        """
        pairs = list(self)
        for _, fd in pairs:
            os.set_inheritable(fd, True)
        memory = os.memfd_create("blkloom-store", os.MFD_CLOEXEC)
        with open(memory, "wb", closefd=False) as file:
            file.write(json_text.encode(pairs))
        return memory

    def read(self, memory: int) -> None:
        """Reads the memfd of `write`, and closes it."""
        with open(memory, "rb") as file:
            file.seek(0)
            pairs = json_text.decode(file.read(), msgspec.json.Decoder(list[tuple[Label, int]]))
        for label, fd in pairs:
            os.set_inheritable(fd, False)
            self.adopt(label, fd)

    def __iter__(self) -> Iterator[tuple[Label, int]]:
        return iter(self.of(list(self._kept)))

    def __len__(self) -> int:
        return len(self.of(list(self._kept)))
