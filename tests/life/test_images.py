"""QCOW2 images as devices of a supervisor: created by path, changed by qemu-img while suspended, served by another
worker after a death; and the path policy for images in any directory.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.errors import BackingError, BusyError

from .conftest import Life, until

MiB = 1 << 20
pytestmark = pytest.mark.timeout(120)

Program = Callable[[str, str], str]


@pytest.fixture
def image(program: Program, tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    run(program("qemu-img", "qemu-utils"), "create", "-q", "-f", "qcow2", path, "16M")
    return path


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def io(life: Life, *commands: str) -> None:
    """qemu-io's commands on the device."""
    uri = f"nbd+unix:///?socket={life.socket('disk')}"
    words = [word for command in commands for word in ("-c", command)]
    assert "failed" not in (said := run("qemu-io", "-f", "raw", *words, uri)), said


def blkloom_create(blkloom: str, life: Life, *words: str | Path, cwd: Path) -> None:
    subprocess.run([blkloom, "--run-dir", life.run_dir, "create", *words], check=True, cwd=cwd, timeout=60)


def size(client: Client) -> int:
    return client.info("disk")[0].size


def test_an_image_is_maintained_while_its_device_is_suspended(blkloom: str, life: Life, image: Path) -> None:
    blkloom_create(blkloom, life, "disk", image.name, cwd=image.parent)
    io(life, "write -P 1 0 1M", "write -P 2 8M 64k", "flush")
    refused = subprocess.run(["qemu-img", "snapshot", "-c", "no", image], capture_output=True, check=False, timeout=60)
    assert refused.returncode
    with life.client() as client:
        client.suspend("disk")
        run("qemu-img", "snapshot", "-c", "first", image)
        run("qemu-img", "resize", "-q", image, "32M")
        run("qemu-img", "check", image)
        client.resume("disk")
        assert size(client) == 32 * MiB
        assert client.table("disk") == f"0 {32 * MiB // 512} qcow2 {image}"
        io(life, "read -P 1 0 1M", "write -P 3 0 512k", "write -P 4 31M 1M", "flush")
        client.suspend("disk")
        run("qemu-img", "check", image)
        client.resume("disk")
        client.remove("disk", retry=True)
    run("qemu-img", "check", image)
    run("qemu-img", "snapshot", "-a", "first", image)
    run("qemu-io", "-r", "-c", "read -P 1 0 1M", "-c", "read -P 2 8M 64k", image)


def test_a_device_is_not_resumed_while_writer_works_on_its_image(life: Life, image: Path) -> None:
    with life.client() as client:
        client.create("disk", table=f"0 {16 * MiB // 512} qcow2 {image}")
        client.suspend("disk")
        with subprocess.Popen(["qemu-io", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdin is not None
            assert writer.stdout is not None
            writer.stdin.write("write -P 7 0 64k\n")
            writer.stdin.flush()
            while "wrote" not in (line := writer.stdout.readline()):
                assert line, "qemu-io ended"
            with pytest.raises(BusyError):
                client.resume("disk")
            assert client.info("disk")[0].state == "SUSPENDED"
            writer.stdin.close()
            assert writer.wait(60) == 0
        client.resume("disk")
        io(life, "read -P 7 0 64k")


@pytest.mark.parametrize("options", ["", " 1 direct_io"])
def test_a_killed_worker_loses_nothing_that_was_flushed(life: Life, image: Path, options: str) -> None:
    with life.client() as client:
        client.create("disk", table=f"0 {16 * MiB // 512} qcow2 {image}{options}")
        for turn in range(1, 6):
            io(life, f"write -P {turn} {turn}M 1M", "flush")
            worker = client.info("disk")[0].worker
            os.kill(worker, signal.SIGKILL)
            until(client, "disk", lambda info, worker=worker: info.worker not in (0, worker) and info.state == "ACTIVE")
        io(life, *(f"read -P {turn} {turn}M 1M" for turn in range(1, 6)))
        client.remove("disk", retry=True)
    run("qemu-img", "check", image)


@pytest.mark.parametrize("options", ["", " 1 direct_io"])
def test_a_worker_that_dies_while_its_device_is_suspended_leaves_the_image_alone(
    life: Life, image: Path, options: str
) -> None:
    with life.client() as client:
        client.create("disk", table=f"0 {16 * MiB // 512} qcow2 {image}{options}")
        io(life, "write -P 1 0 1M", "flush")
        client.suspend("disk")
        # The contents do not matter before the resume.
        intact = image.read_bytes()
        image.write_bytes(b"nothing")
        for _ in range(2):
            worker = client.info("disk")[0].worker
            os.kill(worker, signal.SIGKILL)
            until(client, "disk", lambda info, worker=worker: info.worker not in (0, worker))
            assert client.info("disk")[0].state == "SUSPENDED"
        with pytest.raises(BackingError):
            client.resume("disk")
        image.write_bytes(intact)
        run("qemu-img", "snapshot", "-c", "first", image)
        run("qemu-img", "resize", "-q", image, "24M")
        client.resume("disk")
        assert size(client) == 24 * MiB
        io(life, "read -P 1 0 1M", "write -P 2 0 1M", "flush")
        refused = subprocess.run(
            ["qemu-img", "snapshot", "-c", "no", image], capture_output=True, timeout=60, check=False
        )
        assert refused.returncode
        client.suspend("disk")
        client.upgrade()
    with life.client() as client:
        until(client, "disk", lambda info: info.worker != 0)
        run("qemu-img", "resize", "-q", image, "32M")
        client.resume("disk")
        assert size(client) == 32 * MiB
        io(life, "read -P 2 0 1M")
        client.remove("disk", retry=True)
    run("qemu-img", "snapshot", "-a", "first", image)
    run("qemu-io", "-r", "-c", "read -P 1 0 1M", image)


def test_an_image_replaced_while_its_device_is_suspended_is_opened_by_who_resumes_it(
    blkloom: str, life: Life, image: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    blkloom_create(blkloom, life, "disk", "--table", f"0 {16 * MiB // 512} qcow2 {image.name}", cwd=image.parent)
    io(life, "write -P 1 0 1M", "flush")
    with life.client() as client:
        for pattern in (2, 3):
            client.suspend("disk")
            other = image.with_name("other.qcow2")
            run("qemu-img", "create", "-q", "-f", "qcow2", other, "16M")
            run("qemu-io", "-c", f"write -P {pattern} 0 1M", other)
            other.rename(image)
            elsewhere = tmp_path_factory.mktemp("elsewhere")
            run("qemu-img", "create", "-q", "-f", "qcow2", elsewhere / image.name, "1M")
            subprocess.run(
                [blkloom, "--run-dir", life.run_dir, "resume", "disk"], check=True, cwd=elsewhere, timeout=60
            )
            io(life, f"read -P {pattern} 0 1M", "write -P 9 1M 1M", "flush")
            worker = client.info("disk")[0].worker
            os.kill(worker, signal.SIGKILL)
            until(client, "disk", lambda info, worker=worker: info.worker not in (0, worker) and info.state == "ACTIVE")
            io(life, f"read -P {pattern} 0 1M", "read -P 9 1M 1M")
        client.remove("disk", retry=True)
    run("qemu-img", "check", image)


@pytest.mark.parametrize("relative", [False, True])
def test_the_gate_stands_at_the_image_wherever_its_path_begins(
    blkloom: str, life: Life, image: Path, tmp_path_factory: pytest.TempPathFactory, *, relative: bool
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    secret = elsewhere / "secret"
    secret.write_bytes(b"s" * MiB)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", image)
    path = image.name if relative else str(image)
    sectors = str(MiB // 512)
    for allowed in ("", f" 1 allow_backing={elsewhere}"):
        command = [
            blkloom,
            "--run-dir",
            str(life.run_dir),
            "create",
            "disk",
            "--table",
            f"0 {sectors} qcow2 {path}{allowed}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=image.parent, timeout=60)
        assert (done.returncode == 0) == bool(allowed), done.stderr
        if not allowed:
            assert "allow_backing" in done.stderr
    io(life, "read -P 0x73 0 1M")


def test_create_may_allow_backing_files_elsewhere(
    blkloom: str, life: Life, image: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "base").write_bytes(b"b" * MiB)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", elsewhere / "base", "-F", "raw", image)
    command = [blkloom, "--run-dir", str(life.run_dir), "create", "disk", image.name]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, cwd=image.parent, timeout=60)
    assert refused.returncode
    assert f"--allow-backing {elsewhere}" in refused.stderr
    allowed = os.path.relpath(elsewhere, image.parent)
    blkloom_create(blkloom, life, "disk", image.name, "--allow-backing", allowed, cwd=image.parent)
    io(life, "read -P 0x62 0 1M")
    with life.client() as client:
        assert client.table("disk").endswith(f" 1 allow_backing={elsewhere}")


def test_an_image_not_named_like_one_is_no_table_and_the_error_says_what_to_do(
    blkloom: str, life: Life, image: Path
) -> None:
    other = image.rename(image.with_name("disk.img"))
    command = [blkloom, "--run-dir", str(life.run_dir), "create", "disk", str(other)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode
    assert "it looks like a QCOW2 image; if its disk is to be the device, add --format qcow2" in refused.stderr
    assert len(refused.stderr) < 1000
    blkloom_create(blkloom, life, "disk", other, "--format", "qcow2", cwd=image.parent)
    with life.client() as client:
        assert client.table("disk").split()[2:4] == ["qcow2", str(other)]
        client.remove("disk")
    image.symlink_to(other.name)
    blkloom_create(blkloom, life, "disk", image, cwd=image.parent)
    io(life, "write -P 1 0 1M")


def test_a_backing_file_beside_an_image_of_a_relative_path_is_found(blkloom: str, life: Life, tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"b" * MiB)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", tmp_path / "top.qcow2")
    table = f"0 {MiB // 512} qcow2 top.qcow2"
    blkloom_create(blkloom, life, "disk", "--table", table, cwd=tmp_path)
    io(life, "read -P 0x62 0 1M")


def test_a_relative_path_through_a_link_keeps_its_neighbours_with_every_worker(
    blkloom: str, life: Life, tmp_path: Path
) -> None:
    for folder, fill in (("vm", b"v"), ("store", b"s")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "base").write_bytes(fill * MiB)
    real = tmp_path / "store" / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", real)
    (tmp_path / "vm" / "disk.qcow2").symlink_to(real)
    table = f"0 {MiB // 512} qcow2 vm/disk.qcow2 1 allow_backing={tmp_path}"
    blkloom_create(blkloom, life, "disk", "--table", table, cwd=tmp_path)
    beside_the_link = f"read -P {ord('v')} 0 1M"
    io(life, beside_the_link)
    with life.client() as client:
        client.suspend("disk")
        client.resume("disk")
        io(life, beside_the_link)
        worker = client.info("disk")[0].worker
        os.kill(worker, signal.SIGKILL)
        until(client, "disk", lambda info: info.worker not in (0, worker) and info.state == "ACTIVE")
        io(life, beside_the_link)
        client.upgrade()
    io(life, beside_the_link)


def test_what_images_need_is_imported_once_for_all_workers_and_only_for_images(life: Life, image: Path) -> None:
    def zygote() -> Path:
        (found,) = (
            Path(f"/proc/{pid}")
            for pid in life.processes()
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1] == str(life.process.pid)
        )
        return found

    with life.client() as client:
        client.create("plain", table="0 8 zero")
        assert "numpy" not in (zygote() / "maps").read_text()
        client.create("disk", table=f"0 {16 * MiB // 512} qcow2 {image}")
        io(life, "write -P 1 0 1M", "flush")
        assert "numpy" in (zygote() / "maps").read_text()
        assert len(list((zygote() / "task").iterdir())) == 1
        worker = client.info("disk")[0].worker
        os.kill(worker, signal.SIGKILL)
        until(client, "disk", lambda info: info.worker not in (0, worker) and info.state == "ACTIVE")
        io(life, "read -P 1 0 1M")
        client.remove("disk", retry=True)
        client.remove("plain")


def test_an_empty_image_makes_no_device_and_that_is_said(
    blkloom: str, life: Life, client: Client, tmp_path: Path, program: Callable[[str, str], str]
) -> None:
    run(program("qemu-img", "qemu-utils"), "create", "-q", "-f", "qcow2", tmp_path / "empty.qcow2", "0")
    command = [blkloom, "--run-dir", str(life.run_dir), "create", "disk", str(tmp_path / "empty.qcow2")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "the disk is empty" in done.stderr
    assert f"qemu-img resize -f qcow2 {tmp_path / 'empty.qcow2'} 1G" in done.stderr
    assert client.info() == []
