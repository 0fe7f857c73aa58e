"""What tests of nodes share: a supervisor that leaves no loop device, a device, file systems on nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blkloom.attach import loop_device
from blkloom.control.client import Client
from conformance.file_systems import MiB, mounted, needs_root, run
from faulty_fs import needs_fuse

from .conftest import Life, a_life

Program = Callable[[str, str], str]
SIZE = 64 * MiB

WRITER = """
import mmap, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
print("opened", flush=True)
input()
try:
    os.write(file, mmap.mmap(-1, 4096))
    os.fsync(file)
    print("written")
except OSError as error:
    print(error.strerror)
"""


@contextmanager
def a_life_with_nodes(*options: str) -> Iterator[Life]:
    """A supervisor with nothing in it yet. Afterwards no loop device is left of it. options: of the supervisor."""
    needs_fuse()
    needs_root("a block device")
    with a_life(*options) as life:
        yield life
    assert loop_devices(life) == []


def loop_devices(life: Life) -> list[str]:
    """Kernel loop devices on files of this run directory."""
    numbers = [int(path.name.removeprefix("loop")) for path in Path("/sys/block").glob("loop*")]
    states = {number: loop_device.state_of(number) for number in numbers}
    return [f"loop{n}" for n, state in states.items() if state and state.backing.startswith(str(life.run_dir))]


def make_disk(client: Client, folder: Path, size: int = SIZE) -> str:
    """A device on a file."""
    with (folder / "disk.img").open("wb") as file:
        file.truncate(size)
    client.create("disk", table=f"0 {size // 512} loop {folder}/disk.img")
    return "disk"


@contextmanager
def ext4(program: Program, node: str, folder: Path) -> Iterator[Path]:
    """A new ext4 on the node, mounted."""
    run(program("mkfs.ext4", "e2fsprogs"), "-q", node)
    with mounted(program, "ext4", node, folder, "rw") as place:
        yield place


def number(node: str) -> int:
    """Of a loop device."""
    return int(node.removeprefix("/dev/loop"))


def is_there(node: str) -> bool:
    """Whether a loop device is still attached, and has not been taken by another program since for its own file."""
    state = loop_device.state_of(number(node))
    return state is not None and (state.backing == "/" or "/mounts/" in state.backing)


def write_and_sync(path: Path, data: bytes = bytes(MiB)) -> None:
    """Raises OSError where the device does not take it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def said(blkloom: str, life: Life, *words: str) -> str:
    """What the command prints; it succeeds."""
    return run("env", f"BLKLOOM_RUN_DIR={life.run_dir}", blkloom, *words)


@contextmanager
def writing(node: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has opened the node. It writes and syncs when it gets a line, says whether it could, and ends."""
    words = [sys.executable, "-c", WRITER, node]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "opened\n"
        yield process


@pytest.fixture
def life() -> Iterator[Life]:
    """One of the test's own."""
    with a_life_with_nodes() as life:
        yield life


@pytest.fixture
def disk(client: Client, tmp_path: Path) -> str:
    """Its name."""
    return make_disk(client, tmp_path)
