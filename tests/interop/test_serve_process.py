"""`blkloom serve` as a process: passed sockets, signals, exits, and output."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

pytestmark = pytest.mark.timeout(60)

MiB = 1 << 20

Program = Callable[[str, str], str]
Serve = Callable[..., Any]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 4 * 1024)
    return path


@pytest.fixture
def size_of(program: Program) -> Callable[[str], int]:
    """The size of what a URI leads to, as nbdinfo says."""
    nbdinfo = program("nbdinfo", "libnbd-bin")
    return lambda uri: int(run(nbdinfo, "--size", uri))


# Listening


def test_uri_is_printed_when_clients_can_connect(serve: Serve, image: Path, size_of: Callable[[str], int]) -> None:
    assert size_of(serve(image).uri) == MiB


def test_socket_of_its_own_is_private_and_gone_in_the_end(serve: Serve, image: Path) -> None:
    server = serve(image)
    path = Path(parse_qs(urlsplit(server.uri).query)["socket"][0])
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    server.stop()
    assert not path.parent.exists()


def test_port_zero_is_a_free_port_that_is_told(serve: Serve, image: Path, size_of: Callable[[str], int]) -> None:
    server = serve(image, "--listen", "127.0.0.1:0")
    assert re.fullmatch(r"nbd://127\.0\.0\.1:[1-9][0-9]+/", server.uri)
    assert size_of(server.uri) == MiB


@pytest.mark.parametrize("address", ["0", ":0"])
def test_a_port_alone_is_one_of_localhost(serve: Serve, image: Path, address: str) -> None:
    server = serve(image, "--listen", address)
    assert {urlsplit(uri).hostname for uri in server.uris} <= {"127.0.0.1", "::1"}


def test_all_addresses_are_listened_on_when_that_is_confirmed(
    serve: Serve, image: Path, size_of: Callable[[str], int]
) -> None:
    server = serve(image, "--listen", "0.0.0.0:0", "--allow-remote")
    assert urlsplit(server.uri).hostname not in ("localhost", "127.0.0.1", "0.0.0.0")
    assert size_of(server.uri) == MiB


def test_export_has_the_name_it_was_given(serve: Serve, image: Path, size_of: Callable[[str], int]) -> None:
    server = serve(image, "--export", "my disk", "--listen", "127.0.0.1:0")
    assert server.uri.endswith("/my%20disk")
    assert size_of(server.uri) == MiB


def test_files_are_exports_named_after_them(serve: Serve, image: Path, size_of: Callable[[str], int]) -> None:
    other = image.with_name("other.img")
    other.write_bytes(bytes(MiB // 2))
    server = serve(image, other, exports=2)
    assert [urlsplit(uri).path for uri in server.uris] == ["/disk.img", "/other.img"]
    assert [size_of(uri) for uri in server.uris] == [MiB, MiB // 2]


def test_device_stands_on_another_and_both_are_exports(serve: Serve, image: Path, program: Program) -> None:
    upper = "0 1024 linear blkloom:lower 1024\n1024 512 zero"
    server = serve("--device", f"lower=0 2048 loop {image}", "--device", f"upper={upper}", exports=2)
    qemu_io = program("qemu-io", "qemu-utils")
    lower_uri, upper_uri = server.uris
    run(qemu_io, "-f", "raw", "-c", "write -P 0x77 0 64k", upper_uri)
    run(qemu_io, "-f", "raw", "-c", "read -P 0x77 512k 64k", lower_uri)
    run(qemu_io, "-f", "raw", "-c", "read -P 0 512k 256k", upper_uri)
    server.stop()
    assert image.read_bytes()[MiB // 2 : MiB // 2 + 65536] == b"\x77" * 65536


def test_table_is_read_from_standard_input_and_from_a_file(
    blkloom: str, image: Path, tmp_path: Path, serve: Serve, size_of: Callable[[str], int]
) -> None:
    text = f"# a comment\n0 100 loop {image}\n\n100 28 zero\n"
    (tmp_path / "table").write_text(text)
    assert size_of(serve("--table-file", tmp_path / "table", "--read-only").uri) == 65536
    with started([blkloom, "serve", "--table", "-", "--once", "--read-only"], stdin=text) as process:
        assert process.stdout is not None
        assert size_of(process.stdout.readline().strip()) == 65536
        assert process.wait(30) == 0


@contextmanager
def started(command: list[str], *, stdin: str = "", **options: Any) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes, **options) as process:
        assert process.stdin is not None
        process.stdin.write(stdin)
        process.stdin.close()
        process.stdin = None
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


LAUNCHER = """
import os, socket, sys
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
if listening.fileno() != 3:
    os.dup2(listening.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_socket_passed_as_systemd_does_is_served_and_left(
    blkloom: str, image: Path, tmp_path: Path, size_of: Callable[[str], int]
) -> None:
    path, notices = tmp_path / "passed.sock", tmp_path / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(notices))
        manager.settimeout(30)
        command = [sys.executable, "-c", LAUNCHER, str(path), blkloom, "serve", str(image)]
        with started(command, env={**os.environ, "NOTIFY_SOCKET": str(notices)}) as process:
            assert b"READY=1" in manager.recv(4096)
            assert size_of(f"nbd+unix:///?socket={path}") == MiB
            process.send_signal(signal.SIGTERM)
            assert b"STOPPING=1" in manager.recv(4096)
            assert process.wait(30) == 0
    assert path.is_socket()


def test_systemd_socket_activate_starts_it_for_the_first_client(
    program: Program, blkloom: str, image: Path, tmp_path: Path, size_of: Callable[[str], int]
) -> None:
    path = tmp_path / "activated.sock"
    activate = program("systemd-socket-activate", "systemd")
    command = [activate, f"--listen={path}", blkloom, "serve", str(image), "--once"]
    with started(command) as process:
        assert process.stderr is not None
        assert "Listening" in process.stderr.readline()
        assert size_of(f"nbd+unix:///?socket={path}") == MiB
        assert process.wait(30) == 0


# The end


def test_once_ends_when_the_last_client_has_left(blkloom: str, image: Path, size_of: Callable[[str], int]) -> None:
    with started([blkloom, "serve", str(image), "--once"]) as process:
        assert process.stdout is not None
        assert size_of(process.stdout.readline().strip()) == MiB
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_cleanly_with_a_client_connected(blkloom: str, tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "nbd.sock"
    with started([blkloom, "serve", "--ram", "1M", "--socket", str(path)]) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(path))
            assert client.recv(18, socket.MSG_WAITALL).startswith(b"NBDMAGIC")
            client.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\6\0\0\0\0\0\0")
            assert client.recv(52, socket.MSG_WAITALL)
            process.send_signal(number)
            assert client.recv(1) == b""
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert not path.exists()


def test_writes_answered_before_the_signal_are_in_the_file(serve: Serve, image: Path, program: Program) -> None:
    server = serve(image)
    run(program("qemu-io", "qemu-utils"), "-f", "raw", "-c", "write -P 0x11 0 1M", server.uri)
    server.stop()
    assert image.read_bytes() == b"\x11" * MiB


# What it tells


def test_stats_as_json_count_what_a_client_did(serve: Serve, program: Program) -> None:
    server = serve("--ram", "1M", "--stats=json", "--export", "disk")
    commands = ["write 0 64k", "write 64k 64k", "read 0 64k", "flush", "discard 0 64k"]
    words = [word for command in commands for word in ("-c", command)]
    run(program("qemu-io", "qemu-utils"), "-f", "raw", *words, server.uri)
    told = json.loads(server.stop())["disk"]["operations"]
    assert (told["write"]["count"], told["write"]["bytes"], told["write"]["errors"]) == (2, 131072, 0)
    assert (told["discard"]["count"], told["discard"]["bytes"]) == (1, 65536)
    assert told["read"]["bytes"] >= 65536
    assert told["flush"]["count"] >= 1


def test_stats_for_people_go_to_standard_error(serve: Serve, program: Program) -> None:
    server = serve("--ram", "1M", "--stats")
    run(program("qemu-io", "qemu-utils"), "-f", "raw", "-c", "write 0 64k", server.uri)
    assert server.stop() == ""
    assert re.search(r"^write +1 +64 KiB +0 ", server.log.read_text(), re.MULTILINE)


def test_an_image_is_served_as_what_it_is_said_to_be(serve: Serve, program: Program, tmp_path: Path) -> None:
    qemu_img = program("qemu-img", "qemu-utils")
    image, raw = tmp_path / "disk.qcow2", tmp_path / "other" / "base"
    raw.parent.mkdir()
    raw.write_bytes(b"r" * MiB)
    subprocess.run([qemu_img, "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", image], check=True)
    for arguments, size in (
        (["--format", "raw", image], -(-image.stat().st_size // 512) * 512),
        (["--format", "qcow2", "--allow-backing", raw.parent, image], MiB),
        ([image], MiB),
    ):
        server = serve(*arguments)
        said = subprocess.run([qemu_img, "info", "-f", "raw", server.uri], capture_output=True, text=True, check=True)
        assert f"({size} bytes)" in said.stdout
        server.stop()
