"""The documented example of a target with coroutines works as docs/writing-a-target.md says."""

from __future__ import annotations

import errno
import random
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import blkloom
from async_target import PATIENCE, Calls
from blkloom.errors import TableError
from blkloom.examples import http
from blkloom.examples.http import CLUSTER, Http

DOCS = Path(__file__).parents[2] / "docs"
SIZE = 40 * CLUSTER


class Server(ThreadingHTTPServer):
    """Serves one file, in ranges. No range is answered before `together` of them have come."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Ranges)
        self.content = random.Random(15).randbytes(SIZE)
        self.together = threading.Barrier(1)
        self.asked: list[str] = []
        self.refuse = False
        self.connections = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/disk.img"


class Ranges(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.asked.append(asked)
        self.server.together.wait(PATIENCE)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        assert found is not None
        data = self.server.content[int(found[1]) : int(found[2]) + 1]
        self.send_response(503 if self.server.refuse else 206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def table(server: Server) -> str:
    return f"0 {SIZE // 512} http {server.url}"


def test_the_disk_is_the_file(server: Server) -> None:
    with blkloom.open(table(server), targets=[Http]) as device:
        assert device.pread(SIZE, 0) == server.content


def test_many_ranges_are_asked_for_at_once_and_each_only_once(server: Server) -> None:
    server.together = threading.Barrier(32)
    offsets = [number * CLUSTER for number in range(32)]
    with blkloom.open(table(server), targets=[Http]) as device:
        for _ in range(3):
            buffers = [bytearray(4096) for _ in offsets]
            device.batch([("r", buffer, offset) for buffer, offset in zip(buffers, offsets, strict=True)])
            assert b"".join(buffers) == b"".join(server.content[offset : offset + 4096] for offset in offsets)
    assert sorted(server.asked) == sorted(f"bytes={offset}-{offset + CLUSTER - 1}" for offset in offsets)


def test_requests_to_one_cluster_fetch_it_once(server: Server) -> None:
    with Calls() as call, blkloom.open(table(server), targets=[Http]) as device:
        reads = [call(device.pread, 512, 512 * number) for number in range(32)]
        assert b"".join(read.result(PATIENCE) for read in reads) == server.content[: 32 * 512]
    assert len(server.asked) == 1


def test_connections_are_used_again(server: Server) -> None:
    with blkloom.open(table(server), targets=[Http]) as device:
        for number in range(20):
            device.pread(512, number * CLUSTER)
    assert server.connections == 2, "one asks for the size"


def test_what_is_written_stays_and_the_rest_is_the_file(server: Server) -> None:
    expected = bytearray(server.content)
    with blkloom.open(table(server), targets=[Http]) as device:
        device.pwrite(b"w" * 512, CLUSTER - 256)
        expected[CLUSTER - 256 : CLUSTER + 256] = b"w" * 512
        device.write_zeroes(3 * CLUSTER, 512)
        expected[3 * CLUSTER : 3 * CLUSTER + 512] = bytes(512)
        assert device.pread(SIZE, 0) == expected


def test_it_is_read_only_when_its_device_is(server: Server) -> None:
    with blkloom.open(table(server), targets=[Http], read_only=True) as device:
        for _ in range(2):
            with pytest.raises(OSError, match=rf"\[Errno {errno.EROFS}\]"):
                device.pwrite(b"x", 0)
            assert device.pread(8, 0) == server.content[:8]


def test_a_server_that_refuses_fails_the_read_and_is_asked_again(server: Server) -> None:
    server.refuse = True
    with blkloom.open(table(server), targets=[Http]) as device:
        with pytest.raises(OSError, match=rf"\[Errno {errno.EIO}\]"):
            device.pread(512, 0)
        server.refuse = False
        assert device.pread(512, 0) == server.content[:512]


def test_a_file_that_is_too_short_is_refused(server: Server) -> None:
    server.content = server.content[:-1]
    with pytest.raises(TableError, match=f"the file has {SIZE - 1} bytes"):
        blkloom.open(table(server), targets=[Http])


def test_the_documentation_shows_the_code_that_runs() -> None:
    source = Path(http.__file__).read_text()
    shown = (DOCS / "writing-a-target.md").read_text().split("```python\nimport asyncio")[1].split("```")[0]
    assert source.endswith(shown), "all of it, with its imports"
