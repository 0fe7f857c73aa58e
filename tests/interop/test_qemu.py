"""QEMU's programs against `blkloom serve`."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(60)

MiB = 1 << 20
PACKAGE = "qemu-utils"

Program = Callable[[str, str], str]
Serve = Callable[..., Any]


def run(*command: str | Path, status: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status, f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def qemu_img(program: Program) -> str:
    return program("qemu-img", PACKAGE)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(random.Random(1).randbytes(2 * MiB))
        file.seek(6 * MiB)
        file.write(random.Random(2).randbytes(2 * MiB))
    return path


def test_qemu_img_info_sees_a_raw_disk_of_the_right_size(qemu_img: str, serve: Serve, image: Path) -> None:
    told = json.loads(run(qemu_img, "info", "--output=json", serve(image).uri))
    assert (told["format"], told["virtual-size"]) == ("raw", 8 * MiB)


def test_qemu_img_map_sees_holes(qemu_img: str, serve: Serve, image: Path) -> None:
    told = json.loads(run(qemu_img, "map", "--output=json", serve(image).uri))
    assert [(part["start"], part["length"], part["zero"]) for part in told] == [
        (0, 2 * MiB, False),
        (2 * MiB, 4 * MiB, True),
        (6 * MiB, 2 * MiB, False),
    ]


@pytest.mark.parametrize("options", [[], ["-W", "-m", "16"], ["-S", "0"]], ids=["plain", "out of order", "all data"])
def test_qemu_img_converts_to_qcow2_and_back(
    qemu_img: str, serve: Serve, image: Path, tmp_path: Path, options: list[str]
) -> None:
    back = tmp_path / "back.img"
    back.write_bytes(b"x" * 8 * MiB)
    uri, back_uri = serve(image).uri, serve(back).uri
    qcow2 = tmp_path / "disk.qcow2"
    run(qemu_img, "convert", *options, "-f", "raw", "-O", "qcow2", uri, qcow2)
    run(qemu_img, "compare", "-f", "raw", "-F", "qcow2", uri, qcow2)
    run(qemu_img, "convert", *options, "-n", "-f", "qcow2", "-O", "raw", qcow2, back_uri)
    run(qemu_img, "compare", uri, back_uri)
    assert back.read_bytes() == image.read_bytes()


def test_qemu_img_compare_sees_a_difference(qemu_img: str, serve: Serve, image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    content = bytearray(image.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    run(qemu_img, "compare", serve(image).uri, serve(other).uri, status=1)


@pytest.mark.parametrize("options", [[], ["-w", "--pattern=7", "--flush-interval=50"], ["-w", "-t", "writethrough"]])
def test_qemu_img_bench_finishes(qemu_img: str, serve: Serve, image: Path, options: list[str]) -> None:
    assert "Run completed" in run(
        qemu_img, "bench", "-f", "raw", "-c", "500", "-d", "16", "-s", "4096", *options, serve(image).uri
    )


@pytest.mark.parametrize("options", [[], ["--direct-io"], ["--io", "threads"]], ids=["buffered", "direct", "threads"])
def test_qemu_io_reads_back_the_patterns_it_wrote(
    program: Program, serve: Serve, image: Path, tmp_path: Path, options: list[str]
) -> None:
    commands = [
        "write -P 0xaa 0 1M",
        "write -P 0xbb 1000 3001",
        "read -P 0xaa 0 1000",
        "read -P 0xbb 1000 3001",
        "read -P 0xaa 4001 50000",
        "write -z 64k 64k",
        "read -P 0 64k 64k",
        "write -z -u 128k 64k",
        "read -P 0 128k 64k",
        "discard 256k 256k",
        "read -P 0 256k 256k",
        "write -f -P 0xcc 512k 4k",
        "flush",
        "read -P 0xcc 512k 4k",
        "aio_write -P 0xdd 600k 32k",
        "aio_write -P 0xee 700k 32k",
        "aio_flush",
        "read -P 0xdd 600k 32k",
        "read -P 0xee 700k 32k",
    ]
    words = [word for command in commands for word in ("-c", command)]
    server = serve(image, *options)
    told = run(program("qemu-io", PACKAGE), "-f", "raw", *words, server.uri)
    assert "verification failed" not in told
    server.stop()
    content = image.read_bytes()
    assert content[1000:4001] == b"\xbb" * 3001
    assert content[512 * 1024 : 516 * 1024] == b"\xcc" * 4096


def test_qemu_io_cannot_write_to_a_read_only_export(program: Program, serve: Serve, image: Path) -> None:
    uri = serve(image, "--read-only").uri
    run(program("qemu-io", PACKAGE), "-f", "raw", "-c", "write 0 512", uri, status=1)
    run(program("qemu-io", PACKAGE), "-r", "-f", "raw", "-c", "read 0 512", uri)


def test_qemu_img_creates_a_qcow2_inside_the_export(program: Program, qemu_img: str, serve: Serve) -> None:
    uri = serve("--ram", "16M").uri
    run(qemu_img, "create", "-f", "qcow2", uri, "8M")
    run(program("qemu-io", PACKAGE), "-f", "qcow2", "-c", "write -P 0x5a 1M 1M", uri)
    run(qemu_img, "check", "-f", "qcow2", uri)
    run(program("qemu-io", PACKAGE), "-f", "qcow2", "-c", "read -P 0x5a 1M 1M", uri)
