"""Clients that read no replies: no operation waits for them, and their later replies are correct."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

from blkloom.control.client import Client
from conformance.nbd_client import READ, WRITE, NbdClient, Style

from .conftest import Life, read

LENGTH = 8 << 20


def hoard(life: Life, client: Client, device: str, data: bytes) -> NbdClient:
    """A client that reads all of it four times and takes nothing."""
    hoarding = NbdClient.unix(life.socket(device), style=Style.SIMPLE)
    assert hoarding.ask(WRITE, payload=data).error == 0
    for _ in range(4):
        hoarding.send(READ, 0, len(data))
    while client.stats(device)[device]["device"]["read"]["count"] == 0:
        pass
    return hoarding


def test_an_upgrade_takes_a_client_that_takes_no_replies_along(
    life: Life, client: Client, connect: Callable[[str], NbdClient]
) -> None:
    client.create("lower", table="0 131072 ram")
    client.create("upper", table="0 131072 linear blkloom:lower 0")
    data = random.Random(13).randbytes(LENGTH)
    hoarding = [hoard(life, client, name, data) for name in ("lower", "upper")]
    others = [connect(name) for name in ("lower", "upper")]
    assert client.upgrade() == 1
    for other in others:
        assert read(other, 4096) == data[4096 : 4096 + 512]
    for slow in hoarding:
        for _ in range(4):
            assert slow.receive()[1].data == data
        slow.close()


def test_a_stop_waits_once_for_all_clients_that_take_no_replies_and_names_them(life: Life, client: Client) -> None:
    data = random.Random(14).randbytes(LENGTH)
    client.create("lower", table="0 131072 ram")
    client.create("upper", table="0 131072 linear blkloom:lower 0")
    hoarding = [hoard(life, client, name, data) for name in ("lower", "upper")]
    life.stop()
    log = (life.run_dir.parent / "supervisor.log").read_text()
    for name in ("lower", "upper"):
        assert f"unix pid {os.getpid()} uid {os.getuid()}, export '{name}': it did not take its last" in log
    for slow in hoarding:
        slow.close()
