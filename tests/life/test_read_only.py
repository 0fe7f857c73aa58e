"""The active table decides whether a device is writable; former tables have no effect."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from blkloom.control.client import Client
from conformance.nbd_client import READ_ONLY, WRITE, NbdClient

from .conftest import Life, info, until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def life(shared: Life) -> Life:
    """The module's."""
    return shared


def _swap(client: Client, table: str, *, read_only: bool) -> None:
    client.load("disk", table, read_only=read_only)
    client.resume("disk")


@pytest.mark.parametrize("after", ["at once", "a killed worker", "an upgrade"])
@pytest.mark.parametrize("read_only", [True, False], ids=["read-only", "writable"])
def test_the_table_swapped_in_decides(
    life: Life, client: Client, file: Path, connect: Callable[[str], NbdClient], read_only: bool, after: str
) -> None:
    table = f"0 16 linear {file} 0"
    client.create("disk", table=table, read_only=not read_only)
    client.load("disk", table, read_only=read_only)
    assert info(client, "disk").read_only is not read_only, "a table that is not live decided"
    client.resume("disk")
    if after == "a killed worker":
        os.kill(info(client, "disk").worker, signal.SIGKILL)
        until(client, "disk", lambda found: found.restarts == 1)
    elif after == "an upgrade":
        client.upgrade()
    with life.client() as again:
        assert info(again, "disk").read_only is read_only
    nbd = connect("disk")
    assert bool(nbd.flags & READ_ONLY) is read_only
    assert nbd.ask(WRITE, 0, payload=b"w" * 512).error == (errno.EPERM if read_only else 0)
    assert file.read_bytes()[:1] == (b"f" if read_only else b"w")


def test_a_supervisor_that_comes_after_knows_it_too(life: Life, client: Client, file: Path) -> None:
    client.create("disk", table=f"0 16 linear {file} 0", read_only=True)
    _swap(client, "0 16 zero", read_only=False)
    life.kill()
    life.start()
    with life.client() as again:
        assert not info(again, "disk").read_only
        _swap(again, "0 16 zero", read_only=True)
        assert info(again, "disk").read_only


def test_a_device_without_a_table_is_not_read_only(client: Client) -> None:
    assert not client.create("disk", read_only=True).read_only
    client.load("disk", "0 8 zero", read_only=True)
    assert not info(client, "disk").read_only


def test_a_client_that_stays_may_write_as_the_table_under_it_says(
    client: Client, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    client.create("disk", table=f"0 16 linear {file} 0", read_only=True)
    nbd = connect("disk")
    errors = []
    for read_only in (False, True):
        _swap(client, f"0 16 linear {file} 0", read_only=read_only)
        errors.append(nbd.ask(WRITE, 0, payload=b"w" * 512).error)
    assert errors == [0, errno.EPERM]


def test_a_device_may_be_written_to_as_the_one_below_may_be_by_then(
    client: Client, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    table = f"0 16 linear {file} 0"
    client.create("disk", table=table, read_only=True)
    client.create("upper", table="0 8 linear blkloom:disk 8")
    nbd = connect("upper")
    errors = [nbd.ask(WRITE, 0, payload=b"w" * 512).error]
    for read_only in (False, True):
        _swap(client, table, read_only=read_only)
        errors.append(nbd.ask(WRITE, 0, payload=b"w" * 512).error)
    assert errors == [errno.EPERM, 0, errno.EPERM]
