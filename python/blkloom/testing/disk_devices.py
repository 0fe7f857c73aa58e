"""Devices that a disk for tests is made of: in this process, or of a supervisor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from typing_extensions import override

from blkloom import Client, Device, NoSuchDevice, Place, Sectors, Table, UsageError, format_table
from blkloom import open as open_device
from blkloom.table.words import join_words
from blkloom.testing.serving import served


class DiskDevices(Protocol):
    """The devices of one disk. A device may refer to those that were made before it, as `blkloom:NAME`."""

    def create(self, name: str, table: Table) -> None:
        """Makes a device. Raises BlkloomError, OSError."""

    def replace(self, name: str, table: Table) -> None:
        """Gives a device another table, while it is used. Raises BlkloomError, OSError."""

    def message(self, name: str, words: list[str]) -> None:
        """Sends a message to the only target of a device. Raises BlkloomError, OSError."""

    def status(self, name: str) -> str:
        """The status of the only target of a device. Raises BlkloomError."""
        ...

    def device(self, name: str) -> Device:
        """The device as an object. Raises UsageError if it is not in this process."""
        ...

    @contextmanager
    def served(self, name: str) -> Iterator[str]:
        """The NBD URI of the device inside of the block."""
        ...

    def close(self) -> None:
        """Removes all devices, the last first; they are not flushed. Raises BlkloomError, OSError."""


class DevicesOfProcess(DiskDevices):
    """Devices of this process."""

    def __init__(self) -> None:
        self._devices: dict[str, Device] = {}

    @override
    def create(self, name: str, table: Table) -> None:
        self._devices[name] = open_device(table, name=name, devices=dict(self._devices))

    @override
    def replace(self, name: str, table: Table) -> None:
        self._devices[name].load(table)
        self._devices[name].resume(flush=False)  # a flush may fail: it is a disk that fails

    @override
    def message(self, name: str, words: list[str]) -> None:
        self._devices[name].message(Sectors(0), words)

    @override
    def status(self, name: str) -> str:
        return self._devices[name].status()[0][3]

    @override
    def device(self, name: str) -> Device:
        return self._devices[name]

    @override
    @contextmanager
    def served(self, name: str) -> Iterator[str]:
        with served(self._devices[name], name=name) as uri:
            yield uri

    @override
    def close(self) -> None:
        for device in reversed(self._devices.values()):
            device.close(flush=False)


class DevicesOfSupervisor(DiskDevices):
    """Devices of the supervisor of a client."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._names: list[str] = []

    @override
    def create(self, name: str, table: Table) -> None:
        self._client.create(name, table=format_table(table))
        self._names.append(name)

    @override
    def replace(self, name: str, table: Table) -> None:
        self._client.load(name, format_table(table))
        self._client.resume(name, flush=False)

    @override
    def message(self, name: str, words: list[str]) -> None:
        self._client.message(name, 0, join_words(words, Place("message")))

    @override
    def status(self, name: str) -> str:
        return self._client.status(name)[0][3]

    @override
    def device(self, name: str) -> Device:
        raise UsageError(
            f"device '{name}' is in a worker of the supervisor", cure="use `served()`, or attach it with the client"
        )

    @override
    @contextmanager
    def served(self, name: str) -> Iterator[str]:
        yield f"nbd+unix:///?socket={self._client.run_dir.device(name)}"

    @override
    def close(self) -> None:
        for name in reversed(self._names):
            try:
                self._client.remove(name, force=True, retry=True)  # closed files end a moment later
            except NoSuchDevice:  # the test has removed it
                continue
