"""libnbd's programs and its Python bindings against `blkloom serve`."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
def libnbd() -> Callable[[str, str], str]:
    """`libnbd(script, uri)`: runs a script in the system's Python, `h` being a handle not yet connected."""
    if subprocess.run([SYSTEM_PYTHON, "-c", "import nbd"], capture_output=True, check=False).returncode:
        pytest.skip("Python's nbd module is missing (Debian package python3-libnbd)")

    def script(text: str, uri: str) -> str:
        return run(SYSTEM_PYTHON, "-c", f"import errno, nbd, sys\nuri = sys.argv[1]\nh = nbd.NBD()\n{text}", uri)

    return script


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A sparse file: 1 MiB of data, 2 MiB of hole, 1 MiB of data."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(random.Random(1).randbytes(MiB))
        file.seek(3 * MiB)
        file.write(random.Random(2).randbytes(MiB))
    return path


# nbdinfo


def test_nbdinfo_sees_what_the_export_can(program: Program, serve: Serve, image: Path) -> None:
    server = serve(image, "--export", "système", "--description", "a disk")
    (told,) = json.loads(run(program("nbdinfo", "libnbd-bin"), "--json", server.uri))["exports"]
    assert told["export-name"] == "système"
    assert told["description"] == "a disk"
    assert told["export-size"] == 4 * MiB
    assert told["is_read_only"] is False
    for ability in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert told[f"can_{ability}"] is True, ability
    assert (told["block_size_minimum"], told["block_size_preferred"], told["block_size_maximum"]) == (1, 4096, 32 * MiB)


def test_nbdinfo_sees_a_read_only_export(program: Program, serve: Serve, image: Path) -> None:
    server = serve(image, "--read-only")
    (told,) = json.loads(run(program("nbdinfo", "libnbd-bin"), "--json", server.uri))["exports"]
    assert told["is_read_only"] is True
    assert told["can_trim"] is False
    assert told["can_zero"] is False


def test_nbdinfo_maps_data_and_holes(program: Program, serve: Serve, image: Path) -> None:
    server = serve(image)
    told = json.loads(run(program("nbdinfo", "libnbd-bin"), "--json", "--map", server.uri))
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in told] == [
        (0, MiB, 0),
        (MiB, 2 * MiB, 3),
        (3 * MiB, MiB, 0),
    ]


def test_nbdinfo_lists_every_device(program: Program, serve: Serve, image: Path) -> None:
    server = serve("--device", f"one=0 8192 loop {image}", "--device", "two=0 16 zero", exports=2)
    told = json.loads(run(program("nbdinfo", "libnbd-bin"), "--json", "--list", server.uris[0]))
    assert [(export["export-name"], export["export-size"]) for export in told["exports"]] == [
        ("one", 4 * MiB),
        ("two", 8 * KiB),
    ]


# nbdcopy


@pytest.mark.parametrize("options", [[], ["--synchronous"], ["--connections=4", "--requests=64"], ["--no-extents"]])
def test_nbdcopy_reads_every_byte(
    program: Program, serve: Serve, image: Path, tmp_path: Path, options: list[str]
) -> None:
    server = serve(image)
    copy = tmp_path / "copy"
    run(program("nbdcopy", "libnbd-bin"), *options, server.uri, copy)
    assert copy.read_bytes() == image.read_bytes()


@pytest.mark.parametrize("options", [[], ["--destination-is-zero"], ["--flush", "--connections=4"], ["--allocated"]])
def test_nbdcopy_writes_every_byte(
    program: Program, serve: Serve, image: Path, tmp_path: Path, options: list[str]
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"\0" * 4 * MiB if "--destination-is-zero" in options else b"x" * 4 * MiB)
    server = serve(target)
    run(program("nbdcopy", "libnbd-bin"), *options, image, server.uri)
    assert target.read_bytes() == image.read_bytes()


def test_nbdcopy_between_two_exports_through_stripes_keeps_holes(
    program: Program, serve: Serve, image: Path, tmp_path: Path
) -> None:
    legs = [tmp_path / "left", tmp_path / "right"]
    for leg in legs:
        with leg.open("wb") as file:
            file.truncate(2 * MiB)
    table = f"0 8192 striped 2 64 {legs[0]} 0 {legs[1]} 0"
    server = serve("--device", f"from=0 8192 loop {image}", "--device", f"to={table}", exports=2)
    run(program("nbdcopy", "libnbd-bin"), "--destination-is-zero", *server.uris)
    run(program("nbdcopy", "libnbd-bin"), server.uris[1], tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == image.read_bytes()
    server.stop()
    chunk = 64 * 512
    whole, parts = image.read_bytes(), [leg.read_bytes() for leg in legs]
    for number in range(4 * MiB // chunk):
        at = number // 2 * chunk
        assert parts[number % 2][at : at + chunk] == whole[number * chunk : (number + 1) * chunk]
    assert sum(leg.stat().st_blocks for leg in legs) * 512 < 3 * MiB


# the bindings


def test_structured_reads_tell_holes_of_files(libnbd: Callable[[str, str], str], serve: Serve, image: Path) -> None:
    script = """
h.connect_uri(uri)
chunks = []
def chunk(data, offset, status, error):
    chunks.append((offset, len(data), status))
buffer = h.pread_structured(4 << 20, 0, chunk)
holes = [(offset, size) for offset, size, status in chunks if status == nbd.READ_HOLE]
assert sum(size for _, size in holes) == 2 << 20, chunks
assert not any(buffer[1 << 20 : 3 << 20])
assert sum(size for _, size, _ in chunks) == 4 << 20
chunks.clear()
assert h.pread_structured(4 << 20, 0, chunk, nbd.CMD_FLAG_DF) == buffer
assert [(0, 4 << 20, nbd.READ_DATA)] == chunks
"""
    libnbd(script, serve(image).uri)


def test_block_status_tells_data_and_holes_also_one_at_a_time(
    libnbd: Callable[[str, str], str], serve: Serve, image: Path
) -> None:
    script = """
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(uri)
found = []
def extent(context, offset, entries, error):
    found.append((context, offset, entries))
h.block_status(4 << 20, 0, extent)
assert found == [("base:allocation", 0, [1 << 20, 0, 2 << 20, 3, 1 << 20, 0])], found
found.clear()
h.block_status((4 << 20) - 12345, 12345, extent, nbd.CMD_FLAG_REQ_ONE)
assert found == [("base:allocation", 12345, [(1 << 20) - 12345, 0])], found
"""
    libnbd(script, serve(image).uri)


@pytest.mark.parametrize("backing", ["disk", "ram"])
def test_zeroes_and_trims_with_every_flag_read_as_zeros(
    libnbd: Callable[[str, str], str], serve: Serve, tmp_path: Path, backing: str
) -> None:
    script = """
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(uri)
assert h.can_zero() and h.can_fast_zero() and h.can_trim() and h.can_fua() and h.can_cache()
fua, no_hole, fast = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO
def flags_at(offset, length):
    found = []
    h.block_status(length, offset, lambda context, at, entries, error: found.extend(entries), nbd.CMD_FLAG_REQ_ONE)
    assert found[0] == length, found
    return found[1]
for flags in (0, fua, no_hole, no_hole | fua, fast, fast | fua):
    h.pwrite(b"x" * (1 << 20), 0, fua)
    h.zero(500_000, 100_001, flags)
    assert h.pread(1 << 20, 0) == b"x" * 100_001 + bytes(500_000) + b"x" * ((1 << 20) - 600_001)
    h.cache(1 << 20, 0)
for flags in (0, fua):
    h.pwrite(b"x" * (1 << 20), 0, 0)
    h.trim(512 << 10, 256 << 10, flags)
    assert h.pread(1 << 20, 0) == b"x" * (256 << 10) + bytes(512 << 10) + b"x" * (256 << 10)
    assert flags_at(256 << 10, 512 << 10) == 3
h.pwrite(b"x" * (1 << 20), 0, 0)
h.zero(1 << 20, 0, no_hole)
h.flush()
assert h.pread(1 << 20, 0) == bytes(1 << 20)
"""
    path = tmp_path / "target"
    path.write_bytes(bytes(MiB))
    libnbd(script, serve(*(["--ram", "1M"] if backing == "ram" else [path])).uri)


def test_no_hole_keeps_blocks_allocated(libnbd: Callable[[str, str], str], serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "target"
    path.write_bytes(b"x" * MiB)
    server = serve(path)
    libnbd("h.connect_uri(uri); h.zero(1 << 20, 0, nbd.CMD_FLAG_NO_HOLE); h.flush()", server.uri)
    assert path.stat().st_blocks * 512 >= MiB
    libnbd("h.connect_uri(uri); h.zero(1 << 20, 0); h.flush()", server.uri)
    assert path.stat().st_blocks * 512 < MiB


def test_requests_out_of_bounds_get_the_errors_of_the_protocol_and_the_connection_lives(
    libnbd: Callable[[str, str], str], serve: Serve
) -> None:
    script = """
h.set_strict_mode(0)
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(uri)
size = h.get_size()
def refused(number, request, *arguments):
    try:
        request(*arguments)
    except nbd.Error as error:
        assert error.errno == errno.errorcode[number], (error.errno, request)
    else:
        raise AssertionError(f"{request} was not refused")
    h.pread(512, 0)
for offset in (size, size - 511, size + 512, 1 << 62):
    refused(errno.EINVAL, h.pread, 512, offset)
    refused(errno.ENOSPC, h.pwrite, bytes(512), offset)
    refused(errno.ENOSPC, h.zero, 512, offset)
    refused(errno.EINVAL, h.trim, 512, offset)
    refused(errno.EINVAL, h.cache, 512, offset)
    refused(errno.EINVAL, h.block_status, 512, offset, lambda *_: 0)
refused(errno.EINVAL, h.pread, 512, 0, 1 << 15)
refused(errno.EINVAL, h.flush, 1 << 14)
h.pwrite(b"x" * 512, size - 512)
assert h.pread(512, size - 512) == b"x" * 512
"""
    libnbd(script, serve("--ram", "1M").uri)


def test_writes_to_a_read_only_export_are_not_permitted(
    libnbd: Callable[[str, str], str], serve: Serve, image: Path
) -> None:
    script = """
h.set_strict_mode(0)
h.connect_uri(uri)
assert h.is_read_only()
for request in (lambda: h.pwrite(b"x", 0), lambda: h.zero(512, 0), lambda: h.trim(512, 0)):
    try:
        request()
    except nbd.Error as error:
        assert error.errno == "EPERM", error.errno
    else:
        raise AssertionError("not refused")
h.flush()
assert len(h.pread(4 << 20, 0)) == 4 << 20
"""
    before = image.read_bytes()
    libnbd(script, serve(image, "--read-only").uri)
    assert image.read_bytes() == before


def test_error_segment_fails_alone(libnbd: Callable[[str, str], str], serve: Serve, image: Path) -> None:
    script = """
h.connect_uri(uri)
for request in (lambda: h.pread(1024, 51200), lambda: h.pwrite(b"x" * 512, 51200), lambda: h.pread(60_000, 0)):
    try:
        request()
    except nbd.Error as error:
        assert error.errno == "EIO", error.errno
    else:
        raise AssertionError("not refused")
assert len(h.pread(51200, 0)) == 51200 and len(h.pread(51200, 52224)) == 51200
"""
    table = f"0 100 loop {image}\n100 2 error\n102 100 loop {image} 1048576"
    libnbd(script, serve("--table", table).uri)


def test_sixty_four_requests_in_flight_are_all_answered(
    libnbd: Callable[[str, str], str], serve: Serve, image: Path
) -> None:
    script = """
h.connect_uri(uri)
buffers = [nbd.Buffer(65536) for _ in range(64)]
cookies = [h.aio_pread(buffer, number * 65536) for number, buffer in enumerate(buffers)]
while cookies:
    h.poll(-1)
    cookies = [cookie for cookie in cookies if not h.aio_command_completed(cookie)]
assert b"".join(bytes(buffer.to_bytearray()) for buffer in buffers) == open(sys.argv[2], "rb").read()
"""
    uri = serve(image, "--direct-io").uri
    libnbd(script.replace("sys.argv[2]", repr(str(image))), uri)
