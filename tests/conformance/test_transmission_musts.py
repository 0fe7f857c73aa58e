"""Every MUST of proto.md for a server in the transmission phase, with a test for each.

MUSTS maps the words of the specification to the name of a test; another test checks that each name exists. Requirements
for clients, and for features that this server does not offer, are not listed.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

import blkloom
from blkloom import _engine

from .transmission import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    EINVAL,
    EIO,
    ENOSPC,
    ENOTSUP,
    EOVERFLOW,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    STYLES,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Hangup,
    Transmission,
    chunks_cover,
)

MUSTS = {
    "MUST use only simple replies without negotiation": "test_replies_have_the_negotiated_form_and_repeat_the_cookie",
    "cookie MUST match the request": "test_replies_have_the_negotiated_form_and_repeat_the_cookie",
    "all server replies MUST use an extended reply; offset MUST match": (
        "test_replies_have_the_negotiated_form_and_repeat_the_cookie"
    ),
    "the flag NBD_REPLY_FLAG_DONE MUST be sent last": "test_only_the_last_chunk_is_marked_done",
    "writes completed before a FLUSH MUST be on non-volatile storage before its reply": (
        "test_flush_and_fua_sync_before_they_are_answered"
    ),
    "MUST NOT reply to FUA until the data is persisted": "test_flush_and_fua_sync_before_they_are_answered",
    "with SEND_FUA the server MUST accept FUA on every command": "test_fua_is_accepted_with_every_command",
    "the effects of FLUSH and FUA MUST be visible across all connections": (
        "test_what_one_connection_wrote_another_reads_and_flushes"
    ),
    "READ_ONLY: the server MUST error subsequent write operations": "test_read_only_exports_refuse_writes",
    "NO_HOLE MUST be supported with SEND_WRITE_ZEROES; MUST be fully provisioned": (
        "test_no_hole_leaves_the_range_allocated"
    ),
    "REQ_ONE: MUST NOT send metadata on more than one extent, nor beyond the request": (
        "test_one_extent_is_sent_when_one_is_asked_for"
    ),
    "FAST_ZERO: MUST fail quickly with NBD_ENOTSUP": "test_fast_zero_fails_where_zeroing_means_writing",
    "without FAST_ZERO the server MUST NOT fail with NBD_ENOTSUP": "test_zeroing_always_works_and_reads_as_zeros",
    "NONE: length MUST be 0 and DONE set": "test_only_the_last_chunk_is_marked_done",
    "content MUST lie within the request and MUST NOT overlap; all of it MUST be covered": (
        "test_chunks_cover_a_read_exactly_once"
    ),
    "hole size MUST be nonzero": "test_chunks_cover_a_read_exactly_once",
    "block status: at least one descriptor, each length nonzero": "test_block_status_covers_what_it_says_truly",
    "BLOCK_STATUS_EXT MUST be used with extended headers, and only with them": (
        "test_block_status_covers_what_it_says_truly"
    ),
    "error: MUST be nonzero; message within 4096 bytes": "test_errors_have_the_values_the_protocol_names",
    "an error in a simple read reply MUST NOT be followed by payload": (
        "test_failed_reads_carry_no_data_and_the_connection_goes_on"
    ),
    "on an error the server MUST include an error chunk": "test_failed_reads_carry_no_data_and_the_connection_goes_on",
    "DF: MUST send at most one content chunk, and MUST support 64 KiB": "test_unfragmented_reads_are_one_data_chunk",
    "WRITE: the server MUST write the data, then reply": "test_what_was_answered_is_readable",
    "if an error occurs, the server MUST set the error code": "test_errors_have_the_values_the_protocol_names",
    "DISC: the server MUST handle all outstanding requests, then close": "test_disconnect_answers_what_is_outstanding",
    "WRITE_ZEROES MUST zero out the data": "test_zeroing_always_works_and_reads_as_zeros",
    "CACHE MUST reject unknown flags, and changes nothing": "test_cache_has_no_effect_on_contents",
    "the payload form of BLOCK_STATUS, not offered, MUST be consumed and refused with EINVAL": (
        "test_payload_of_a_command_that_takes_none_is_consumed"
    ),
    "compact requests MUST NOT have PAYLOAD_LEN": "test_unknown_flags_and_commands_are_invalid",
}

SIZE = 4 << 20


def test_every_must_names_a_test_that_exists() -> None:
    assert [name for name in MUSTS.values() if name not in globals()] == []


@pytest.fixture(scope="module")
def engine() -> Iterator[_engine.Engine]:
    made = _engine.Engine(loops=1)
    yield made
    made.close()


@pytest.fixture
def disk(engine: _engine.Engine, tmp_path: Path) -> Iterator[blkloom.Device]:
    """A sparse file on the disk's file system."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    with blkloom.open(path, engine=engine) as device:
        yield device


Connect = Callable[..., Transmission]


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def connect(engine: _engine.Engine, disk: blkloom.Device, style: str) -> Iterator[Connect]:
    """Connections to an export, by default of `disk`."""
    made: list[Transmission] = []

    def connect(device: blkloom.Device = disk, *, read_only: bool = False, **options: object) -> Transmission:
        client = Transmission(engine, _engine.Export(device, read_only=read_only), style, **options)
        made.append(client)
        return client

    yield connect
    for client in made:
        client.close()


def test_replies_have_the_negotiated_form_and_repeat_the_cookie(connect: Connect) -> None:
    client = connect()
    cookies = {client.send(READ, at * 512, 512) for at in range(20)} | {client.send(FLUSH)}
    assert {client.reply().cookie for _ in range(21)} == cookies  # `reply` checks magic and offset


def test_what_was_answered_is_readable(connect: Connect) -> None:
    client, data = connect(), os.urandom(70_001)
    for offset in (0, 1, 511, 4097, SIZE - len(data)):
        assert client.ask(WRITE, offset, data=data).error == 0
        assert client.ask(READ, offset, len(data)).data == data


def test_only_the_last_chunk_is_marked_done(connect: Connect, style: str) -> None:
    client = connect()
    client.ask(WRITE, 65536, data=b"x" * 65536)
    replies = [
        client.ask(READ, 0, 262144),
        client.ask(WRITE, 0, data=b"y"),
        client.ask(FLUSH),
        client.ask(READ, SIZE, 1),
    ]
    for reply in replies if style != "simple" else ():
        assert [chunk.flags for chunk in reply.chunks] == [0] * (len(reply.chunks) - 1) + [1]
        assert all(chunk.payload == b"" for chunk in reply.chunks if chunk.kind == 0)


def test_chunks_cover_a_read_exactly_once(connect: Connect, style: str) -> None:
    client = connect()
    for at in range(0, SIZE, 1 << 19):
        client.ask(WRITE, at + 100_000, data=b"d" * 50_000)
    for offset, length in ((0, SIZE), (1, 300_000), (99_999, 50_002), (131_072, 40_000)):
        reply = client.ask(READ, offset, length)
        model = bytearray(SIZE)
        for at in range(0, SIZE, 1 << 19):
            model[at + 100_000 : at + 150_000] = b"d" * 50_000
        assert reply.data == model[offset : offset + length]
        if style != "simple":
            assert chunks_cover(reply, offset, length)
    assert style == "simple" or client.ask(READ, 0, SIZE).holes, "a sparse file is read with holes"


def test_unfragmented_reads_are_one_data_chunk(connect: Connect, style: str) -> None:
    client = connect()
    if style == "simple":
        assert client.ask(READ, 0, 65536, flags=DF).error == EINVAL
        return
    client.ask(WRITE, 1 << 20, data=b"d" * 65536)
    reply = client.ask(READ, (1 << 20) - 32768, 65536, flags=DF)
    assert [chunk.kind for chunk in reply.chunks if chunk.kind] == [1]
    assert reply.data == bytes(32768) + b"d" * 32768


def test_errors_have_the_values_the_protocol_names(connect: Connect) -> None:
    client = connect(max_payload=1 << 20)
    asked = [
        (READ, SIZE, 1, 0, EINVAL),
        (READ, SIZE - 1, 2, 0, EINVAL),
        (READ, (1 << 64) - 1, 1, 0, EINVAL),
        (READ, 0, (1 << 20) + 1, 0, EOVERFLOW),
        (TRIM, SIZE, 1, 0, EINVAL),
        (WRITE_ZEROES, SIZE - 1, 2, 0, ENOSPC),
        (CACHE, SIZE, 1, 0, EINVAL),
        (FLUSH, 0, 1, 0, EINVAL),
        (BLOCK_STATUS, SIZE - 1, 2, 0, EINVAL),
    ]
    for command, offset, length, flags, expected in asked:
        assert client.ask(command, offset, length, flags=flags).error == expected, (command, offset, length)
    assert client.ask(WRITE, SIZE - 1, data=b"ab").error == ENOSPC
    assert client.ask(READ, SIZE - 1, 1).data == b"\0", "the refused write's payload was consumed"


def test_writes_longer_than_the_maximum_payload_are_refused_or_cut(connect: Connect, style: str) -> None:
    client = connect(max_payload=65536)
    client.send(WRITE, 0, data=b"x" * 65537)
    if style == "extended":
        with pytest.raises(Hangup):
            client.reply()
    else:
        assert client.reply().error == EINVAL
        assert client.ask(READ, 0, 4).data == bytes(4)


def test_unknown_flags_and_commands_are_invalid(connect: Connect, style: str) -> None:
    client = connect()
    for flag in (1 << bit for bit in range(6, 16)):
        for command in (READ, TRIM, CACHE, WRITE_ZEROES, FLUSH):
            length = 0 if command == FLUSH else 512
            assert client.ask(command, 0, length, flags=flag).error == EINVAL
    for command in (8, 9, 255, 65535):
        assert client.ask(command, 0, 0).error == EINVAL
    if style != "extended":
        assert client.ask(WRITE, 0, data=b"x", flags=PAYLOAD_LEN).error == EINVAL
    assert client.ask(READ, 0, 1).data == b"\0"


@pytest.mark.parametrize("style", ["extended"], indirect=True)
def test_payload_of_a_command_that_takes_none_is_consumed(connect: Connect) -> None:
    client = connect()
    for command in (BLOCK_STATUS, READ, FLUSH, TRIM, 99):
        assert client.ask(command, 0, data=struct.pack(">QI", SIZE, 7)).error == EINVAL
    assert client.ask(READ, 0, 1).data == b"\0"


def test_fua_is_accepted_with_every_command(connect: Connect, style: str) -> None:
    client = connect()
    for command in (READ, TRIM, CACHE, WRITE_ZEROES):
        assert client.ask(command, 0, 4096, flags=FUA).error == 0
    assert client.ask(FLUSH, flags=FUA).error == 0
    assert client.ask(WRITE, 0, data=b"x" * 512, flags=FUA).error == 0
    if style != "simple":
        assert client.ask(BLOCK_STATUS, 0, 4096, flags=FUA).error == 0


def test_read_only_exports_refuse_writes(connect: Connect, disk: blkloom.Device) -> None:
    disk.pwrite(b"kept", 0)
    client = connect(read_only=True)
    assert client.ask(WRITE, 0, data=b"gone").error == EPERM
    assert client.ask(TRIM, 0, 4096).error == EPERM
    assert client.ask(WRITE_ZEROES, 0, 4096).error == EPERM
    assert client.ask(FLUSH).error == 0
    assert client.ask(READ, 0, 4).data == b"kept"


@pytest.mark.parametrize("flags", [0, NO_HOLE, FUA, NO_HOLE | FUA])
def test_zeroing_always_works_and_reads_as_zeros(connect: Connect, flags: int) -> None:
    client = connect()
    client.ask(WRITE, 0, data=b"x" * 300_000)
    assert client.ask(WRITE_ZEROES, 1000, 200_000, flags=flags).error == 0
    assert client.ask(READ, 0, 300_000).data == b"x" * 1000 + bytes(200_000) + b"x" * 99_000


def test_no_hole_leaves_the_range_allocated(connect: Connect, tmp_path: Path) -> None:
    client, path = connect(), tmp_path / "disk.img"
    assert client.ask(WRITE_ZEROES, 0, 1 << 20, flags=NO_HOLE).error == 0
    assert client.ask(FLUSH).error == 0
    assert path.stat().st_blocks * 512 >= 1 << 20
    assert client.ask(WRITE_ZEROES, 0, 1 << 20).error == 0
    assert client.ask(FLUSH).error == 0
    assert path.stat().st_blocks * 512 < 1 << 20


def test_fast_zero_fails_where_zeroing_means_writing(engine: _engine.Engine, connect: Connect) -> None:
    path = Path("/dev/shm") / f"blkloom-fast-zero-{os.getpid()}"  # tmpfs has no FALLOC_FL_ZERO_RANGE
    path.write_bytes(b"x" * 65536)
    try:
        with blkloom.open(path, engine=engine) as device:
            client = connect(device)
            assert client.ask(WRITE_ZEROES, 0, 4096, flags=FAST_ZERO | NO_HOLE).error == ENOTSUP
            assert client.ask(READ, 0, 4096).data == b"x" * 4096, "an ENOTSUP changes nothing"
            assert client.ask(WRITE_ZEROES, 0, 4096, flags=FAST_ZERO).error == 0
            assert client.ask(WRITE_ZEROES, 4096, 4096, flags=NO_HOLE).error == 0
            assert client.ask(READ, 0, 8192).data == bytes(8192)
            client.close()
    finally:
        path.unlink()


def test_block_status_covers_what_it_says_truly(connect: Connect, style: str) -> None:
    client = connect()
    if style == "simple":
        assert client.ask(BLOCK_STATUS, 0, SIZE).error == EINVAL
        return
    client.ask(WRITE, 1 << 20, data=b"d" * 65536)
    at, found = 0, []
    while at < SIZE:
        reply = client.ask(BLOCK_STATUS, at, SIZE - at)
        assert [chunk.kind for chunk in reply.chunks] == [6 if style == "extended" else 5]
        assert all(length > 0 for length, _ in reply.extents)
        for length, status in reply.extents:
            found.append((at, length, status))
            at += length
    assert at == SIZE
    for start, length, status in found:
        if status & 2:
            assert client.ask(READ, start, length).data == bytes(length)
    assert any(status == 0 and start <= 1 << 20 < start + length for start, length, status in found)
    assert any(status == 3 for _, _, status in found)


@pytest.mark.parametrize("style", ["structured", "extended"], indirect=True)
def test_one_extent_is_sent_when_one_is_asked_for(connect: Connect) -> None:
    client = connect()
    client.ask(WRITE, 1 << 20, data=b"d" * 65536)
    for offset, length in ((0, SIZE), (0, 512), (1 << 20, 4096), ((1 << 20) - 512, 1024)):
        ((size, _),) = client.ask(BLOCK_STATUS, offset, length, flags=REQ_ONE).extents
        assert 0 < size <= length


def test_cache_has_no_effect_on_contents(connect: Connect) -> None:
    client = connect()
    client.ask(WRITE, 0, data=b"c" * 8192)
    assert client.ask(CACHE, 0, SIZE).error == 0
    assert client.ask(READ, 0, 8192).data == b"c" * 8192
    assert client.ask(CACHE, 0, 512, flags=DF).error == EINVAL


def test_failed_reads_carry_no_data_and_the_connection_goes_on(engine: _engine.Engine, connect: Connect) -> None:
    with blkloom.open("0 8 zero\n8 8 error\n16 8 zero\n", engine=engine) as device:
        client = connect(device)
        for offset, length in ((4096, 4096), (0, 12288), (4095, 2), (0, 4097)):
            assert client.ask(READ, offset, length).error == EIO
        assert client.ask(READ, 0, 4096).data == bytes(4096)
        assert client.ask(WRITE, 4096, data=b"x").error == EIO
        assert client.ask(READ, 8192, 4096).data == bytes(4096)
        client.close()


class Synced(blkloom.TargetSpec):
    """Memory that remembers whether it was flushed since the last write."""

    name = "synced"
    loaded: ClassVar[LoadedSynced]

    def load(self, context: object, start: int, length: int) -> LoadedSynced:  # type: ignore[override]
        Synced.loaded = LoadedSynced(self, [(0, length, _engine.Extent.fault())])
        return Synced.loaded


class LoadedSynced(blkloom.LoadedTarget):
    writes = flushes = True

    def __init__(self, spec: Synced, map: list[tuple[int, int, _engine.Extent]]) -> None:
        super().__init__(spec, map)  # type: ignore[arg-type]
        self.dirty = False
        self.dirty_when_flushed: list[bool] = []

    def read(self, offset: int, length: int) -> bytes:
        return bytes(length)

    def write(self, offset: int, data: bytes, *, fua: bool) -> None:
        self.dirty = True

    def flush(self) -> None:
        self.dirty_when_flushed.append(self.dirty)
        self.dirty = False


def test_flush_and_fua_sync_before_they_are_answered(engine: _engine.Engine, connect: Connect) -> None:
    with blkloom.open("0 8 synced", engine=engine, targets=[Synced]) as device:
        client, other, loaded = connect(device), connect(device), Synced.loaded
        assert client.ask(WRITE, 0, data=b"x" * 512).error == 0
        assert loaded.dirty
        assert other.ask(FLUSH).error == 0, "a flush covers what was answered on any connection"
        assert not loaded.dirty
        assert client.ask(WRITE, 0, data=b"x" * 512, flags=FUA).error == 0
        assert not loaded.dirty
        assert loaded.dirty_when_flushed == [True, True]
        client.close()
        other.close()


def test_what_one_connection_wrote_another_reads_and_flushes(connect: Connect) -> None:
    first, second = connect(), connect()
    for at in range(50):
        data = os.urandom(1000)
        assert first.ask(WRITE, at * 1000, data=data).error == 0
        assert second.ask(READ, at * 1000, 1000).data == data
    assert second.ask(FLUSH).error == 0


class Slow(blkloom.TargetSpec):
    """Answers reads when told to."""

    name = "slow"
    go = threading.Event()

    def load(self, context: object, start: int, length: int) -> LoadedSlow:  # type: ignore[override]
        return LoadedSlow(self, [(0, length, _engine.Extent.fault())])


class LoadedSlow(blkloom.LoadedTarget):
    def read(self, offset: int, length: int) -> bytes:
        Slow.go.wait(20)
        return b"s" * length


def test_disconnect_answers_what_is_outstanding(engine: _engine.Engine, connect: Connect) -> None:
    Slow.go.clear()
    with blkloom.open("0 64 slow", engine=engine, targets=[Slow]) as device:
        client = connect(device)
        cookies = {client.send(READ, at * 512, 512) for at in range(10)}
        client.send(DISC)
        Slow.go.set()
        replies = [client.reply() for _ in range(10)]
        assert {reply.cookie for reply in replies} == cookies
        assert all(reply.data == b"s" * 512 for reply in replies)
        with pytest.raises(Hangup):
            client.exactly(1)
        assert client.ended() == "the client disconnected"


def test_zero_length_requests_do_not_end_the_connection(connect: Connect, style: str) -> None:
    client = connect()
    for command in (READ, TRIM, WRITE_ZEROES, CACHE):
        assert client.ask(command, 0, 0).error == 0
    assert client.ask(WRITE, 0, 0).error == 0
    if style != "simple":
        assert client.ask(BLOCK_STATUS, 0, 0).error == EINVAL
    assert client.ask(READ, 0, 1).data == b"\0"


def test_a_full_file_system_is_enospc_and_everything_else_goes_on(
    engine: _engine.Engine, connect: Connect, small_file_system: Path
) -> None:
    path = small_file_system / "disk.img"
    with path.open("wb") as file:
        file.truncate(8 << 20)
    with blkloom.open(path, engine=engine) as device:
        client, errors = connect(device), set()
        for at in range(0, 8 << 20, 1 << 16):
            errors.add(client.ask(WRITE, at, data=b"f" * 65536).error)
        assert errors == {0, ENOSPC}
        assert client.ask(READ, 0, 4096).data == b"f" * 4096
        assert client.ask(TRIM, 0, 1 << 20).error == 0
        assert client.ask(WRITE, 0, data=b"g" * 65536).error == 0
        client.close()


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", tmp_path], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_file_truncated_underneath_is_eio_and_never_a_crash(connect: Connect, tmp_path: Path) -> None:
    client = connect()
    os.truncate(tmp_path / "disk.img", 1 << 20)
    for offset, length in ((1 << 20, 512), (2 << 20, 1 << 20), ((1 << 20) - 4096, 8192)):
        assert client.ask(READ, offset, length).error == EIO
    assert client.ask(READ, 0, 65536).data == bytes(65536)
    os.truncate(tmp_path / "disk.img", SIZE)
    assert client.ask(READ, 2 << 20, 4096).data == bytes(4096)


def test_errno_of_the_protocol_is_that_of_linux() -> None:
    assert (EPERM, EIO, EINVAL, ENOSPC) == (errno.EPERM, errno.EIO, errno.EINVAL, errno.ENOSPC)
