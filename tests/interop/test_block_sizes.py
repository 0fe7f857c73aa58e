"""Devices with large blocks and foreign clients: the clients get the block sizes, respect them, or may ignore them."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conformance.file_systems import loop_device
from conformance.nbd_client import FLUSH, READ, TRIM, WRITE, NbdClient

pytestmark = pytest.mark.timeout(60)

KiB, MiB = 1 << 10, 1 << 20
SYSTEM_PYTHON = "/usr/bin/python3"

Program = Callable[[str, str], str]
Serve = Callable[..., Any]


def run(*command: str | Path, status: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status, f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(4 * MiB))
    return path


@pytest.fixture
def large_blocks(serve: Serve, image: Path) -> Any:
    """A server of `image` in blocks of 4096 bytes."""
    return serve("--table", f"0 8192 loop {image} 0 1 block_size=4096")


@pytest.fixture
def disk_of_large_sectors(program: Program, image: Path) -> Iterator[Path]:
    """`image` as a block device that takes 4096 bytes at a time only."""
    with loop_device(program, image, sector=4096) as device:
        yield device


def told(program: Program, uri: str) -> tuple[int, int, int]:
    """What nbdinfo hears: minimum, preferred, maximum."""
    (export,) = json.loads(run(program("nbdinfo", "libnbd-bin"), "--json", uri))["exports"]
    return export["block_size_minimum"], export["block_size_preferred"], export["block_size_maximum"]


def libnbd(text: str, uri: str) -> None:
    """Runs a script in the system's Python, `h` being a handle not yet connected."""
    if subprocess.run([SYSTEM_PYTHON, "-c", "import nbd"], capture_output=True, check=False).returncode:
        pytest.skip("Python's nbd module is missing (Debian package python3-libnbd)")
    run(SYSTEM_PYTHON, "-c", f"import errno, nbd, sys\nuri = sys.argv[1]\nh = nbd.NBD()\n{text}", uri)


# What is told


@pytest.mark.parametrize("size", [1024, 2048, 4096])
def test_nbdinfo_hears_of_the_block_size_of_the_table(program: Program, serve: Serve, image: Path, size: int) -> None:
    server = serve("--table", f"0 8192 loop {image} 0 1 block_size={size}")
    assert told(program, server.uri) == (size, 4096, 32 * MiB)


def test_sectors_are_the_default_and_leave_clients_free(program: Program, serve: Serve, image: Path) -> None:
    server = serve("--table", f"0 8192 loop {image} 0 1 block_size=512")
    assert told(program, server.uri) == (1, 4096, 32 * MiB)


def test_the_largest_block_of_all_segments_counts(program: Program, serve: Serve, image: Path) -> None:
    table = f"0 4096 loop {image}\n4096 2048 loop {image} 2097152 1 block_size=2048\n6144 64 zero"
    assert told(program, serve("--table", table).uri) == (2048, 4096, 32 * MiB)


def test_a_disk_that_ends_inside_a_large_block_can_be_reached_to_its_end(
    program: Program, serve: Serve, image: Path
) -> None:
    server = serve("--table", f"0 4096 loop {image} 0 1 block_size=4096\n4096 3 zero")
    assert told(program, server.uri) == (1, 4096, 32 * MiB)
    (seen,) = json.loads(run(program("nbdinfo", "libnbd-bin"), "--json", server.uri))["exports"]
    assert seen["export-size"] == 4099 * 512
    libnbd("h.connect_uri(uri); assert h.pread(512, h.get_size() - 512) == bytes(512)", server.uri)


def test_direct_io_tells_what_the_disk_needs(program: Program, serve: Serve, disk_of_large_sectors: Path) -> None:
    server = serve("--table", f"0 8192 loop {disk_of_large_sectors} 0 1 direct_io=require")
    minimum, preferred, _ = told(program, server.uri)
    assert (minimum, preferred) == (4096, 4096)


def test_bindings_of_libnbd_hear_of_them(large_blocks: Any) -> None:
    script = """
h.connect_uri(uri)
sizes = [h.get_block_size(which) for which in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)]
assert sizes == [4096, 4096, 32 << 20], sizes
"""
    libnbd(script, large_blocks.uri)


# Keeping to them


def test_qemu_reads_and_writes_what_does_not_fit_the_blocks(program: Program, large_blocks: Any, image: Path) -> None:
    before = image.read_bytes()
    commands = [
        "write -P 0xbb 1000 3001",
        "read -P 0xbb 1000 3001",
        "write -z 64k 512",
        "read -P 0 64k 512",
        "discard 128k 64k",
        "write -f -P 0xcc 300000 1",
        "flush",
        "read -P 0xcc 300000 1",
    ]
    words = [word for command in commands for word in ("-c", command)]
    text = run(program("qemu-io", "qemu-utils"), "-f", "raw", *words, large_blocks.uri)
    assert "verification failed" not in text
    large_blocks.stop()
    after = image.read_bytes()
    assert after[:1000] == before[:1000]
    assert after[1000:4001] == b"\xbb" * 3001
    assert after[4001 : 64 * KiB] == before[4001 : 64 * KiB]
    assert after[64 * KiB + 512 : 128 * KiB] == before[64 * KiB + 512 : 128 * KiB]
    assert after[192 * KiB : 300_000] == before[192 * KiB : 300_000]
    assert after[300_001:] == before[300_001:]


def test_qemu_img_copies_there_and_back(program: Program, large_blocks: Any, image: Path, tmp_path: Path) -> None:
    qemu_img = program("qemu-img", "qemu-utils")
    seen = json.loads(run(qemu_img, "info", "--output=json", large_blocks.uri))
    assert (seen["format"], seen["virtual-size"]) == ("raw", 4 * MiB)
    copy = tmp_path / "copy.img"
    run(qemu_img, "convert", "-f", "raw", "-O", "raw", large_blocks.uri, copy)
    assert copy.read_bytes() == image.read_bytes()
    copy.write_bytes(random.Random(2).randbytes(4 * MiB))
    run(qemu_img, "convert", "-n", "-f", "raw", "-O", "raw", copy, large_blocks.uri)
    run(qemu_img, "compare", "-f", "raw", "-F", "raw", copy, large_blocks.uri)


def test_qemu_opens_a_disk_that_ends_inside_a_large_block(program: Program, serve: Serve, image: Path) -> None:
    server = serve("--table", f"0 4096 loop {image} 0 1 block_size=4096\n4096 3 zero")
    seen = json.loads(run(program("qemu-img", "qemu-utils"), "info", "--output=json", server.uri))
    assert seen["virtual-size"] == 4099 * 512


# Not keeping to them

UNALIGNED = """
h.set_strict_mode(0)
h.connect_uri(uri)
before = h.pread(1 << 20, 0)
h.pwrite(b"x" * 100, 4050)
h.zero(700, 9000)
h.pwrite(b"y" * 512, 512 * 31, nbd.CMD_FLAG_FUA)
expected = bytearray(before)
expected[4050:4150] = b"x" * 100
expected[9000:9700] = bytes(700)
expected[512 * 31 : 512 * 32] = b"y" * 512
assert h.pread(1 << 20, 0) == expected
assert h.pread(333, 4000) == expected[4000:4333]
h.flush()
"""


def test_a_client_that_asked_and_sends_unaligned_requests_is_served(large_blocks: Any) -> None:
    libnbd(UNALIGNED, large_blocks.uri)


def test_unaligned_requests_are_served_by_direct_io_on_large_sectors(serve: Serve, disk_of_large_sectors: Path) -> None:
    libnbd(UNALIGNED, serve("--table", f"0 8192 loop {disk_of_large_sectors} 0 1 direct_io=require").uri)


@pytest.mark.parametrize("options", ["block_size=4096", "direct_io"])
def test_clients_that_never_ask_use_sectors(
    serve: Serve, image: Path, disk_of_large_sectors: Path, options: str, tmp_path: Path
) -> None:
    """As the kernel's nbd with nbd-client does: 512 bytes unless told by hand."""
    expected = bytearray(image.read_bytes())
    server = serve("--table", f"0 8192 loop {disk_of_large_sectors} 0 1 {options}", "--socket", tmp_path / "sock")
    client = NbdClient.unix(tmp_path / "sock")
    for sector in (1, 8, 15, 8191):
        data = bytes([sector % 251]) * 512
        assert client.ask(WRITE, sector * 512, payload=data).error == 0
        expected[sector * 512 : sector * 512 + 512] = data
    assert client.ask(TRIM, 512 * 33, 512).error == 0
    assert client.ask(FLUSH).error == 0
    kept = client.ask(READ, 512 * 33, 512).data
    assert kept in (bytes(512), expected[512 * 33 : 512 * 34])
    expected[512 * 33 : 512 * 34] = kept
    assert client.ask(READ, 0, 4 * MiB).data == expected
    client.disconnect()
    client.close()
    server.stop()
