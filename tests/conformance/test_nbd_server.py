"""NBD server with the engine: hand-over of sockets to the engine, and exports.

Clients are raw sockets if the order of bytes matters, and the programs of libnbd otherwise.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import socket
import struct
from pathlib import Path

import pytest

from blkloom import _engine
from blkloom.errors import UsageError
from blkloom.export.nbd.codes import Option, Reply
from blkloom.export.nbd.server import NbdServer
from blkloom.export.systemd import adopt_socket

from .raw_client import GREETING, READ, SIZE, WRITE, Client, export, go_data, option_bytes, request, run, serving

needs_nbdinfo = pytest.mark.skipif(not shutil.which("nbdinfo"), reason="nbdinfo is missing: apt install libnbd-bin")
SYSTEM_PYTHON = "/usr/bin/python3"
needs_libnbd = pytest.mark.skipif(
    not os.path.exists("/usr/lib/python3/dist-packages/nbd.py"), reason="libnbd is missing: apt install python3-libnbd"
)


async def tool(*command: str) -> str:
    """Run a client program; its output. It must succeed."""
    process = await asyncio.create_subprocess_exec(*command, stdout=-1, stderr=-2)
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


# hand-over


@pytest.mark.parametrize("way", ["EXPORT_NAME", "GO"])
def test_requests_sent_along_with_the_last_option_are_served(
    one_loop: _engine.Engine, tmp_path: Path, way: str
) -> None:
    async def main() -> None:
        async with serving(one_loop, tmp_path) as server:
            client = await Client.connect(server)
            last = (
                option_bytes(Option.EXPORT_NAME, b"disk")
                if way == "EXPORT_NAME"
                else option_bytes(Option.GO, go_data(""))
            )
            write = request(WRITE, 512, 4096) + b"w" * 4096
            await client.send(struct.pack(">I", 3) + last + write + request(READ, 512, 4096))
            assert await client.receive(18) == GREETING
            await client.receive(10 if way == "EXPORT_NAME" else 20 + 12 + 20)
            await client.simple_reply()
            assert await client.simple_reply(4096) == b"w" * 4096
            client.close()

    run(main)


def test_the_name_decides_which_device_is_served(one_loop: _engine.Engine, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(one_loop, tmp_path, export(one_loop, "a"), export(one_loop, "b")) as server:
            writer = await Client.greeted(server)
            await writer.go("b")
            await writer.send(request(WRITE, 0, 1) + b"b")
            await writer.simple_reply()
            for name, byte in (("a", b"\0"), ("b", b"b"), ("", b"\0")):
                reader = await Client.greeted(server)
                await reader.go(name)
                assert await reader.read(0, 1) == byte
                reader.close()
            writer.close()

    run(main)


def test_tcp_connections_are_prompt_kept_alive_and_non_blocking(one_loop: _engine.Engine) -> None:
    async def main() -> None:
        async with NbdServer(one_loop, [export(one_loop, "disk")]) as server:
            await server.listen_tcp("127.0.0.1", 0)
            client = await Client.greeted(server)
            await client.go()
            assert await client.read(0, 512) == bytes(512)
            served = descriptor_of_peer(client.socket)
            assert served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert served.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert fcntl.fcntl(served, fcntl.F_GETFL) & os.O_NONBLOCK
            served.close()
            client.close()

    run(main)


def descriptor_of_peer(client: socket.socket) -> socket.socket:
    """The server's end of a TCP connection, found among this process's descriptors."""
    for entry in os.listdir("/proc/self/fd"):
        try:
            duplicate = os.dup(int(entry))
        except OSError:
            continue
        try:
            found = socket.socket(fileno=duplicate)
        except OSError:
            os.close(duplicate)
            continue
        try:
            if found.getpeername() == client.getsockname():
                return found
        except OSError:
            pass
        found.close()
    raise AssertionError("the server has no such connection")


def test_socket_passed_by_systemd_is_served_and_its_file_left(one_loop: _engine.Engine, tmp_path: Path) -> None:
    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as passed:
            passed.bind(str(tmp_path / "passed.sock"))
            passed.listen()
            async with NbdServer(one_loop, [export(one_loop, "disk")]) as server:
                server.adopt(adopt_socket(os.dup(passed.fileno())))
                client = await Client.greeted(server)
                await client.go()
                assert await client.read(0, 512) == bytes(512)
                client.close()
            assert (tmp_path / "passed.sock").is_socket()

    run(main)


@needs_nbdinfo
def test_nbdinfo_lists_exports_through_the_printed_uris(one_loop: _engine.Engine, tmp_path: Path) -> None:
    async def main() -> None:
        odd = "a b/?#&%ü"
        exports = [export(one_loop, "disk", description="system"), export(one_loop, odd, read_only=True)]
        async with serving(one_loop, tmp_path, *exports) as server:
            await server.listen_tcp("localhost", 0)
            listed = json.loads(await tool("nbdinfo", "--list", "--json", server.uris("")[0]))
            assert [(one["export-name"], one.get("description")) for one in listed["exports"]] == [
                ("disk", "system"),
                (odd, None),
            ]
            for uri in server.uris(odd):
                told = json.loads(await tool("nbdinfo", "--json", uri))
                (one,) = told["exports"]
                assert (one["export-name"], one["export-size"], one["is_read_only"]) == (odd, SIZE, True)
                assert one["contexts"] == ["base:allocation"]
                assert (one["block_size_minimum"], one["block_size_preferred"], one["block_size_maximum"]) == (
                    1,
                    4096,
                    33554432,
                )

    run(main)


@needs_libnbd
@pytest.mark.parametrize("structured", [True, False])
def test_libnbd_reads_what_it_wrote(one_loop: _engine.Engine, tmp_path: Path, structured: bool) -> None:
    script = f"""
import nbd, sys
h = nbd.NBD()
h.set_request_structured_replies({structured})
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
assert h.get_structured_replies_negotiated() == {structured}
assert h.can_meta_context("base:allocation") == {structured}
assert h.can_df() == {structured}
assert h.can_flush() and h.can_fua() and h.can_trim() and h.can_zero() and h.can_fast_zero()
assert h.can_cache() and h.can_multi_conn() and not h.is_read_only()
h.pwrite(b"x" * 70000, 1000)
assert h.pread(70002, 999) == b"\\0" + b"x" * 70000 + b"\\0"
h.shutdown()
"""

    async def main() -> None:
        async with serving(one_loop, tmp_path) as server:
            await tool(SYSTEM_PYTHON, "-c", script, server.uris()[0])
            await server.wait_for_last_client()

    run(main)


# exports


def test_exports_come_and_go_for_clients_that_connect_later(one_loop: _engine.Engine, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(one_loop, tmp_path, export(one_loop, "a")) as server:
            before = await Client.greeted(server)
            server.add_export(export(one_loop, "b"))
            server.remove_export("a")
            after = await Client.greeted(server)
            await before.go("a")
            assert await before.read(0, 1) == b"\0"
            assert (await after.ask(Option.GO, go_data("a")))[0] == Reply.ERR_UNKNOWN
            await after.go("")
            with pytest.raises(UsageError, match="two exports"):
                server.add_export(export(one_loop, "b"))
            with pytest.raises(UsageError, match="there is no export 'a'"):
                server.remove_export("a")
            before.close()
            after.close()

    run(main)
