"""Empty files, and files whose size is not a multiple of the sector size: foreign clients see the same as with
qemu-nbd.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(60)

Program = Callable[[str, str], str]
Serve = Callable[..., Any]


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@contextmanager
def qemu_nbd(program: Program, path: Path, format: str) -> Iterator[str]:
    """The URI of the image, served by QEMU."""
    socket, pid = path.with_name("qemu.sock"), path.with_name("qemu.pid")
    command = [program("qemu-nbd", "qemu-utils"), "--persistent", "--read-only", "--fork", f"--pid-file={pid}"]
    subprocess.run([*command, f"--format={format}", f"--socket={socket}", path], check=True, timeout=60)
    try:
        yield f"nbd+unix:///?socket={socket}"
    finally:
        run("kill", pid.read_text().strip())


def copied(program: Program, uri: str, to: Path) -> bytes:
    run(program("nbdcopy", "libnbd-bin"), uri, to)
    return to.read_bytes()


@pytest.mark.parametrize("size", [1, 511, 513, 1000, 70001])
def test_a_raw_file_is_what_qemu_makes_of_it(serve: Serve, program: Program, tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * size)
    with qemu_nbd(program, path, "raw") as theirs:
        expected = copied(program, theirs, tmp_path / "theirs")
    server = serve(path, "--socket", tmp_path / "s.sock")
    assert copied(program, server.uri, tmp_path / "ours") == expected
    assert len(expected) % 512 == 0
    assert path.stat().st_size == size, "reading made it longer"


def test_a_write_into_the_last_sector_reaches_the_file(
    serve: Serve, program: Program, tmp_path: Path, qemu_tools: None
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * 1000)
    server = serve(path, "--socket", tmp_path / "s.sock")
    run("qemu-io", "-f", "raw", "-c", "write -P 119 1000 8", "-c", "read -P 0 1008 16", server.uri)
    server.stop()
    assert path.read_bytes() == b"x" * 1000 + b"w" * 8 + bytes(16)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_an_empty_disk_is_an_export_of_size_0(
    serve: Serve, program: Program, tmp_path: Path, qemu_tools: None, format: str
) -> None:
    path = tmp_path / f"disk.{format}"
    run("qemu-img", "create", "-q", "-f", format, path, "0")
    with qemu_nbd(program, path, format) as theirs:
        (expected,) = json.loads(run(program("nbdinfo", "libnbd-bin"), "--json", theirs))["exports"]
    server = serve(path, "--socket", tmp_path / "s.sock")
    (found,) = json.loads(run("nbdinfo", "--json", server.uri))["exports"]
    assert found["export-size"] == expected["export-size"] == 0
    run("qemu-io", "-f", "raw", "-c", "flush", server.uri)
    assert copied(program, server.uri, tmp_path / "copy") == b""
