"""Devices of a supervisor on an NBD server: killed workers, upgrades, killed servers, devices above."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from blkloom.control.client import Client
from conformance.nbd_client import NbdClient
from nbd_by_hand import FLUSH, SIZE, WRITE, ByHand, Honest
from nbd_sources import Source

from .conftest import Life, info, until
from .reconnecting import BLOCK, ReconnectingWriter

pytestmark = pytest.mark.timeout(280)
BLOCKS = 64
SECTORS = 2 * BLOCKS * BLOCK // 512


@pytest.fixture
def source(program: Callable[[str, str], str], tmp_path: Path) -> Iterator[Source]:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(SECTORS * 512))
    with Source(tmp_path, program("nbdkit", "nbdkit"), "-f", "file", disk) as source:
        yield source


@pytest.fixture
def contents(tmp_path: Path) -> Callable[[], bytes]:
    return (tmp_path / "disk.img").read_bytes


def writers(life: Life, name: str = "disk") -> list[ReconnectingWriter]:
    found = [ReconnectingWriter(life.socket(name), first=half * BLOCKS, blocks=BLOCKS, seed=half) for half in range(2)]
    for writer in found:
        writer.start()
    return found


def flushes(load: list[ReconnectingWriter], more: int = 2) -> None:
    for writer in load:
        writer.wait_for_flushes(more)


def finish(load: list[ReconnectingWriter]) -> bytes:
    flushes(load)
    for writer in load:
        writer.finish()
    return b"".join(writer.expected() for writer in load)


def kill_worker(client: Client, name: str = "disk") -> None:
    before = info(client, name).worker
    os.kill(before, signal.SIGKILL)
    until(client, name, lambda found: found.worker not in (0, before))


def test_the_next_worker_connects_again(
    source: Source, life: Life, client: Client, contents: Callable[[], bytes]
) -> None:
    client.create("disk", table=f"0 {SECTORS} nbd {source.uri()}")
    load = writers(life)
    for turn in range(6):
        flushes(load)
        kill_worker(client) if turn % 2 else client.upgrade()
    written = finish(load)
    assert contents() == written


def test_clients_do_not_notice_that_the_server_is_killed(
    source: Source, life: Life, client: Client, contents: Callable[[], bytes]
) -> None:
    client.create("disk", table=f"0 {SECTORS} nbd {source.uri()}")
    load = writers(life)
    for _ in range(4):
        flushes(load)
        source.kill()
        source.start()
    written = finish(load)
    assert contents() == written
    assert [writer.reconnects for writer in load] == [0, 0]


def test_a_worker_that_begins_without_its_server_waits_for_it(
    source: Source, life: Life, client: Client, contents: Callable[[], bytes]
) -> None:
    client.create("disk", table=f"0 {SECTORS} nbd {source.uri()}")
    load = writers(life)
    flushes(load)
    source.kill()
    kill_worker(client)
    source.start()
    written = finish(load)
    assert contents() == written


@pytest.mark.parametrize(
    "above",
    [
        f"0 {SECTORS} linear blkloom:base 0",
        f"0 {SECTORS} delay blkloom:base 0 1",
        f"0 {SECTORS} snapshot blkloom:base blkloom:store P 16",
        f"0 {SECTORS} mirror core 1 32 2 blkloom:base 0 blkloom:copy 0",
        f"0 {SECTORS} striped 1 8 blkloom:base 0",
    ],
    ids=lambda table: table.split()[2],
)
def test_devices_above_lose_nothing_when_the_server_is_killed(
    source: Source, life: Life, client: Client, above: str
) -> None:
    client.create("base", table=f"0 {SECTORS} nbd {source.uri()} 1 connections=2")
    client.create("store", table=f"0 {8 * SECTORS} ram")
    client.create("copy", table=f"0 {SECTORS} ram")
    client.create("disk", table=above)
    load = writers(life)
    for _ in range(3):
        flushes(load, 1)
        source.kill()
        source.start()
    finish(load)
    assert [writer.reconnects for writer in load] == [0, 0]


def test_a_table_for_an_export_that_has_grown_is_loaded_under_clients(
    source: Source, life: Life, client: Client, tmp_path: Path
) -> None:
    client.create("disk", table=f"0 {SECTORS} nbd {source.uri()}")
    load = writers(life)
    flushes(load)
    os.truncate(tmp_path / "disk.img", 2 * SECTORS * 512)
    source.kill()
    source.start()
    client.load("disk", f"0 {2 * SECTORS} nbd {source.uri()}")
    client.resume("disk")
    finish(load)
    assert info(client, "disk").size == 2 * SECTORS * 512
    assert [writer.reconnects for writer in load] == [0, 0]


def reload_without_flush(client: Client) -> None:
    client.suspend("disk", flush=False)
    client.load("disk", client.table("disk"))
    client.resume("disk", flush=False)


@pytest.mark.parametrize("renew", [kill_worker, reload_without_flush])
def test_a_flush_covers_what_was_written_before_the_death_of_a_worker_and_a_reload(
    life: Life, client: Client, tmp_path: Path, renew: Callable[[Client], None]
) -> None:
    honest = Honest()
    with ByHand(tmp_path, honest.serve) as server, ExitStack() as stack:
        client.create("disk", table=f"0 {SIZE // 512} nbd {server.uri} 1 connections=1")
        stack.callback(client.remove, "disk", deferred=True)  # when the clients below have left
        with closing(NbdClient.unix(life.socket("disk"))) as nbd:
            assert nbd.ask(WRITE, 0, 512, payload=b"x" * 512).error == 0
        renew(client)
        assert [request.kind for _, request in honest.requests] == [WRITE]
        with closing(NbdClient.unix(life.socket("disk"))) as nbd:
            assert nbd.ask(FLUSH).error == 0
        assert [request.kind for _, request in honest.requests] == [WRITE, FLUSH]
