"""Client for a run directory without a supervisor: answers like a supervisor without devices.

So a query, or a change of a device that cannot exist, starts no process and makes no directory. If a supervisor has
started meanwhile, each call goes to it.
"""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from blkloom.control import messages as m
from blkloom.control.client import Client
from blkloom.control.rundir import RunDir
from blkloom.errors import NoSuchDevice, NoSupervisor
from blkloom.version import VERSION


class AbsentClient(Client):
    """The client for `run_dir`, where no supervisor answers."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self._there: Client | None = None

    @override
    def call(self, call: m.ClientCall, *, bounded: bool = True) -> Any:
        """Raises NoSuchDevice for every call that names a device."""
        if there := self._look():
            return there.call(call, bounded=bounded)
        match call:
            case m.GetInfo(device="") | m.RemoveAll():
                return []
            case m.MakeNodes():
                return None
            case m.GetStats(device=""):
                return {}
            case m.Upgrade():
                return {"workers": 0}
            case m.GetVersion():
                return {
                    "version": VERSION,
                    "protocol": m.PROTOCOL,
                    "pid": 0,
                    "devices": 0,
                    "workers": 0,
                    "run_dir": str(self.run_dir.path),
                    "limits": {},
                }
            case m.Create() | m.Reap():
                raise NoSupervisor(f"no supervisor answers at {self.run_dir.control}", cure="start one")
            case _:
                raise NoSuchDevice(
                    f"Device {getattr(call, 'device', '')} not found", cure="`blkloom ls` lists the devices"
                )

    @override
    def stop(self, *, force: bool = False) -> None:
        """Does nothing: there is no supervisor to end."""
        if there := self._look():
            there.stop(force=force)

    def _look(self) -> Client | None:
        if self._there is None:
            try:
                self._there = Client(self.run_dir.path, start=False)
            except NoSupervisor:
                return None
        return self._there

    @override
    def close(self) -> None:
        if self._there is not None:
            self._there.close()
