"""Stacked devices of a supervisor: suspended, renamed and removed in the right order."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.errors import DeviceBusy, TableError
from conformance.nbd_client import READ, NbdClient

from .conftest import Life, info, is_answered, read, until

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("stack")]


@pytest.fixture
def life(shared: Life) -> Life:
    """The module's."""
    return shared


@pytest.fixture
def stack(client: Client, file: Path) -> None:
    """`top` on `middle` on `bottom` on a file; by name, and by socket."""
    client.create("bottom", table=f"0 16 linear {file} 0")
    client.create("middle", table="0 16 linear blkloom:bottom 0")
    client.create("top", table=f"0 16 linear {client.run_dir.device('middle')} 0")


def test_devices_that_stand_on_each_other_share_a_worker_and_know_it(
    client: Client, connect: Callable[[str], NbdClient]
) -> None:
    bottom, middle, top = client.info()
    assert bottom.worker == middle.worker == top.worker
    assert (bottom.holders, middle.holders, top.holders) == (["middle"], ["top"], [])
    assert (bottom.open_count, middle.open_count, top.open_count) == (1, 1, 0)
    assert middle.deps == ["blkloom:bottom"]
    assert read(connect("top")) == b"f" * 512


def test_suspending_a_lower_device_suspends_those_above_and_resuming_it_wakes_them(
    client: Client, connect: Callable[[str], NbdClient]
) -> None:
    nbd = connect("top")
    client.suspend("bottom")
    assert [found.state for found in client.info()] == ["SUSPENDED"] * 3
    nbd.send(READ, 0, 512)
    assert not is_answered(nbd)
    client.resume("bottom")
    assert [found.state for found in client.info()] == ["ACTIVE"] * 3
    assert nbd.receive()[1].data == b"f" * 512


def test_one_that_was_suspended_by_itself_stays_so(client: Client) -> None:
    client.suspend("top")
    client.suspend("bottom")
    client.resume("bottom")
    assert [found.state for found in client.info()] == ["ACTIVE", "ACTIVE", "SUSPENDED"]


def test_a_table_waiting_above_is_not_swapped_in_when_a_lower_device_is_resumed(client: Client) -> None:
    client.load("top", "0 16 zero")
    client.suspend("bottom")
    client.resume("bottom")
    assert client.table("top", inactive=True) == "0 16 zero"
    assert info(client, "top").types == ["linear"]


@pytest.mark.parametrize("lower", ["blkloom:top", "blkloom:middle", "blkloom:bottom"])
def test_nothing_comes_to_stand_on_itself(client: Client, lower: str) -> None:
    with pytest.raises(TableError, match="device 'bottom' would be stacked on itself"):
        client.load("bottom", f"0 16 linear {lower} 0")
    assert not info(client, "bottom").inactive


def test_a_device_others_stand_on_is_not_removed(client: Client) -> None:
    for force in (False, True):
        with pytest.raises(DeviceBusy, match="Device middle is in use: device 'top' is stacked on it"):
            client.remove("middle", force=force)
    assert len(client.info()) == 3


def test_all_are_removed_from_the_top(client: Client) -> None:
    assert client.remove_all() == []
    assert client.info() == []


def test_deferred_removals_go_down_the_stack(client: Client) -> None:
    client.remove("bottom", deferred=True)
    client.remove("middle", deferred=True)
    assert [found.deferred for found in client.info()] == [True, True, False]
    client.remove("top")
    while client.info():  # they go on their own
        pass


def test_a_deferred_removal_is_due_when_the_table_above_is_another(client: Client) -> None:
    client.remove("middle", deferred=True)
    client.load("top", "0 16 zero")
    client.resume("top")
    while "middle" in [found.name for found in client.info()]:
        pass
    assert info(client, "bottom").holders == []


def test_a_renamed_device_keeps_those_that_stand_on_it(
    life: Life, client: Client, connect: Callable[[str], NbdClient]
) -> None:
    nbd = connect("top")
    client.rename("bottom", name="the base")
    client.rename("middle", name="between")
    assert client.table("between") == "0 16 linear blkloom:the\\ base 0"
    assert client.table("top") == f"0 16 linear {life.socket('between')} 0"
    assert info(client, "the base").holders == ["between"]
    assert read(nbd) == b"f" * 512
    os.kill(info(client, "top").worker, signal.SIGKILL)
    until(client, "top", lambda found: found.restarts == 1 and found.worker > 0)
    assert read(connect("top")) == b"f" * 512
