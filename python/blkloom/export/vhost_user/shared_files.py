"""`SharedFiles`: what a front-end shares with its device: the memory of the virtual machine, the region of the requests
in flight, and the log in which written pages are marked. All are its descriptors, mapped for the engine.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from blkloom import _engine
from blkloom.export.vhost_user.configuration import MOST_DESCRIPTORS, MOST_QUEUES
from blkloom.export.vhost_user.descriptors import is_memory
from blkloom.export.vhost_user.messages import Inflight, Log, ProtocolError, Region

_PAGE: Final = 4096
_OWN_INFLIGHT: Final = MOST_QUEUES * _engine.vhost_user_inflight_length(MOST_DESCRIPTORS)


class SharedFiles:
    """Owns the descriptors; -1: none. close: closes descriptors of a front-end. may_end_this: the front-end may end
    this process anyway, so its memory may shrink.
    """

    def __init__(self, close: Callable[[list[int]], None], *, may_end_this: bool) -> None:
        self._close = close
        self._may_end_this = may_end_this
        self.regions: list[int] = []
        """Descriptors of the regions of memory."""
        self.inflight = self.log = self.log_event = -1
        self.guest_memory: _engine.GuestMemory | None = None
        self.inflight_memory: _engine.SharedMemory | None = None
        self.dirty_log: _engine.VhostUserLog | None = None

    def set_regions(self, descriptors: list[int]) -> None:
        """Replaces those of the memory, which is not mapped then."""
        self._close(self.regions)
        self.regions, self.guest_memory = descriptors, None

    def set_inflight(self, descriptor: int) -> None:
        """Replaces that of the requests in flight, which is not mapped then."""
        if self.inflight >= 0:
            self._close([self.inflight])
        self.inflight, self.inflight_memory = descriptor, None

    def set_log(self, descriptor: int) -> None:
        """Replaces that of the log, which is not mapped then."""
        if self.log >= 0:
            self._close([self.log])
        self.log, self.dirty_log = descriptor, None

    def set_log_event(self, descriptor: int) -> None:
        """Replaces the eventfd that is raised when pages were marked."""
        if self.log_event >= 0:
            self._close([self.log_event])
        self.log_event = descriptor
        if self.dirty_log is not None:
            self.dirty_log.set_event(descriptor if descriptor >= 0 else None)

    def map_memory(self, regions: Sequence[Region]) -> None:
        """Raises ProtocolError."""
        self._check(self.regions)
        parts = [
            (descriptor, region.offset, region.size, region.guest, region.user)
            for descriptor, region in zip(self.regions, regions, strict=True)
        ]
        try:
            self.guest_memory = _engine.GuestMemory(parts, may_end_this=self._may_end_this) if parts else None
        except (OSError, ValueError) as error:
            raise ProtocolError(f"memory of the virtual machine cannot be used: {error}") from error

    def map_inflight(self, inflight: Inflight | None) -> None:
        """Makes a region for requests in flight if the front-end has none. Raises ProtocolError."""
        size, offset = _OWN_INFLIGHT, 0
        if inflight is not None:
            size, offset = inflight.size, inflight.offset
        elif self.inflight < 0:
            self.inflight = sealed_memory(_OWN_INFLIGHT)
        self._check([self.inflight])
        try:
            self.inflight_memory = _engine.SharedMemory(self.inflight, offset, size, may_end_this=self._may_end_this)
        except (OSError, ValueError) as error:
            raise ProtocolError(f"memory for requests in flight cannot be used: {error}") from error

    def map_log(self, log: Log | None) -> None:
        """Maps the log, if there is one. Raises ProtocolError."""
        if log is None:
            return
        self._check([self.log])
        try:
            memory = _engine.SharedMemory(self.log, log.offset, log.size, may_end_this=self._may_end_this)
            self.dirty_log = _engine.VhostUserLog(memory)
            self.dirty_log.set_event(self.log_event if self.log_event >= 0 else None)
        except (OSError, ValueError) as error:
            raise ProtocolError(f"memory for the log of written pages cannot be used: {error}") from error

    def forget_inflight(self, index: int, stride: int) -> None:
        """Makes the part of a drained vring a new one: the front-end may start the vring with other indices."""
        os.pwrite(self.inflight, bytes(stride), index * stride)

    def close(self) -> None:
        """Closes all descriptors."""
        self.set_regions([])
        self.set_inflight(-1)
        self.set_log(-1)
        self.set_log_event(-1)

    def _check(self, descriptors: Iterable[int]) -> None:
        """Refuses files that the engine would refuse: its close of its duplicates may wait. Raises ProtocolError."""
        if not self._may_end_this and not all(is_memory(descriptor) for descriptor in descriptors):
            raise ProtocolError("memory without seals can shrink: share a memfd that is sealed (F_SEAL_SHRINK)")


def sealed_memory(size: int) -> int:
    """A memfd that cannot shrink. Raises ProtocolError."""
    try:
        made = os.memfd_create("blkloom-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(made, -(-size // _PAGE) * _PAGE)
        fcntl.fcntl(made, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        raise ProtocolError(f"no memory for requests in flight: {os.strerror(error.errno or errno.EIO)}") from error
    return made
