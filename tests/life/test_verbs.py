"""Every verb with a real supervisor and its workers: its effect, its refusals, and what it does not change."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from blkloom.control.client import Client
from blkloom.control.messages import Selector
from blkloom.errors import (
    BackingError,
    BusyError,
    DeviceBusy,
    DeviceExists,
    NoSuchDevice,
    TableError,
    UnknownTarget,
    UsageError,
)
from conformance.nbd_client import FLUSH, READ, READ_ONLY, WRITE, NbdClient

from .conftest import Life, info, is_answered, read, until

DATA = bytes(range(256)) * 2
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def life(shared: Life) -> Life:
    """The module's."""
    return shared


# create


def test_a_device_is_made_live_with_all_that_is_told_of_it(life: Life, client: Client, file: Path) -> None:
    made = client.create("my disk", table=f"0 8 linear {file} 0\n8 8 zero", uuid="u-1", minor=7)
    assert made == info(client, "my disk") == info(client, Selector(uuid="u-1")) == info(client, Selector(minor=7))
    assert (made.name, made.uuid, made.minor, made.state) == ("my disk", "u-1", 7, "ACTIVE")
    assert (made.live, made.inactive, made.size, made.targets) == (True, False, 8192, 2)
    assert (sorted(made.types), made.deps, made.holders) == (["linear", "zero"], [str(file)], [])
    (export,) = made.exports
    assert (export.unix, export.automatic) == (str(life.socket("my\\x20disk")), True)
    assert client.table("my disk") == f"0 8 linear {file} 0\n8 8 zero"
    assert [line[:3] for line in client.status("my disk")] == [(0, 8, "linear"), (8, 8, "zero")]


def test_a_device_without_a_table_waits_for_one(client: Client) -> None:
    made = client.create("empty")
    assert (made.live, made.inactive, made.size) == (False, False, 0)
    assert (client.table("empty"), client.status("empty")) == ("", [])
    client.resume("empty")
    client.load("empty", "0 16 zero")
    assert (client.table("empty"), client.table("empty", inactive=True)) == ("", "0 16 zero")
    client.resume("empty")
    assert (client.table("empty"), client.table("empty", inactive=True)) == ("0 16 zero", "")


def test_a_device_made_suspended_has_its_table_ready(client: Client) -> None:
    made = client.create("later", table="0 8 zero", suspended=True)
    assert (made.state, made.live, made.inactive) == ("SUSPENDED", False, True)
    client.resume("later")
    assert (info(client, "later").state, info(client, "later").live) == ("ACTIVE", True)


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        ({"name": "there", "table": "0 8 zero"}, DeviceExists, "a device 'there' exists; choose another name"),
        ({"name": "new", "uuid": "taken"}, DeviceExists, "device 'there' has the uuid 'taken'"),
        ({"name": "new", "minor": 0}, DeviceExists, "device 'there' has minor number 0"),
        ({"name": "new", "minor": -1}, UsageError, "-1 is not a minor number"),
        ({"name": "a/b"}, UsageError, 'It contains "/"'),
        ({"name": "new", "table": "0 8 zorro"}, UnknownTarget, "table:1:5: unknown target type: 'zorro'"),
        ({"name": "new", "table": "0 8 linear blkloom:no 0"}, TableError, "no such blkloom device: 'blkloom:no'"),
        ({"name": "new", "table": "0 8 linear blkloom:new 0"}, TableError, "no such blkloom device"),
        ({"name": "new", "table": "0 8 linear /no/file 0"}, BackingError, "/no/file: "),
    ],
)
def test_a_device_that_cannot_be_made_leaves_nothing_behind(
    life: Life, client: Client, call: dict[str, Any], kind: type[Exception], said: str
) -> None:
    client.create("there", table="0 8 zero", uuid="taken")
    before, workers = client.info(), client.version()["workers"]
    with pytest.raises(kind) as caught:
        client.create(**call)
    assert said in str(caught.value)
    assert client.info() == before
    assert client.version()["workers"] == workers
    assert [path.name for path in (life.run_dir / "dev").iterdir()] == ["there"]


def test_a_place_in_a_table_is_that_of_the_callers_text(client: Client) -> None:
    with pytest.raises(TableError) as caught:
        client.create("new", table="0 8 zero\n8 8 linear /dev/null x", source="disk.table")
    place = caught.value.place
    assert (place.source, place.line, place.column, caught.value.value) == ("disk.table", 2, 22, "x")


def test_a_free_name_may_be_taken_by_the_first_client(client: Client, beside: Callable[..., Future[Any]]) -> None:
    attempts = [beside("create", "same", table="0 8 zero") for _ in range(6)]
    errors = [attempt.exception() for attempt in attempts]
    assert sum(error is None for error in errors) == 1
    assert {type(error) for error in errors if error} == {DeviceExists}
    assert len(client.info()) == 1


def test_files_are_opened_with_the_callers_working_directory_and_rights(
    client: Client, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    assert client.create("here", table="0 16 linear disk.img 0").size == 8192


@pytest.mark.parametrize("kind", ["fifo", "socket", "directory"])
def test_what_is_no_file_is_refused_at_once_and_named(client: Client, tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    with socket.socket(socket.AF_UNIX) as listening:
        {"fifo": lambda: os.mkfifo(path), "socket": lambda: listening.bind(str(path)), "directory": path.mkdir}[kind]()
        with pytest.raises(BackingError) as caught:
            client.create("new", table=f"0 8 linear {path} 0")
    assert caught.value.path == str(path)
    assert client.info() == []


def test_a_file_another_device_writes_to_is_refused_unless_shared(client: Client, file: Path) -> None:
    client.create("first", table=f"0 16 linear {file} 0")
    with pytest.raises(BusyError) as caught:
        client.create("second", table=f"0 16 linear {file} 0")
    assert caught.value.path == str(file)
    assert f"{file}: already in use by device 'first'; blkloom remove first ends that" in str(caught.value)
    assert "process" not in str(caught.value)
    client.remove("first")
    client.create("second", table=f"0 16 linear {file} 0")


# load, clear, resume


def test_a_loaded_table_changes_nothing_until_the_device_is_resumed(
    client: Client, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    client.create("disk", table=f"0 16 linear {file} 0")
    nbd = connect("disk")
    client.load("disk", "0 16 zero")
    assert (info(client, "disk").inactive, read(nbd)) == (True, b"f" * 512)
    client.resume("disk")
    assert (info(client, "disk").inactive, read(nbd)) == (False, bytes(512))


def test_a_cleared_table_is_not_swapped_in(client: Client, file: Path, connect: Callable[[str], NbdClient]) -> None:
    client.create("disk", table=f"0 16 linear {file} 0")
    client.load("disk", "0 16 zero")
    client.clear("disk")
    client.clear("disk")
    assert (info(client, "disk").inactive, client.table("disk", inactive=True)) == (False, "")
    client.resume("disk")
    assert read(connect("disk")) == b"f" * 512


@pytest.mark.parametrize(
    "table",
    ["0 16 zorro", "8 8 zero", "0 16 linear /no/file 0", "0 99 linear {file} 0", "0 16 linear blkloom:missing 0"],
)
def test_a_table_that_cannot_be_loaded_leaves_both_slots(
    client: Client, file: Path, connect: Callable[[str], NbdClient], table: str
) -> None:
    client.create("disk", table=f"0 16 linear {file} 0")
    client.load("disk", "0 24 zero")
    nbd, before = connect("disk"), info(client, "disk")
    with pytest.raises((TableError, BackingError)):
        client.load("disk", table.format(file=file))
    assert read(nbd) == b"f" * 512
    assert info(client, "disk").inactive
    assert client.table("disk", inactive=True) == "0 24 zero"
    client.resume("disk")
    assert (info(client, "disk").size, before.size) == (24 * 512, 8192)


def test_a_read_only_load_makes_the_device_refuse_writes(
    client: Client, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    client.create("disk", table=f"0 16 linear {file} 0", read_only=True)
    nbd = connect("disk")
    assert nbd.flags & READ_ONLY
    assert nbd.ask(WRITE, 0, payload=DATA).error == errno.EPERM
    assert file.read_bytes() == b"f" * 8192


# suspend


def test_suspending_parks_requests_and_resuming_lets_them_go(
    client: Client, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    client.create("disk", table=f"0 16 linear {file} 0")
    nbd = connect("disk")
    assert nbd.ask(WRITE, 512, payload=DATA).error == 0
    client.suspend("disk")
    client.suspend("disk")
    assert info(client, "disk").state == "SUSPENDED"
    assert file.read_bytes()[512:1024] == DATA
    cookies = {nbd.send(WRITE, 0, payload=DATA), nbd.send(READ, 512, 512), nbd.send(FLUSH)}
    assert not is_answered(nbd), "a suspended device answers"
    assert file.read_bytes()[:512] == b"f" * 512
    client.resume("disk")
    replies = dict(nbd.receive() for _ in cookies)
    assert {cookie: reply.error for cookie, reply in replies.items()} == dict.fromkeys(cookies, 0)
    assert file.read_bytes()[:512] == DATA
    assert info(client, "disk").state == "ACTIVE"


def test_what_is_parked_goes_to_the_table_that_is_swapped_in(
    client: Client, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    client.create("disk", table="0 16 error")
    nbd = connect("disk")
    client.suspend("disk")
    nbd.send(READ, 0, 512)
    client.load("disk", f"0 16 linear {file} 0")
    client.resume("disk")
    _, reply = nbd.receive()
    assert (reply.error, reply.data) == (0, b"f" * 512)


def test_a_suspended_device_stays_so_when_its_worker_is_replaced(
    client: Client, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    worker = client.create("disk", table=f"0 16 linear {file} 0").worker
    client.suspend("disk")
    os.kill(worker, signal.SIGKILL)
    until(client, "disk", lambda found: found.worker not in (0, worker))
    nbd = connect("disk")
    nbd.send(READ, 0, 512)
    assert not is_answered(nbd)
    client.resume("disk")
    assert nbd.receive()[1].data == b"f" * 512


# remove


def test_a_device_with_a_client_is_busy_and_says_so(client: Client, connect: Callable[[str], NbdClient]) -> None:
    client.create("disk", table="0 16 zero")
    nbd = connect("disk")
    until(client, "disk", lambda found: found.connections == 1)
    with pytest.raises(DeviceBusy, match=r"Device disk is in use: 1 client is connected; .*--deferred or --force"):
        client.remove("disk")
    assert read(nbd) == bytes(512)


def test_a_removed_device_is_gone_with_its_socket_and_its_worker(life: Life, client: Client) -> None:
    worker = client.create("disk", table="0 16 zero").worker
    ended = os.pidfd_open(worker)
    client.remove("disk")
    assert not life.socket("disk").exists()
    assert select.select([ended], [], [], 0)[0], "the worker runs"
    os.close(ended)
    with pytest.raises(NoSuchDevice, match="Device disk not found"):
        client.remove("disk")


def test_force_makes_a_busy_device_fail_its_io(client: Client, file: Path, connect: Callable[[str], NbdClient]) -> None:
    client.create("disk", table=f"0 16 linear {file} 0")
    nbd = connect("disk")
    until(client, "disk", lambda found: found.connections == 1)
    with pytest.raises(DeviceBusy, match="1 client is connected; all its I/O fails from now on") as busy:
        client.remove("disk", force=True)
    assert "--force" not in str(busy.value), "advice to do what was just done"
    assert client.table("disk") == "0 16 error"
    assert nbd.ask(READ, 0, 512).error == errno.EIO
    nbd.close()
    client.remove("disk", retry=True)
    assert client.info() == []


def test_a_suspended_device_with_parked_requests_is_removed_by_force(
    client: Client, connect: Callable[[str], NbdClient]
) -> None:
    client.create("disk", table="0 16 zero")
    nbd = connect("disk")
    client.suspend("disk")
    nbd.send(READ, 0, 512)
    with pytest.raises(DeviceBusy):
        client.remove("disk", force=True)
    assert nbd.receive()[1].error == errno.EIO


def test_a_deferred_removal_comes_when_the_last_client_leaves(
    life: Life, client: Client, connect: Callable[[str], NbdClient]
) -> None:
    client.create("disk", table="0 16 zero")
    first, second = connect("disk"), connect("disk")
    until(client, "disk", lambda found: found.connections == 2)
    client.remove("disk", deferred=True)
    first.close()
    found = until(client, "disk", lambda found: found.connections == 1)
    assert found.deferred
    assert read(second) == bytes(512)
    second.close()
    while client.info():
        pass
    assert not life.socket("disk").exists()


def test_a_deferred_removal_is_cancelled_by_a_message_for_the_device(
    client: Client, connect: Callable[[str], NbdClient]
) -> None:
    client.create("disk", table="0 16 zero")
    nbd = connect("disk")
    until(client, "disk", lambda found: found.connections == 1)
    client.remove("disk", deferred=True)
    assert client.message("disk", 0, "@Cancel_Deferred_Remove") is None
    nbd.close()
    found = until(client, "disk", lambda found: found.connections == 0)
    assert not found.deferred
    with pytest.raises(UsageError, match="'@stats_list' is no message for a device"):
        client.message("disk", 0, "@stats_list")
    with pytest.raises(UsageError, match="takes no words, and not 'now'"):
        client.message("disk", 0, "@cancel_deferred_remove now")


def test_a_retried_removal_waits_for_the_client_to_leave(
    client: Client, connect: Callable[[str], NbdClient], beside: Callable[..., Future[Any]]
) -> None:
    client.create("disk", table="0 16 zero")
    nbd = connect("disk")
    until(client, "disk", lambda found: found.connections == 1)
    removing = beside("remove", "disk", retry=True)
    assert read(nbd) == bytes(512)
    nbd.close()
    removing.result(60)
    assert client.info() == []


def test_a_device_is_removed_once_however_many_ask(client: Client, beside: Callable[..., Future[Any]]) -> None:
    client.create("disk", table="0 16 zero")
    errors = [asked.exception() for asked in [beside("remove", "disk") for _ in range(6)]]
    assert sum(error is None for error in errors) == 1
    assert {type(error) for error in errors if error} == {NoSuchDevice}


def test_all_but_the_busy_ones_are_removed_and_those_are_told(
    client: Client, connect: Callable[[str], NbdClient]
) -> None:
    for name in "abc":
        client.create(name, table="0 16 zero")
    connect("b")
    until(client, "b", lambda found: found.connections == 1)
    ((name, why),) = client.remove_all()
    assert (name, [found.name for found in client.info()]) == ("b", ["b"])
    assert "1 client is connected" in why


# rename


def test_a_renamed_device_takes_its_socket_along_and_keeps_its_clients(
    life: Life, client: Client, connect: Callable[[str], NbdClient]
) -> None:
    client.create("old", table="0 16 zero")
    nbd = connect("old")
    client.rename("old", name="new name")
    assert read(nbd) == bytes(512)
    assert not life.socket("old").exists()
    other = connect("new\\x20name")
    assert read(other) == bytes(512)
    (export,) = info(client, "new name").exports
    assert (export.name, export.unix) == ("new name", str(life.socket("new\\x20name")))
    with pytest.raises(NoSuchDevice):
        client.info("old")
    client.create("old", table="0 8 zero")


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("taken", DeviceExists, "a device 'taken' exists"),
        ("a/b", UsageError, 'It contains "/"'),
        ("control", UsageError, "reserved"),
        ("n" * 128, UsageError, "too long"),
    ],
)
def test_a_name_that_cannot_be_had_leaves_the_device_as_it_was(
    life: Life, client: Client, name: str, kind: type[Exception], said: str
) -> None:
    client.create("disk", table="0 16 zero")
    client.create("taken", table="0 16 zero")
    before = client.info()
    with pytest.raises(kind, match=said):
        client.rename("disk", name=name)
    assert client.info() == before
    assert life.socket("disk").is_socket()


def test_a_uuid_is_given_once_and_stays(client: Client) -> None:
    client.create("disk", table="0 16 zero")
    client.create("other", table="0 16 zero", uuid="u-other")
    with pytest.raises(DeviceExists, match="device 'other' has the uuid 'u-other'"):
        client.rename("disk", uuid="u-other")
    client.rename("disk", uuid="u-disk")
    with pytest.raises(UsageError, match="has the uuid 'u-disk' already"):
        client.rename("disk", uuid="u-2")
    client.rename("disk", name="renamed")
    assert info(client, Selector(uuid="u-disk")).name == "renamed"


@pytest.mark.parametrize("call", [{}, {"name": "a", "uuid": "b"}])
def test_rename_wants_a_name_or_a_uuid(client: Client, call: dict[str, str]) -> None:
    client.create("disk", table="0 16 zero")
    with pytest.raises(UsageError, match="either a name or a uuid"):
        client.rename("disk", **call)


def test_a_name_too_long_for_a_socket_is_cut_there_and_known_everywhere_else(
    life: Life, client: Client, file: Path
) -> None:
    client.create("short", table=f"0 16 linear {file} 0")
    client.rename("short", name="n" * 127)
    (export,) = info(client, "n" * 127).exports
    with closing(NbdClient.unix(export.unix)) as nbd:
        assert read(nbd) == b"f" * 512
    worker = info(client, "n" * 127).worker
    os.kill(worker, signal.SIGKILL)
    assert until(client, "n" * 127, lambda found: found.worker not in (0, worker)).exports == [export]
    with closing(NbdClient.unix(export.unix)) as nbd:
        assert read(nbd) == b"f" * 512


# message, wait


def test_messages_are_for_targets_that_understand_them(client: Client) -> None:
    client.create("disk", table="0 8 zero\n8 8 error")
    for sector, target in ((0, "zero"), (7, "zero"), (8, "error")):
        with pytest.raises(UsageError, match=f"target {target} understands no message 'do this'"):
            client.message("disk", sector, "do this")
    with pytest.raises(UsageError, match="sector outside device: 16; it has 16 sectors"):
        client.message("disk", 16, "do this")
    with pytest.raises(NoSuchDevice):
        client.message("missing", 0, "do this")


def test_waiting_ends_when_the_size_changes(client: Client, beside: Callable[..., Future[Any]]) -> None:
    client.create("disk", table="0 16 zero")
    before = info(client, "disk").event
    waiting = beside("wait", "disk", before)
    client.load("disk", "0 16 error")
    client.resume("disk")
    assert info(client, "disk").event == before, "a table of the same size is no event"
    client.load("disk", "0 24 zero")
    client.resume("disk")
    assert waiting.result(60) > before
    assert client.wait("disk", before) == info(client, "disk").event


def test_waiting_ends_when_the_device_does(client: Client, beside: Callable[..., Future[Any]]) -> None:
    client.create("disk", table="0 16 zero")
    waiting = [beside("wait", "disk", 1000 * number) for number in (1, 2)]
    while not all(future.running() for future in waiting):
        pass
    client.remove("disk")
    for future in waiting:
        with pytest.raises(UsageError, match="Device disk not found"):
            future.result(60)


def test_waiting_ends_when_the_worker_dies(client: Client, beside: Callable[..., Future[Any]]) -> None:
    made = client.create("disk", table="0 16 zero")
    waiting = beside("wait", "disk", made.event)
    os.kill(made.worker, signal.SIGKILL)
    assert waiting.result(60) > made.event
