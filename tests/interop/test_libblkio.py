"""QEMU's own client of disks over vhost-user: qemu-io and qemu-img with libblkio, as their users run them."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from conformance.file_systems import MiB, run
from documented import ROOT

SIZE = 16 * MiB
BLOCK, CLUSTER = 4096, 65536
REQUESTS = 600
AT_ONCE = 24
"""Requests in flight together."""
Disk = tuple[Path, str]


def program(name: str) -> Path:
    """QEMU's, of a release whose QEMU has libblkio."""
    path = ROOT / ".cache/qemu" / name
    if not path.exists():
        pytest.skip(f"{path} is missing (make test-tools; needs Debian's archive, for amd64)")
    return path


@pytest.fixture(params=["raw", "qcow2"])
def disk(request: pytest.FixtureRequest, serve: Callable[..., object], tmp_path: Path, qemu_tools: None) -> Disk:
    """An image, and what QEMU's programs call the disk that blkloom makes of it."""
    image = tmp_path / f"disk.{request.param}"
    run("qemu-img", "create", "-q", "-f", request.param, image, str(SIZE))
    socket = tmp_path / "socket"
    serve(image, "--vhost-user", socket)
    return image, f"driver=virtio-blk-vhost-user,path={socket},cache.direct=on"


def test_its_requests_give_what_a_model_gives(disk: Disk) -> None:
    image, name = disk
    chosen, model = random.Random(image.suffix), bytearray(SIZE)
    commands: list[str] = []
    busy: list[range] = []
    for _ in range(REQUESTS):
        kind = chosen.choice(["write", "write", "zero", "discard", "read"])
        # Whole clusters are discarded: they read as zeros.
        unit, count = (CLUSTER // BLOCK, 1) if kind == "discard" else (1, chosen.choice([1, 1, 2, 16, 64]))
        start = chosen.randrange(SIZE // BLOCK // unit - count) * unit
        blocks = range(start, start + count * unit)
        if len(busy) == AT_ONCE or any(one.start < blocks.stop and blocks.start < one.stop for one in busy):
            commands.append("aio_flush")  # waits for all requests
            busy.clear()
        busy.append(blocks)
        at, length = start * BLOCK, len(blocks) * BLOCK
        if kind == "write":
            pattern = chosen.randrange(1, 256)
            model[at : at + length] = bytes([pattern]) * length
            commands.append(f"aio_write -q -P {pattern} {at} {length}")
        elif kind == "zero":
            model[at : at + length] = bytes(length)
            commands.append(f"aio_write -q -z {chosen.choice(['', '-u'])} {at} {length}")
        elif kind == "discard":
            model[at : at + length] = bytes(length)
            commands += ["aio_flush", f"discard -q {at} {length}"]
        else:
            same = next((end for end in range(at, at + length) if model[end] != model[at]), at + length)
            commands.append(f"aio_read -q -P {model[at]} {at} {same - at // BLOCK * BLOCK}")
    commands += ["aio_flush", "flush", "quit"]
    done = subprocess.run(
        [program("qemu-io"), "--image-opts", name],
        input="\n".join(commands) + "\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    printed = done.stdout.replace("qemu-io> ", "").strip() + done.stderr
    assert (done.returncode, printed) == (0, "")
    read = image.with_name("read.raw")
    run(program("qemu-img"), "convert", "-U", "--image-opts", "-O", "raw", name, read)
    found = read.read_bytes()
    assert [at for at in range(0, SIZE, BLOCK) if found[at : at + BLOCK] != model[at : at + BLOCK]] == []


def test_an_image_is_copied_through_it(disk: Disk) -> None:
    image, name = disk
    source, copy = image.with_name("source.raw"), image.with_name("copy.raw")
    chosen = random.Random(1)
    with source.open("wb") as file:
        file.truncate(SIZE)
        for _ in range(200):
            file.seek(chosen.randrange(SIZE // 512 - 64) * 512)
            file.write(chosen.randbytes(chosen.randrange(1, 64) * 512))
    convert = [program("qemu-img"), "convert", "-m", "16", "-W", "-n"]
    run(*convert, "-f", "raw", "--target-image-opts", source, name)
    run(*convert[:-1], "--image-opts", "-O", "raw", name, copy)
    assert copy.read_bytes() == source.read_bytes()
