"""The switch of the write cache of a disk over vhost-user."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

import blkloom
from blkloom import Extent, LoadContext, LoadedTarget, TargetSpec
from blkloom.units import Bytes, Sectors
from vhost_user_driver import F_CACHE_SWITCH, F_FLUSH, F_INDIRECT, FrontEndError, Machine
from vhost_user_served import VhostUserServed

BLOCK = 4096
pytestmark = pytest.mark.timeout(120)


class Noting(TargetSpec):
    """Notes of each write whether it must be durable."""

    name = "noting"

    def load(self, context: LoadContext, start: Sectors, length: Sectors) -> LoadedTarget:
        return LoadedNoting(self, [(0, length, Extent.fault())])


class LoadedNoting(LoadedTarget):
    """See `Noting`."""

    writes = True
    noted: ClassVar[list[bool]] = []

    def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:
        self.noted.append(fua)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[VhostUserServed]:
    """A device that notes its writes."""
    with (
        blkloom.open("0 2048 noting", targets=[Noting]) as device,
        VhostUserServed(tmp_path / "socket", device) as served,
    ):
        yield served


def _is_durable(machine: Machine) -> bool:
    machine.write(0, bytes(BLOCK))
    return LoadedNoting.noted.pop()


def _is_on(machine: Machine) -> bool:
    return bool(machine.configuration(32, 1)[0])


def test_the_driver_switches_the_write_cache_and_no_one_else(served: VhostUserServed) -> None:
    with Machine.connected(served.path) as machine:
        assert (_is_on(machine), _is_durable(machine)) == (True, False)
        machine.set_write_cache(on=False)
        assert (_is_on(machine), _is_durable(machine)) == (False, True)
        served.hand_over()
        assert (_is_on(machine), _is_durable(machine)) == (False, True)
        # As after the death of the worker: the monitor does not set it again.
        machine.hang_up()
        machine.connect(served.path)
        assert (_is_on(machine), _is_durable(machine)) == (False, True)
        machine.set_write_cache(on=True)
        assert (_is_on(machine), _is_durable(machine)) == (True, False)
        machine.set_write_cache(on=False)


def test_another_process_begins_with_a_write_cache(served: VhostUserServed) -> None:
    with Machine.connected(served.path) as machine:
        machine.set_write_cache(on=False)
    script = "import sys; sys.path[:0] = [sys.argv[1]]; from vhost_user_driver import Machine\n"
    script += "with Machine.connected(sys.argv[2]) as machine: print(machine.configuration(32, 1)[0])"
    command = [sys.executable, "-c", script, os.path.dirname(__file__) + "/..", str(served.path)]
    for expected in ("1", "1"):
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert printed.strip() == expected
    with Machine.connected(served.path) as machine:
        assert (_is_on(machine), _is_durable(machine)) == (True, False)


def test_a_driver_that_does_not_know_the_switch_has_the_cache_that_flushes_need(served: VhostUserServed) -> None:
    for wanted, is_durable in ((F_FLUSH, False), (0, True), (F_INDIRECT, True)):
        with Machine.connected(served.path, wanted=wanted) as machine:
            machine.set_write_cache(on=False)
            assert _is_durable(machine) is is_durable


def test_a_driver_that_cannot_flush_has_no_write_cache(served: VhostUserServed) -> None:
    with Machine.connected(served.path, wanted=F_CACHE_SWITCH) as machine:
        assert (_is_on(machine), _is_durable(machine)) == (False, True)


def test_nothing_else_in_the_configuration_is_changed(served: VhostUserServed) -> None:
    with Machine.connected(served.path) as machine:
        before = machine.configuration()
        for offset, size, data in ((0, 8, bytes(8)), (31, 2, b"\0\0"), (32, 1, b""), (32, 2, b"\0\0"), (33, 1, b"\0")):
            with pytest.raises(FrontEndError):
                machine.control.tell(25, struct.pack("=III", offset, size, 0) + data)
        assert machine.configuration() == before
