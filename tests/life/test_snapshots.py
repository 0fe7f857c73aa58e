"""`blkloom snapshot`: writable snapshots of live devices, under clients, a mounted file system, deaths and upgrades."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from blkloom import Fault
from blkloom.control.client import Client
from blkloom.errors import BlkloomError, DeviceBusy, DeviceExists, TableError, UsageError
from conformance.file_systems import MiB, mounted, run
from conformance.nbd_client import WRITE, NbdClient

from .attached import Program, ext4, make_disk, said, write_and_sync
from .attached import life as life_with_nodes
from .conftest import Life, info, until

__all__ = ["life_with_nodes"]
pytestmark = pytest.mark.timeout(120)
Connect = Callable[[str], NbdClient]
TABLE = "0 2048 ram"
CHUNK = 4096


def write(nbd: NbdClient, byte: bytes, chunk: int) -> None:
    """Fills a chunk."""
    assert nbd.ask(WRITE, chunk * CHUNK, payload=byte * CHUNK).error == 0


def seen(client: Client, device: str, chunks: int = 4) -> str:
    """The first byte of each chunk."""
    data = client.read(device, 0, chunks * CHUNK)
    return data[::CHUNK].replace(b"\0", b".").decode()


@pytest.fixture
def disk(client: Client, connect: Connect) -> NbdClient:
    """A connection to the device `disk`, whose chunks are a, b, c, and zeros."""
    client.create("disk", table=TABLE)
    nbd = connect("disk")
    for chunk, byte in enumerate((b"a", b"b", b"c")):
        write(nbd, byte, chunk)
    return nbd


def test_snapshots_keep_what_was_and_have_changes_of_their_own(
    client: Client, connect: Connect, disk: NbdClient, tmp_path: Path
) -> None:
    client.snapshot("disk", "first", chunk=CHUNK)
    write(disk, b"B", 1)
    client.snapshot("disk", "second", file=tmp_path / "cow", chunk=CHUNK)
    write(disk, b"C", 2)
    write(connect("first"), b"x", 0)
    assert (seen(client, "disk"), seen(client, "first"), seen(client, "second")) == ("aBC.", "xbc.", "aBc.")
    listed = [(found.name, found.origin, found.store) for found in client.snapshots()]
    assert listed == [("first", "disk", "blkloom:first-cow"), ("second", "disk", str(tmp_path / "cow"))]
    assert client.snapshots("first") == []


def test_the_last_deleted_snapshot_leaves_the_device_as_it_was(client: Client, disk: NbdClient, tmp_path: Path) -> None:
    client.snapshot("disk", "first")
    client.snapshot("disk", "second", file=tmp_path / "cow")
    client.delete_snapshot("first")
    assert client.table("disk") == "0 2048 snapshot-origin blkloom:disk-real"
    write(disk, b"A", 0)
    assert seen(client, "second") == "abc."
    client.delete_snapshot("second")
    assert client.table("disk") == TABLE
    until(client, "disk", lambda _: [found.name for found in client.info()] == ["disk"])
    assert seen(client, "disk") == "Abc."
    client.snapshot("disk", "third")
    client.remove("third", retry=True)  # as any other device
    assert client.snapshots() == []
    client.delete_snapshot("disk")
    assert client.table("disk") == TABLE


def test_a_merge_gives_the_device_what_the_snapshot_contains(
    client: Client, connect: Connect, disk: NbdClient, tmp_path: Path
) -> None:
    client.snapshot("disk", "before", chunk=CHUNK)
    client.snapshot("disk", "other", file=tmp_path / "cow", chunk=CHUNK)
    write(disk, b"A", 0)
    write(disk, b"D", 3)
    own = connect("before")
    write(own, b"y", 1)
    with pytest.raises(DeviceBusy, match="device 'disk' is in use: 1 clients; unmount or disconnect"):
        client.merge_snapshot("before")
    for nbd, name in ((own, "before"), (disk, "disk")):
        nbd.disconnect()
        until(client, name, lambda found: found.connections == 0)
    assert client.merge_snapshot("before") == "disk"
    assert seen(client, "disk") == "ayc."
    client.finish_merge("disk")
    assert (seen(client, "disk"), seen(client, "other")) == ("ayc.", "abc.")
    assert [found.name for found in client.snapshots()] == ["other"]
    client.delete_snapshot("other")
    assert (client.table("disk"), seen(client, "disk")) == (TABLE, "ayc.")
    with pytest.raises(UsageError, match="no snapshot is being merged into device 'disk'"):
        client.finish_merge("disk")


def test_snapshots_and_merges_survive_killed_workers_an_upgrade_and_a_killed_supervisor(
    client: Client, connect: Connect, life: Life, disk: NbdClient
) -> None:
    client.snapshot("disk", "before", chunk=CHUNK)
    write(disk, b"A", 0)
    os.kill(info(client, "disk").worker, signal.SIGKILL)
    again = connect("disk")
    write(again, b"B", 1)
    client.upgrade()
    write(again, b"C", 2)
    again.disconnect()
    until(client, "disk", lambda found: found.connections == 0)
    life.kill()
    life.start()
    with life.client() as other:
        assert seen(other, "before") == "abc."
        other.merge_snapshot("before")
        before = info(other, "disk").worker
        os.kill(before, signal.SIGKILL)
        until(other, "disk", lambda found: found.worker not in (0, before))
        other.finish_merge("disk")
        assert (other.table("disk"), seen(other, "disk")) == (TABLE, "abc.")


def test_no_verb_loses_the_exceptions_of_a_transient_snapshot(
    client: Client, connect: Connect, disk: NbdClient, tmp_path: Path
) -> None:
    (tmp_path / "cow").write_bytes(bytes(1 << 20))
    client.snapshot("disk", "other")  # so that disk-real and an origin are there
    table = f"0 2048 snapshot blkloom:disk-real {tmp_path}/cow N 8"
    client.create("transient", table=table)
    write(disk, b"A", 0)
    nbd = connect("transient")
    write(nbd, b"x", 1)
    nbd.disconnect()
    until(client, "transient", lambda found: found.connections == 0)

    def kill_worker() -> None:
        before = info(client, "transient").worker
        os.kill(before, signal.SIGKILL)
        until(client, "transient", lambda found: found.worker not in (0, before))

    def reload() -> None:
        client.load("transient", table=table)
        client.resume("transient")

    for change in (
        lambda: client.fault("transient", Fault.slow(0)),
        kill_worker,
        lambda: client.fault("transient", None),
        lambda: client.snapshot("transient", "of"),
        client.upgrade,
        lambda: client.delete_snapshot("of"),
        reload,
        kill_worker,
        reload,
    ):
        change()
        assert seen(client, "transient") == "axc."
    with pytest.raises(TableError, match="would be lost"):
        client.load("transient", table=table.replace("N 8", "N 16"))


def test_nothing_changes_where_a_snapshot_is_refused(client: Client, disk: NbdClient, tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"data")
    with pytest.raises(FileExistsError):
        client.snapshot("disk", "before", file=tmp_path / "there")
    with pytest.raises(BlkloomError, match="power of 2"):
        client.snapshot("disk", "before", chunk=3 * 512)
    with pytest.raises(BlkloomError, match="power of 2"):
        client.snapshot("disk", "before", file=tmp_path / "cow", chunk=3 * 512)
    assert not (tmp_path / "cow").exists()
    with pytest.raises(DeviceExists):
        client.snapshot("disk", "disk")
    with pytest.raises(UsageError, match="device 'disk' is no snapshot"):
        client.delete_snapshot("disk")
    client.fault("disk", Fault.slow(1))
    with pytest.raises(UsageError, match="device 'disk' has the fault 'slow 1ms'; blkloom fault disk off"):
        client.snapshot("disk", "before")
    client.fault("disk", None)
    client.suspend("disk")
    with pytest.raises(UsageError, match="device 'disk' is suspended"):
        client.snapshot("disk", "before")
    client.resume("disk")
    until(client, "disk", lambda _: [found.name for found in client.info()] == ["disk"])
    assert (client.table("disk"), seen(client, "disk")) == (TABLE, "abc.")


def test_a_read_only_device_stays_read_only(client: Client, file: Path) -> None:
    client.create("disk", table=f"0 16 linear {file} 0", read_only=True)
    client.snapshot("disk", "before")
    assert (info(client, "disk").read_only, info(client, "before").read_only) == (True, False)
    client.fault("before", Fault.slow(0))
    client.fault("before", None)
    client.delete_snapshot("before")
    assert info(client, "disk").read_only


def test_a_full_store_leaves_the_device_whole_and_cannot_be_merged(client: Client, disk: NbdClient) -> None:
    client.snapshot("disk", "small", size=4 * CHUNK, chunk=CHUNK)
    for chunk in range(3):
        write(disk, b"z", chunk)
    assert seen(client, "disk") == "zzz."
    assert client.status("small")[0][3] == "Invalid"
    disk.disconnect()
    until(client, "disk", lambda found: found.connections == 0)
    with pytest.raises(UsageError, match="snapshot 'small' is Invalid"):
        client.merge_snapshot("small")
    client.delete_snapshot("small")
    assert (client.table("disk"), seen(client, "disk")) == (TABLE, "zzz.")


def test_a_snapshot_of_a_mounted_file_system_is_clean(life_with_nodes: Life, program: Program, tmp_path: Path) -> None:
    with life_with_nodes.client() as client:
        make_disk(client, tmp_path)
        node = client.attach("disk", block_device=True).node.path
        with ext4(program, node, tmp_path / "mnt") as place:
            (place / "not-synced").write_bytes(b"1" * MiB)
            client.snapshot("disk", "before")
            write_and_sync(place / "after")
            copy = client.attach("before", block_device=True).node.path
            run(program("e2fsck", "e2fsprogs"), "-f", "-n", copy)
            with mounted(program, "ext4", copy, tmp_path / "copy", "rw") as other:
                assert (other / "not-synced").read_bytes() == b"1" * MiB
                assert not (other / "after").exists()
                write_and_sync(other / "own")
            client.detach("before")
            with pytest.raises(DeviceBusy, match=f"device 'disk' is in use: mounted at {tmp_path}/mnt"):
                client.merge_snapshot("before")
        client.merge_snapshot("before")
        client.finish_merge("disk")
        with mounted(program, "ext4", node, tmp_path / "mnt", "rw") as place:
            assert {path.name for path in place.iterdir()} == {"lost+found", "not-synced", "own"}
        client.detach("disk")


def test_the_command_takes_lists_merges_and_deletes(blkloom: str, life: Life, client: Client, tmp_path: Path) -> None:
    client.create("disk", table=TABLE)
    assert said(blkloom, life, "snapshot", "disk", "before") == ""
    assert said(blkloom, life, "snapshot", "disk", "monday", "--file", str(tmp_path / "cow"), "--chunk", "4k") == ""
    assert said(blkloom, life, "snapshot", "--list").splitlines() == [
        "before\tdisk\t64/2112 64\tblkloom:before-cow",
        f"monday\tdisk\t16/10368 16\t{tmp_path}/cow",
    ]
    assert said(blkloom, life, "snapshot", "monday", "later") == ""  # of a snapshot
    environment = os.environ | {"BLKLOOM_RUN_DIR": str(life.run_dir)}
    words = [blkloom, "snapshot", "disk", "monday", "--delete"]
    refused = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "'monday' is no snapshot of 'disk'.\n" in refused.stderr
    assert "its snapshots: before, monday-real\n" in refused.stderr
    assert said(blkloom, life, "snapshot", "monday", "later", "--delete") == ""
    assert said(blkloom, life, "snapshot", "disk", "before", "--rollback") == ""
    assert said(blkloom, life, "snapshot", "disk", "--delete") == ""
    assert (client.table("disk"), client.snapshots()) == (TABLE, [])
