"""Commands to the kernel's ublk driver, each a method.

A command may wait: those about one device for each other, `stop` and `delete` for the device's I/O, and `start` for the
partition table to be read, if the driver is let (`_engine.serve_ublk`). They are called on threads that serve nothing.
A command that has not ended in time goes on in the kernel.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from blkloom import _engine
from blkloom.errors import AttachError
from blkloom.export.ublk.structures import (
    FEATURES_LENGTH,
    INFO_LENGTH,
    DeviceInfo,
    Feature,
    Parameters,
    parse_features,
)

CONTROL_DEVICE: Final = "/dev/ublk-control"
NEEDED: Final = Feature.COMMANDS_ENCODED | Feature.USER_RECOVERY
SECONDS: Final = 30.0
"""For a command that waits for I/O."""


def path_of(number: int) -> str:
    """Of the block device."""
    return f"/dev/ublkb{number}"


def queues_path_of(number: int) -> str:
    """Of the character device that serves it."""
    return f"/dev/ublkc{number}"


def open_control() -> int:
    """A descriptor for `Driver`. Raises AttachError where there is no driver that fits."""
    try:
        control = os.open(CONTROL_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        number = error.errno or errno.EIO
        missing = number in {errno.ENOENT, errno.ENXIO, errno.ENODEV}
        cure = "load the driver: modprobe ublk_drv (Linux 6.5)" if missing else "only root may use it"
        what = f"the ublk driver cannot be used: {os.strerror(number)}"
        raise AttachError(what, path=CONTROL_DEVICE, errno=number, cure=cure) from error
    try:
        Driver(control).check()
    except BaseException:
        os.close(control)
        raise
    return control


class Driver:
    """Commands through a descriptor of /dev/ublk-control, which stays the caller's. Methods raise AttachError."""

    def __init__(self, control: int) -> None:
        self._control = control

    def check(self) -> None:
        """Raises AttachError where the driver lacks something that is always needed."""
        try:
            features = self.features()
        except AttachError as error:
            if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP, errno.ENODEV}:
                raise
            features = Feature(0)
        if missing := NEEDED & ~features:
            what = f"the kernel's ublk driver lacks {missing.name}"
            raise AttachError(what, path=CONTROL_DEVICE, errno=errno.EOPNOTSUPP, cure="Linux 6.5 is needed")

    def features(self) -> Feature:
        """What the driver can do."""
        return parse_features(self._send("get-features", buffer=bytes(FEATURES_LENGTH)))

    def find(self, number: int) -> DeviceInfo | None:
        """None: there is no such device."""
        try:
            return DeviceInfo.parse(self._send("get-info", number, buffer=bytes(INFO_LENGTH)))
        except AttachError as error:
            if error.errno == errno.ENODEV:
                return None
            raise

    def add(self, wanted: DeviceInfo) -> DeviceInfo:
        """Makes a device, which has no block device yet. Its queues, depth and flags may be less than wanted. EEXIST:
        another has that number.
        """
        return DeviceInfo.parse(self._send("add", wanted.number, buffer=wanted.format()))

    def set_parameters(self, number: int, parameters: Parameters) -> None:
        """Before `start`."""
        self._send("set-parameters", number, buffer=parameters.format())

    def start(self, number: int) -> None:
        """The block device appears, served by this process."""
        self._send("start", number, data=os.getpid())

    def stop(self, number: int, *, timeout: float = SECONDS) -> None:
        """The block device disappears, in use or not, after what is in flight has ended."""
        self._send("stop", number, timeout=timeout)

    def delete(self, number: int, *, timeout: float) -> None:
        """Stops it if need be, and waits until no process has its queues open. Raises AttachError with ETIMEDOUT where
        one has: the device goes then as soon as that has ended.
        """
        self._send("delete", number, timeout=timeout)

    def start_recovery(self, number: int) -> None:
        """Another server may serve the queues. EBUSY: the one before has not ended yet."""
        self._send("start-recovery", number)

    def end_recovery(self, number: int) -> None:
        """Requests go on: this process serves the queues."""
        self._send("end-recovery", number, data=os.getpid())

    def quiesce(self, number: int, *, timeout: float) -> None:
        """Has the driver send no more requests to this process, and return the tags that it does not use. Requests wait
        for another server from now on. For a device with Feature.QUIESCE. EBUSY: all tags of a queue were in use until
        the timeout.
        """
        self._send("quiesce", number, data=int(timeout * 1000), timeout=timeout + SECONDS)

    def update_size(self, number: int, sectors: int) -> None:
        """Where the driver has Feature.UPDATE_SIZE."""
        self._send("update-size", number, data=sectors)

    def _send(
        self, command: str, number: int | None = None, *, data: int = 0, buffer: bytes = b"", timeout: float = SECONDS
    ) -> bytes:
        try:
            if number is None:
                return _engine.ublk_control(self._control, command, buffer=buffer, timeout=timeout)
            return _engine.ublk_control(
                self._control, command, device=number, data=data, buffer=buffer, timeout=timeout
            )
        except TimeoutError as error:
            raise AttachError(
                f"the ublk driver has not answered the command {command} for {timeout:g} s",
                path=CONTROL_DEVICE if number is None else path_of(number),
                errno=errno.ETIMEDOUT,
                cure="its I/O waits for something: see `blkloom info`",
            ) from error
        except OSError as error:
            raise AttachError(
                f"the ublk driver refuses the command {command}: {os.strerror(error.errno or errno.EIO)}",
                path=CONTROL_DEVICE if number is None else path_of(number),
                errno=error.errno or errno.EIO,
                cure="only root may use it" if error.errno in {errno.EPERM, errno.EACCES} else "",
            ) from error
