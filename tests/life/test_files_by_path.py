"""Files on the command line: names that are not UTF-8, files that are no tables, pipes, images of other formats."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from blkloom.control.client import Client
from conformance.nbd_client import NbdClient

from .conftest import Life, read, until
from .loop_commands import Loop

pytestmark = pytest.mark.timeout(120)
Blkloom = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def command(blkloom: str, life: Life, tmp_path: Path) -> Blkloom:
    """The command with these words, in `tmp_path`."""

    def run(*words: str | Path | bytes) -> subprocess.CompletedProcess[bytes]:
        line = [blkloom, "--run-dir", str(life.run_dir), *words]
        return subprocess.run(
            line, capture_output=True, check=False, timeout=60, cwd=tmp_path, stdin=subprocess.DEVNULL
        )

    return run


def test_a_device_on_a_file_that_is_no_utf_8_outlives_its_worker_and_its_supervisor(
    command: Blkloom, life: Life, client: Client, connect: Callable[[str], NbdClient], tmp_path: Path
) -> None:
    name = b"disk\xff\x1b.img"
    (tmp_path / os.fsdecode(name)).write_bytes(b"x" * 4096)
    path = os.fsencode(tmp_path) + b"/" + name.replace(b"\x1b", b"\\\x1b")  # as tables write it
    made = command("create", "disk", b"--table", b"0 8 loop " + path)
    assert (made.returncode, made.stderr) == (0, b"")
    os.kill(client.info("disk")[0].worker, signal.SIGKILL)
    until(client, "disk", lambda found: found.restarts == 1)
    assert read(connect("disk")) == b"x" * 512
    life.kill()
    life.start()
    assert command("table", "disk").stdout == b"0 8 loop " + path + b"\n"
    assert read(connect("disk")) == b"x" * 512
    assert b"\x1b" not in (life.run_dir.parent / "supervisor.log").read_bytes()


def test_an_image_whose_backing_file_is_no_utf_8(
    command: Blkloom, connect: Callable[[str], NbdClient], program: Callable[[str, str], str], tmp_path: Path
) -> None:
    qemu_img = program("qemu-img", "qemu-utils")
    base, top = tmp_path / os.fsdecode(b"base\xfe.img"), tmp_path / os.fsdecode(b"top\xfd.qcow2")
    base.write_bytes(b"b" * 65536)
    subprocess.run([qemu_img, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, top], check=True)
    made = command("create", "disk", top, "--allow-backing", tmp_path)
    assert (made.returncode, made.stderr) == (0, b"")
    assert read(connect("disk")) == b"b" * 512


def test_errors_say_such_names_byte_by_byte(command: Blkloom, tmp_path: Path) -> None:
    missing = os.fsencode(tmp_path) + b"/no\xff\\\x1b[2J"
    failed = command("create", "disk", b"--table", b"0 8 loop " + missing)
    assert failed.returncode == 1
    assert b"/no\\xff\\x1b[2J: " in failed.stderr
    assert b"\x1b" not in failed.stderr


def test_an_export_cannot_be_named_after_such_a_file(blkloom: str, tmp_path: Path) -> None:
    first, second = tmp_path / os.fsdecode(b"\xff.img"), tmp_path / "b.img"
    for path in (first, second):
        path.write_bytes(bytes(4096))
    failed = subprocess.run([blkloom, "serve", first, second], capture_output=True, check=False, timeout=60)
    assert failed.returncode == 64
    assert failed.stderr.startswith(
        b"blkloom: \\xff.img cannot be the name of an export: it is not UTF-8; choose one: "
    )


def test_a_pipe_without_a_writer_is_no_table(command: Blkloom, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    failed = command("create", "disk", "pipe")
    assert (
        failed.stderr == b"pipe is no table.\nCommand failed.\nblkloom: pipe: a pipe that no process has written to\n"
    )


def test_a_table_may_come_through_a_pipe(blkloom: str, life: Life, client: Client) -> None:
    line = f"exec '{blkloom}' --run-dir '{life.run_dir}' create disk <(sleep 0.2; echo 0 8 zero)"
    subprocess.run(["bash", "-c", line], check=True, timeout=60)
    assert client.table("disk") == "0 8 zero"


def test_create_takes_a_file_as_the_disk_that_its_format_says(
    command: Blkloom, client: Client, program: Callable[[str, str], str], tmp_path: Path
) -> None:
    raw, image = tmp_path / "disk.img", tmp_path / "image"
    raw.write_bytes(bytes(4096))
    subprocess.run([program("qemu-img", "qemu-utils"), "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    assert b"if it is a disk, add --format raw" in command("create", "raw", "disk.img").stderr
    assert b"looks like a QCOW2 image; if its disk is to be the device, add --format qcow2" in (
        command("create", "image", "image").stderr
    )
    assert command("create", "raw", "disk.img", "--format", "raw").returncode == 0
    assert command("create", "image", "image", "--format", "qcow2").returncode == 0
    assert client.table("raw") == f"0 8 loop {raw}"
    assert client.table("image") == f"0 2048 qcow2 {image}"
    assert b"--format raw is for a file" in command("create", "none", "--table", "0 8 zero", "--format", "raw").stderr


def test_the_image_itself_as_a_loop_device_is_worth_a_warning(
    loop: Loop, program: Callable[[str, str], str], tmp_path: Path
) -> None:
    for ending, cure in (("qcow2", "blkloom create NAME "), ("vmdk", "qemu-img convert"), ("vdi", "qemu-img convert")):
        path = tmp_path / f"disk.{ending}"
        subprocess.run([program("qemu-img", "qemu-utils"), "create", "-q", "-f", ending, path, "1M"], check=True)
        done = loop.run("-f", "--show", path)
        assert (done.returncode, done.stdout[:4]) == (0, "loop")
        assert f"it looks like a {ending.upper()} image, and the device is the image file itself" in done.stderr
        assert cure in done.stderr


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_commands_work_with_standard_streams_closed(
    blkloom: str, life: Life, client: Client, closed: tuple[int, ...]
) -> None:
    redirections = "".join(f" {number}>&-" for number in closed)
    line = f"exec '{blkloom}' --run-dir '{life.run_dir}' create disk --table '0 8 zero' {redirections}"
    subprocess.run(["bash", "-c", line], check=True, timeout=60)
    assert client.table("disk") == "0 8 zero"


def test_serve_works_with_standard_streams_closed(blkloom: str, tmp_path: Path) -> None:
    line = f"exec '{blkloom}' serve --ram 1M --socket '{tmp_path}/s' --once <&- >&- 2>&-"
    with subprocess.Popen(["bash", "-c", line]) as server:
        while not (tmp_path / "s").exists():
            assert server.poll() is None
        NbdClient.unix(tmp_path / "s").close()
        assert server.wait(60) == 0
