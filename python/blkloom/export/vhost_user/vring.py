"""`Vring`: one queue of a front-end's device: what the front-end has said of it, and the engine's transport.

Owns its descriptors. Runs on the event loop.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec

from blkloom import _engine
from blkloom.export.vhost_user.configuration import MOST_DESCRIPTORS
from blkloom.export.vhost_user.messages import ProtocolError

if TYPE_CHECKING:
    from blkloom.export.vhost_user.messages import VringAddresses


class VringState(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The part of a vring that is no descriptor. base: see `_engine.serve_vhost_user`, `next`. failed: the driver has
    broken the rules; it is not served until the front-end starts it again.
    """

    size: int = 0
    base: int = 0
    descriptors: int = 0
    available: int = 0
    used: int = 0
    used_log: int | None = None
    has_addresses: bool = False
    enabled: bool = False
    failed: bool = False


class Vring:
    """A vring. kick, error: descriptors of eventfds; -1: none. transport: while it is served."""

    def __init__(self, state: VringState | None = None) -> None:
        self.state = state or VringState()
        self.kick = self.called = self.error = -1
        self.call = _engine.VhostUserCall()
        self.transport: _engine.Transport | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether the front-end has started it."""
        state = self.state
        return state.enabled and state.has_addresses and state.size > 0 and self.kick >= 0 and not state.failed

    def set_size(self, size: int) -> None:
        """Raises ProtocolError."""
        if not 0 < size <= MOST_DESCRIPTORS or size & (size - 1):
            raise ProtocolError(f"a queue of {size} descriptors; a power of two up to {MOST_DESCRIPTORS} is possible")
        self.state.size = size

    def set_addresses(self, addresses: VringAddresses) -> None:
        """Takes over the addresses of its areas."""
        state = self.state
        state.descriptors, state.available, state.used = addresses.descriptors, addresses.available, addresses.used
        state.used_log = addresses.used_log
        state.has_addresses = True

    def set_kick(self, descriptor: int) -> None:
        """Owns the descriptor; -1 stops the vring."""
        self._close(self.kick)
        self.kick = descriptor

    def set_call(self, descriptor: int) -> None:
        """Owns the descriptor; -1: the driver polls. Raises OSError."""
        self._close(self.called)
        self.called = descriptor
        self.call.replace(None if descriptor < 0 else descriptor)

    def set_error(self, descriptor: int) -> None:
        """Owns the descriptor; -1: none."""
        self._close(self.error)
        self.error = descriptor

    def report_failure(self) -> None:
        """Tells the front-end that the driver has broken the rules, where it wants to know."""
        self.state.failed = True
        if self.error >= 0:
            _engine.raise_event(self.error)

    def arguments(self) -> dict[str, Any]:
        """Arguments of `_engine.serve_vhost_user`."""
        state = self.state
        return {
            "kick": self.kick,
            "call": self.call,
            "size": state.size,
            "descriptors": state.descriptors,
            "available": state.available,
            "used": state.used,
            "next": state.base,
        }

    def close(self) -> None:
        """Closes the descriptors."""
        self.set_kick(-1)
        self.set_error(-1)
        self.set_call(-1)

    @staticmethod
    def _close(descriptor: int) -> None:
        if descriptor >= 0:
            os.close(descriptor)
