"""Nodes by the commands of losetup, dmsetup and `serve`: what their users write works."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blkloom.control.client import Client
from blkloom.errors import DeviceBusy, WorkerGone
from conformance.file_systems import MiB, mounted, run

from .attached import SIZE, Program, disk, ext4, is_there, life, said, write_and_sync
from .conftest import Life, info, until
from .loop_commands import Loop, cells

__all__ = ["disk", "life"]
Beside = Callable[..., Future[Any]]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def loop(blkloom: str, life: Life) -> Loop:
    """`blkloom loop ...`, which attaches."""
    return Loop(blkloom, life.run_dir, attach=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file of SIZE bytes."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def test_what_loop_prints_can_be_mounted(
    blkloom: str, loop: Loop, client: Client, image: Path, life: Life, program: Program, tmp_path: Path
) -> None:
    run(program("mkfs.ext4", "e2fsprogs"), "-q", image)
    (tmp_path / "m").mkdir()
    script = "set -e; mount $($1 loop -f --show $2) $3; echo here > $3/file; umount $3; $1 loop -d $($1 loop -nO NODE)"
    run("env", f"BLKLOOM_RUN_DIR={life.run_dir}", "sh", "-c", script, "sh", blkloom, image, tmp_path / "m")
    assert client.info() == []
    node = loop("-f", "--show", image).strip()
    with mounted(program, "ext4", node, tmp_path / "m", "rw") as place:
        assert (place / "file").read_text() == "here\n"
        assert cells(loop("-nO", "NAME,NODE")) == ["loop0", node]
        loop("-d", node)  # after its last use
        assert (place / "file").read_text() == "here\n"
    while client.info():
        pass
    assert not is_there(node)


def test_the_node_of_a_loop_device_grows_with_its_file(
    loop: Loop, image: Path, program: Program, tmp_path: Path
) -> None:
    node = loop("-f", "--show", image).strip()
    with ext4(program, node, tmp_path / "m"):
        os.truncate(image, 2 * SIZE)
        loop("-c", node)
        assert run("blockdev", "--getsize64", node) == f"{2 * SIZE}\n"
    run(program("e2fsck", "e2fsprogs"), "-f", "-p", node)
    run(program("resize2fs", "e2fsprogs"), node)  # while it is mounted this needs CAP_SYS_RESOURCE
    with mounted(program, "ext4", node, tmp_path / "m", "rw") as place:
        write_and_sync(place / "file", os.urandom(SIZE + SIZE // 4))
    loop("-d", node)


def test_loop_without_a_node(loop: Loop, client: Client, image: Path) -> None:
    assert loop("-f", "--show", "--no-attach", image) == "loop0\n"
    assert info(client, "loop0").node is None


def test_loop_gives_block_size_and_read_only_to_the_node(loop: Loop, image: Path) -> None:
    node = loop("-f", "--show", "-r", "-b", "4096", image).strip()
    assert run("blockdev", "--getro", "--getss", node) == "1\n4096\n"
    loop("-d", node)


def test_partitions_of_a_loop_device_are_nodes(loop: Loop, client: Client, image: Path, program: Program) -> None:
    table = "label: gpt\nstart=2048, size=8192\nstart=16384, size=8192\n"
    sfdisk = program("sfdisk", "fdisk")
    subprocess.run([sfdisk, "--quiet", "--no-reread", image], input=table, text=True, check=True)
    node = loop("-f", "--show", "-P", image).strip()
    assert run("blockdev", "--getsize64", f"{node}p2") == f"{8192 * 512}\n"
    with open(f"{node}p1", "rb"), pytest.raises(DeviceBusy, match=f"process {os.getpid()}"):
        client.detach("loop0")
    loop("-d", node)


def test_create_attaches_and_prints_the_node(blkloom: str, client: Client, life: Life) -> None:
    node = said(blkloom, life, "create", "memory", "--table", "0 8192 ram", "--attach").strip()
    assert run("blockdev", "--getsize64", node) == f"{8192 * 512}\n"
    file = said(blkloom, life, "create", "upper", "--table", "0 8 linear blkloom:memory 0", "--via", "fuse").strip()
    assert Path(file).read_bytes() == bytes(4096)
    name = node.removeprefix("/dev/")
    assert said(blkloom, life, "ls", "--tree", "-o", "ascii") == f"upper (0:1)\n `-memory <{name}> (0:0)\n"
    assert said(blkloom, life, "ls", "-o", "blkdevname") == f"memory\t({name})\nupper\t(upper)\n"
    assert said(blkloom, life, "deps", "-o", "blkdevname", "upper") == f"1 dependencies\t: ({name})\n"
    said(blkloom, life, "remove", "upper", node)
    assert client.info() == []


def test_create_makes_nothing_where_it_cannot_attach(blkloom: str, client: Client, life: Life, tmp_path: Path) -> None:
    (life.run_dir / "nodes").write_text("in the way")
    done = subprocess.run(
        [blkloom, "--run-dir", life.run_dir, "create", "memory", "--table", "0 8192 ram", "--attach"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "nodes" in done.stderr
    assert client.info() == []
    (life.run_dir / "nodes").unlink()


def test_serve_attaches_until_it_is_interrupted(blkloom: str, life: Life, program: Program, tmp_path: Path) -> None:
    with subprocess.Popen(
        [blkloom, "serve", "--ram", "64M", "--attach"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            node = server.stdout.readline().strip()
            with ext4(program, node, tmp_path / "m") as place:
                write_and_sync(place / "file", os.urandom(MiB))
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert not is_there(node)


@pytest.mark.parametrize("next_one", ["reap", "serve"])
def test_what_a_killed_server_has_left_is_removed(
    blkloom: str, life: Life, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, next_one: str
) -> None:
    private = Path(tempfile.mkdtemp(dir="/tmp"))  # a short path, for sockets
    monkeypatch.setenv("TMPDIR", str(private))
    try:
        with serving(blkloom) as (other, kept), serving(blkloom) as (server, node):
            server.kill()
            server.wait()
            assert is_there(node)
            if next_one == "reap":
                assert f"loop device {node}" in said(blkloom, life, "reap")
            else:
                with serving(blkloom) as (_, again):
                    assert is_there(again)
            assert is_there(kept)
            assert len(list(private.iterdir())) == 1
            other.terminate()
            assert other.wait(60) == 0
        assert not any(map(is_there, (node, kept)))
        assert list(private.iterdir()) == []
    finally:
        shutil.rmtree(private)


@contextmanager
def serving(blkloom: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server with a node, and the path of the node."""
    command = [blkloom, "serve", "--ram", "8M", "--attach"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server, server.stdout.readline().strip()
        finally:
            server.terminate()


def test_a_path_in_dev_that_is_no_node_is_a_name(loop: Loop, client: Client, image: Path) -> None:
    loop("--no-attach", "/dev/loop900", image)
    assert [device.name for device in client.info()] == ["loop900"]
    loop("-d", "/dev/loop900")
    until_gone(client)


def until_gone(client: Client) -> None:
    while client.info():
        pass


def test_retry_removes_a_device_after_its_node_is_closed(client: Client, disk: str, beside: Beside) -> None:
    node = client.attach(disk, via="loop").node.path
    with open(node, "rb"):
        removal = beside("remove", disk, retry=True)
        with pytest.raises(DeviceBusy):
            client.detach(disk)
    removal.result()
    assert client.info() == []


def test_the_worker_may_be_killed_while_its_device_is_attached(client: Client, disk: str) -> None:
    """The command may have to be given again, and then finds nothing in its way."""
    for _ in range(5):
        worker = until(client, disk, lambda found: found.worker != 0).worker
        os.kill(worker, signal.SIGKILL)
        while True:
            try:
                node = client.attach(disk, via="loop").node.path
                break
            except WorkerGone:
                found = info(client, disk)
                assert (found.node, [export.id for export in found.exports]) == (None, ["auto"])
        until(client, disk, lambda found, worker=worker: found.worker not in (0, worker))  # type: ignore[misc]
        assert run("blockdev", "--getsize64", node) == f"{SIZE}\n"
        client.detach(disk)
