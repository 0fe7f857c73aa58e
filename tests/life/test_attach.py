"""Devices as nodes: attached, mounted, refused to go while they are used, found again after a death, gone with all they
had.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.control.states import NodeState
from blkloom.errors import DeviceBusy, DeviceExists, UsageError
from conformance.file_systems import MiB, mounted, run
from conformance.nbd_client import READ_ONLY, WRITE, NbdClient

from .attached import (
    SIZE,
    Program,
    a_life_with_nodes,
    disk,
    ext4,
    is_there,
    life,
    make_disk,
    said,
    write_and_sync,
)
from .conftest import Life, info, read, until

__all__ = ["disk", "life"]

pytestmark = pytest.mark.timeout(120)


def test_a_loop_device_is_a_node_with_a_stable_name(client: Client, disk: str, life: Life) -> None:
    made = client.attach(disk, via="loop")
    assert (made.node.via, made.passed_over) == ("loop", {})
    link = life.run_dir / "nodes" / "disk"
    assert os.readlink(link) == made.node.path
    assert os.path.samefile(link, made.node.path)
    assert made.node.details["direct_io"]
    assert run("blockdev", "--getsize64", made.node.path) == f"{SIZE}\n"
    found = info(client, disk)
    assert found.node is not None
    assert (found.node.path, found.open_count, found.connections) == (made.node.path, 0, 0)
    with pytest.raises(DeviceExists, match=made.node.path):
        client.attach(disk, via="loop")
    client.detach(disk)
    assert info(client, disk).node is None
    assert not link.is_symlink()
    assert not is_there(made.node.path)
    assert [export.id for export in info(client, disk).exports] == ["auto"]


def test_a_detached_device_is_not_detached_again(client: Client, disk: str) -> None:
    with pytest.raises(UsageError, match="is not attached"):
        client.detach(disk)


def test_a_mounted_node_stays_and_the_error_says_where(
    client: Client, disk: str, program: Program, tmp_path: Path
) -> None:
    node = client.attach(disk, via="loop").node.path
    with ext4(program, node, tmp_path / "m") as place:
        (place / "file").write_bytes(b"here")
        assert info(client, disk).open_count == 1
        used = info(client, disk).node
        assert used is not None
        assert used.used_by == [f"mounted at {place}"]
        for call in (client.detach, client.remove):
            with pytest.raises(DeviceBusy, match=f"{node} is in use: mounted at {place}"):
                call(disk)
        with pytest.raises(DeviceBusy, match=str(place)):
            client.stop()
        assert (place / "file").read_bytes() == b"here"
    with open(node, "rb"), pytest.raises(DeviceBusy, match=rf"python.* \(process {os.getpid()}\)"):
        client.detach(disk)
    with open(node, "rb") as opened:  # a refused detach has not made it go at its last close
        assert opened.read(4) == bytes(4)
    client.remove(disk)
    assert client.info() == []


def test_a_lazy_detach_ends_after_the_last_use(client: Client, disk: str, program: Program, tmp_path: Path) -> None:
    node = client.attach(disk, via="loop").node
    with ext4(program, node.path, tmp_path / "m") as place:
        client.detach(disk, lazy=True)
        assert not os.path.lexists(node.link)
        write_and_sync(place / "file")
    found = until(client, disk, lambda found: found.node is None)
    assert [export.id for export in found.exports] == ["auto"]
    with ext4_again(program, client, disk, tmp_path) as place:
        assert (place / "file").read_bytes() == bytes(MiB)


@contextmanager
def ext4_again(program: Program, client: Client, disk: str, tmp_path: Path) -> Iterator[Path]:
    """The file system on a device that is attached for that."""
    node = client.attach(disk, via="loop").node.path
    with mounted(program, "ext4", node, tmp_path / "m", "rw") as place:
        yield place
    client.detach(disk)


def test_a_deferred_removal_waits_for_the_last_use(client: Client, disk: str, program: Program, tmp_path: Path) -> None:
    node = client.attach(disk, via="loop").node.path
    with ext4(program, node, tmp_path / "m") as place:
        client.remove(disk, deferred=True)
        (place / "file").write_bytes(bytes(MiB))
    while client.info():
        pass


def test_a_forced_detach_lets_users_fail(client: Client, disk: str, program: Program, tmp_path: Path) -> None:
    node = client.attach(disk, via="loop").node.path
    with ext4(program, node, tmp_path / "m") as place:
        client.detach(disk, force=True)
        assert info(client, disk).node is None
        with pytest.raises(OSError, match=r"Input/output|Read-only|Transport"):
            write_and_sync(place / "file")
    assert not is_there(node)


def test_a_read_only_node(client: Client, disk: str, tmp_path: Path) -> None:
    node = client.attach(disk, via="loop", read_only=True).node.path
    assert run("blockdev", "--getro", node) == "1\n"
    client.detach(disk)


def test_the_node_is_read_only_as_long_as_the_table_is(client: Client, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(MiB))
    table = f"0 {MiB // 512} loop {tmp_path}/disk.img"
    client.create("disk", table=table, read_only=True)
    node = client.attach("disk").node.path
    assert run("blockdev", "--getro", node) == "1\n"
    for read_only in (False, True, False):
        client.load("disk", table, read_only=read_only)
        client.resume("disk")
        assert run("blockdev", "--getro", node) == f"{read_only:d}\n"
    Path(node).write_bytes(b"w" * 512)
    assert (tmp_path / "disk.img").read_bytes()[:512] == b"w" * 512
    client.load("disk", table, read_only=True)
    client.resume("disk")
    client.remove("disk")
    assert run("blockdev", "--getro", node) == "0\n"  # for the next user of that loop device


def test_the_blocks_of_the_node_are_those_of_the_device(client: Client, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(MiB))
    client.create("disk", table=f"0 {MiB // 512} loop {tmp_path}/disk.img 0 1 block_size=4096")
    node = client.attach("disk", via="loop").node.path
    assert run("blockdev", "--getss", node) == "4096\n"
    client.remove("disk")


def test_a_node_that_a_user_detaches_is_forgotten(client: Client, disk: str, program: Program) -> None:
    node = client.attach(disk, via="loop").node
    run(program("losetup", "mount"), "--detach", node.path)
    found = until(client, disk, lambda found: found.node is None)
    assert [export.id for export in found.exports] == ["auto"]
    assert not os.path.lexists(node.link)


def test_a_file_is_a_node_too(client: Client, disk: str, life: Life) -> None:
    made = client.attach(disk, via="fuse")
    assert made.node.path == str(life.run_dir / "fuse" / "disk")
    with open(made.node.path, "rb") as opened:
        assert opened.read(4) == bytes(4)
        with pytest.raises(DeviceBusy, match=rf"\(process {os.getpid()}\)"):
            client.detach(disk)
    client.detach(disk)
    assert not os.path.lexists(made.node.path)


def test_a_file_that_is_open_goes_after_its_last_use(client: Client, disk: str) -> None:
    node = client.attach(disk, via="fuse").node
    with open(node.path, "rb") as opened:
        client.detach(disk, lazy=True)
        assert not os.path.lexists(node.link)
        assert opened.read(4) == bytes(4)
    until(client, disk, lambda found: found.node is None)
    assert not os.path.lexists(node.path)


def test_a_suspended_device_is_not_attached_as_a_block_device(client: Client, disk: str) -> None:
    client.suspend(disk)
    with pytest.raises(UsageError, match="is suspended, and the kernel flushes what it attaches"):
        client.attach(disk)
    assert os.path.getsize(client.attach(disk, via="fuse").node.path) == SIZE
    client.resume(disk)
    client.detach(disk)


def test_a_file_that_was_exported_before_stays(client: Client, disk: str) -> None:
    path = client.export(disk, kind="fuse").path
    assert client.attach(disk, via="fuse").node.path == path
    client.detach(disk)
    assert os.path.getsize(path) == SIZE


def test_the_stable_name_follows_the_device(client: Client, disk: str, life: Life) -> None:
    node = client.attach(disk, via="loop").node
    client.rename(disk, name="other")
    assert not os.path.lexists(node.link)
    assert os.readlink(life.run_dir / "nodes" / "other") == node.path
    client.remove("other")


def test_a_stable_name_that_was_deleted_is_made_again(blkloom: str, client: Client, disk: str, life: Life) -> None:
    link = client.attach(disk, via="loop").node.link
    for words in (["mknodes"], ["mknodes", disk]):
        os.unlink(link)
        said(blkloom, life, *words)
        assert os.path.samefile(link, os.path.realpath(link))


def test_a_node_is_found_again_by_the_next_supervisor(
    client: Client, disk: str, life: Life, program: Program, tmp_path: Path
) -> None:
    node = client.attach(disk, via="loop").node
    with ext4(program, node.path, tmp_path / "m") as place:
        life.kill()
        write_and_sync(place / "file")
        os.unlink(node.link)
        life.start()
        with life.client() as again:
            found = info(again, disk).node
            assert found is not None
            assert (found.path, found.used_by) == (node.path, [f"mounted at {place}"])
            assert os.readlink(node.link) == node.path
            write_and_sync(place / "file")
    with life.client() as again:
        again.detach(disk)


def test_worker_and_supervisor_killed_together_leave_a_new_node(
    client: Client, disk: str, life: Life, program: Program, tmp_path: Path
) -> None:
    node = client.attach(disk, via="loop").node
    with ext4(program, node.path, tmp_path / "m") as place:
        write_and_sync(place / "file")
        worker = until(client, disk, lambda found: found.worker != 0).worker
        life.kill()
        os.kill(worker, signal.SIGKILL)
        life.start()
        with life.client() as again:
            found = until(again, disk, lambda found: found.node is not None and found.node.path not in ("", node.path))
            assert found.node is not None
            assert os.readlink(node.link) == found.node.path
            with pytest.raises(OSError, match=r"Input/output|Read-only|Transport"):
                write_and_sync(place / "other")
    with life.client() as again:
        again.detach(disk)
        with ext4_again(program, again, disk, tmp_path) as place:
            assert (place / "file").read_bytes() == bytes(MiB)


def test_what_a_killed_supervisor_left_of_a_removed_device_is_reaped(client: Client, disk: str, life: Life) -> None:
    node = client.attach(disk, via="loop").node
    worker = until(client, disk, lambda found: found.worker != 0).worker
    life.kill()
    os.kill(worker, signal.SIGKILL)
    for path in (life.run_dir / "devices").iterdir():
        path.unlink()
    life.start()
    assert not is_there(node.path)
    assert not os.path.lexists(node.link)


def test_what_a_mounted_file_system_has_not_written_is_written_when_the_supervisor_stops(
    client: Client, disk: str, life: Life, program: Program, tmp_path: Path
) -> None:
    node = client.attach(disk, via="loop").node.path
    data = os.urandom(MiB)
    with ext4(program, node, tmp_path / "m") as place:
        (place / "file").write_bytes(data)
        life.stop()
    assert not is_there(node)
    with mounted(program, "ext4", tmp_path / "disk.img", tmp_path / "m", "rw,loop") as place:
        assert (place / "file").read_bytes() == data


def test_a_device_goes_with_its_node_when_the_supervisor_stops(client: Client, disk: str, life: Life) -> None:
    node = client.attach(disk, via="loop").node
    life.stop()
    assert not is_there(node.path)
    assert not os.path.lexists(node.link)


def test_a_file_on_its_own_node_is_refused(client: Client, disk: str, program: Program, tmp_path: Path) -> None:
    node = client.attach(disk, via="loop").node.path
    table = client.table(disk)
    with ext4(program, node, tmp_path / "m") as place:
        for name in ("own.img", "other.img"):
            (place / name).write_bytes(bytes(MiB))
        client.create("upper", table=f"0 8 loop {place}/other.img")  # that one may
        for refused in (f"0 8 loop {place}/own.img", f"0 8 loop {node}", "0 8 linear blkloom:upper 0"):
            with pytest.raises(OSError, match=f"node of device '{disk}', which needs it|in use|busy") as raised:
                client.load(disk, refused)
            if refused != f"0 8 loop {node}":  # where that is mounted, its claim is refused before
                assert raised.value.errno == errno.ELOOP
        assert (client.table(disk, inactive=True), client.table(disk)) == ("", table)
        client.remove("upper")
    client.detach(disk)
    path = client.export(disk, kind="fuse").path
    with pytest.raises(OSError, match="which needs it"):
        client.load(disk, f"0 8 loop {path}")


def test_nbd_clients_only_read_while_it_is_attached(
    client: Client, disk: str, connect: Callable[[str], NbdClient]
) -> None:
    node = client.attach(disk, via="loop").node.path
    reader = connect(disk)
    assert reader.flags & READ_ONLY
    assert reader.ask(WRITE, 0, payload=bytes(512)).error == errno.EPERM
    Path(node).write_bytes(b"node" * 128)
    assert read(reader) == b"node" * 128
    for kind in ("nbd", "fuse"):
        with pytest.raises(DeviceBusy, match=f"is attached at {node}"):
            client.export(disk, kind=kind, port=0, host="localhost" if kind == "nbd" else "")
    client.unexport(disk, client.export(disk, host="localhost", read_only=True).id)
    client.unexport(disk, client.export(disk, host="localhost", shared=True).id)
    reader.disconnect()
    client.detach(disk)
    writer = connect(disk)
    assert not writer.flags & READ_ONLY
    until(client, disk, lambda found: found.connections == 1)
    with pytest.raises(DeviceBusy, match="device 'disk' has 1 clients, which may write"):
        client.attach(disk)
    assert info(client, disk).node is None
    assert writer.ask(WRITE, 0, payload=b"w" * 512).error == 0
    shared = client.attach(disk, shared=True).node.path
    assert writer.ask(WRITE, 0, payload=b"s" * 512).error == 0
    with open(shared, "rb") as opened:
        assert opened.read(512) == b"s" * 512
    writer.disconnect()


@pytest.mark.parametrize("verb", ["info", "table", "status"])
def test_the_path_of_a_node_names_its_device(blkloom: str, client: Client, disk: str, life: Life, verb: str) -> None:
    node = client.attach(disk, via="loop").node
    by_name = said(blkloom, life, verb, disk)
    (life.run_dir.parent / "link").symlink_to(node.link)
    for path in (node.path, node.link, str(life.run_dir.parent / "link")):
        assert said(blkloom, life, verb, path) == by_name


def test_the_command_attaches_and_detaches(blkloom: str, client: Client, disk: str, life: Life) -> None:
    node = said(blkloom, life, "attach", disk, "--via", "loop").strip()
    assert f"Node:              {node}" in said(blkloom, life, "info", disk)
    assert said(blkloom, life, "info", "-c", "--noheadings", "-o", "node,node_via,file", disk) == f"{node}:loop:\n"
    done = subprocess.run(
        [blkloom, "--run-dir", life.run_dir, "attach", disk, "--via", "loop"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"is attached already, at {node}" in done.stderr
    assert said(blkloom, life, "detach", node) == ""
    assert info(client, disk).node is None


def test_a_device_that_has_failed_is_attached_again_when_it_is_resumed(program: Program, tmp_path: Path) -> None:
    with a_life_with_nodes("--max-deaths=1") as life, life.client() as client:
        disk = make_disk(client, tmp_path)
        node = client.attach(disk, via="loop").node
        run(program("mkfs.ext4", "e2fsprogs"), "-q", node.path)
        for _ in range(2):  # one death more than it may have
            before = until(client, disk, lambda found: found.worker != 0).worker
            os.kill(before, signal.SIGKILL)
            until(client, disk, lambda found, before=before: found.worker != before)  # type: ignore[misc]
        assert until(client, disk, lambda found: found.state == "FAILED").node is not None
        with pytest.raises(OSError, match="Input/output"), open(node.path, "rb") as opened:
            opened.read(4096)
        client.resume(disk)
        until(client, disk, lambda found: is_another(found.node, node))  # perhaps with the same number
        with mounted(program, "ext4", Path(node.link), tmp_path / "m", "rw") as place:
            write_and_sync(place / "file")
        client.detach(disk)


def is_another(now: NodeState | None, former: NodeState) -> bool:
    return now is not None and now.path != "" and now.details != former.details


def test_without_the_fuse_device_the_error_says_so(blkloom: str, life: Life, disk: str) -> None:
    """In a mount namespace that has another device in its place, as a container may have."""
    hidden = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /dev/fuse && exec "$@"', "sh"]
    words = [blkloom, "--run-dir", str(life.run_dir.parent / "other")]
    try:
        done = subprocess.run(
            [*hidden, *words, "create", "memory", "--table", "0 8 ram", "--attach"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "cannot be attached here: " in done.stderr
        assert "loop: /dev/fuse is not the kernel's FUSE device" in done.stderr
        assert "`blkloom doctor` says what to install or change" in done.stderr
        doctor = subprocess.run([*hidden, *words, "doctor"], capture_output=True, text=True, check=False)
        assert doctor.returncode == 1
        assert "attach --via fuse              no       /dev/fuse is not" in doctor.stdout
        assert run(*words, "ls") == "No devices found\n"
    finally:
        run(*words, "stop")
