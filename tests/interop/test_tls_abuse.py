"""TLS of `blkloom serve` against clients that break its rules, cut it short, or flood it."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blkloom.export.nbd.codes import Option, Reply
from certificates import Authority, pre_shared_keys
from tls_client import DISCONNECT, READ, WRITE, closed, context, encrypted, exactly, go, option, plain, reply, request

pytestmark = pytest.mark.timeout(120)

Program = Callable[[str, str], str]
Serve = Callable[..., Any]


@pytest.fixture
def start(serve: Serve, server_files: Path) -> Callable[..., Any]:
    def started(*words: str) -> Any:
        listen = ["--listen", "127.0.0.1:0", "--tls=require", f"--tls-certificates={server_files}"]
        return serve("--ram", "1M", *listen, *words)

    return started


def port(server: Any) -> int:
    return int(server.uri.rpartition(":")[2].rstrip("/"))


def serves(server: Any) -> bool:
    """Whether the server serves another client."""
    with encrypted(port(server)) as stream:
        go(stream)
        stream.sendall(request(READ, 0, 512))
        return exactly(stream, 16 + 512)[16:] == bytes(512)


# Plain text


@pytest.mark.parametrize("injected", [option(Option.LIST), option(Option.GO, bytes(6)), b"\x16\x03\x01"])
def test_plain_text_after_starttls_is_never_answered(start: Callable[..., Any], injected: bytes) -> None:
    server = start()
    with plain(port(server)) as stream:
        stream.sendall(option(Option.STARTTLS) + injected)
        assert closed(stream)
    assert serves(server)


def test_plain_text_instead_of_a_handshake_ends_the_connection(start: Callable[..., Any]) -> None:
    server = start()
    with plain(port(server)) as stream:
        stream.sendall(option(Option.STARTTLS))
        assert reply(stream)[1] == Reply.ACK
        stream.sendall(option(Option.LIST) + option(Option.GO, bytes(6)))
        assert closed(stream)
    server.stop()
    assert "the TLS handshake failed" in server.log.read_text()


def test_an_option_within_the_first_record_is_not_lost(start: Callable[..., Any]) -> None:
    with encrypted(port(start())) as stream:
        stream.sendall(option(Option.LIST) + option(Option.GO, bytes(6)) + request(READ, 0, 512) + request(DISCONNECT))
        assert [reply(stream)[1] for _ in range(4)] == [Reply.SERVER, Reply.ACK, Reply.INFO, Reply.ACK]
        assert exactly(stream, 16 + 512)[16:] == bytes(512)


def test_no_downgrade_after_tls_has_begun(start: Callable[..., Any]) -> None:
    server = start()
    with encrypted(port(server)) as stream:
        go(stream)
        raw = socket.socket(fileno=stream.detach())
        raw.sendall(request(READ, 0, 512))
        raw.settimeout(60)
        assert closed(raw)
        raw.close()
    assert serves(server)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_versions_before_1_2_are_refused(start: Callable[..., Any], version: ssl.TLSVersion) -> None:
    server = start()
    old = context()
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version = old.maximum_version = version
    with pytest.raises((ssl.SSLError, ConnectionResetError)), encrypted(port(server), old):
        pass
    assert serves(server)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_versions_are_served_with_forward_secrecy(start: Callable[..., Any], version: ssl.TLSVersion) -> None:
    using = context()
    using.minimum_version = using.maximum_version = version
    with encrypted(port(start()), using) as stream:
        agreed = stream.cipher()
        assert agreed is not None
        assert agreed[0].startswith(("TLS_", "ECDHE-", "DHE-"))
        go(stream)
    weak = context()
    weak.maximum_version = ssl.TLSVersion.TLSv1_2
    weak.set_ciphers("AES128-SHA:AES256-SHA:ECDHE+AES:!AESGCM:!AESCCM")
    with pytest.raises((ssl.SSLError, ConnectionResetError)), encrypted(port(start()), weak):
        pass


def test_sessions_are_not_resumed(start: Callable[..., Any]) -> None:
    using = context()
    using.maximum_version = ssl.TLSVersion.TLSv1_2
    with encrypted(port(start()), using) as stream:
        go(stream)
        session = stream.session
    assert session is None or not session.has_ticket


# Certificates that a client sends although the server did not ask for that authority


def test_certificates_of_another_authority_do_not_verify(
    start: Callable[..., Any], authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger").issue("client", "/CN=laptop", role="client")
    server = start("--tls-verify-peer")
    with pytest.raises((ssl.SSLError, ConnectionResetError)), encrypted(port(server), context(stranger)) as stream:
        go(stream)
    good = authority.issue("good", "/CN=laptop", role="client")
    with encrypted(port(server), context(good)) as stream:
        go(stream)
    server.stop()
    assert "certificate verify failed: unable to get local issuer certificate" in server.log.read_text()


# Ends


def test_a_disconnect_request_ends_the_tls_session_and_then_the_connection(start: Callable[..., Any]) -> None:
    with encrypted(port(start())) as stream:
        go(stream)
        stream.sendall(request(DISCONNECT))
        assert stream.recv(1) == b""  # a closing message: without one, ssl.SSLEOFError


def test_abort_ends_the_tls_session_after_its_reply(start: Callable[..., Any]) -> None:
    with encrypted(port(start())) as stream:
        stream.sendall(option(Option.ABORT))
        assert reply(stream)[1] == Reply.ACK
        assert stream.recv(1) == b""


def test_a_stopping_server_ends_its_tls_sessions(start: Callable[..., Any]) -> None:
    server = start()
    with encrypted(port(server)) as stream:
        go(stream)
        server.stop()
        assert stream.recv(1) == b""


def test_an_end_without_a_closing_message_is_no_data(start: Callable[..., Any], tmp_path: Path) -> None:
    """The first 256 bytes of a write have arrived in whole records, the rest only as part of one."""
    server = start()
    with encrypted(port(server)) as stream:
        go(stream)
        stream.sendall(request(WRITE, 0, 4096) + b"\xff" * 256)
        raw = socket.socket(fileno=stream.detach())
        raw.sendall(b"\x17\x03\x03\x10\x11" + b"\xff" * 1000)
        raw.shutdown(socket.SHUT_WR)
        raw.settimeout(60)
        assert closed(raw)
        raw.close()
    assert serves(server)  # the device has zeros still


def test_a_changed_record_ends_the_connection(start: Callable[..., Any]) -> None:
    server = start()
    with encrypted(port(server)) as stream:
        go(stream)
        raw = socket.socket(fileno=stream.detach())
        raw.sendall(b"\x17\x03\x03\x00\x40" + bytes(64))
        raw.settimeout(60)
        assert closed(raw)
        raw.close()
    assert serves(server)


# Floods and slow clients


@pytest.mark.parametrize("sent", [b"", b"\x16", b"\x16\x03\x01\x40\x00" + bytes(100)])
def test_truncated_handshakes_end_their_connection_only(start: Callable[..., Any], sent: bytes) -> None:
    server = start()
    with plain(port(server)) as stream:
        stream.sendall(option(Option.STARTTLS))
        assert reply(stream)[1] == Reply.ACK
        stream.sendall(sent)
        stream.shutdown(socket.SHUT_WR)
        assert closed(stream)
    assert serves(server)


def test_handshakes_that_do_not_go_on_are_dropped(start: Callable[..., Any]) -> None:
    server = start()
    with plain(port(server)) as stream:
        stream.sendall(option(Option.STARTTLS))
        assert reply(stream)[1] == Reply.ACK
        assert serves(server)
        assert closed(stream)  # after 10 seconds
    server.stop()
    assert "the handshake took more than 10 s" in server.log.read_text()


def test_negotiating_clients_are_limited(start: Callable[..., Any]) -> None:
    server = start("--max-connections=2")
    with plain(port(server)) as one, plain(port(server)) as two:
        for stream in (one, two):
            stream.sendall(option(Option.STARTTLS))
            assert reply(stream)[1] == Reply.ACK
        with plain(port(server)) as third:
            third.sendall(option(Option.STARTTLS))
            number, kind, text = reply(third)
            assert (number, kind) == (Option.STARTTLS, Reply.ERR_POLICY)
            assert b"2 connections" in text


def test_many_failing_handshakes_make_few_lines_in_the_log(start: Callable[..., Any]) -> None:
    server = start()
    for _ in range(30):
        with plain(port(server)) as stream:
            stream.sendall(option(Option.STARTTLS))
            assert reply(stream)[1] == Reply.ACK
            stream.sendall(b"garbage!" * 8)
            assert closed(stream)
    assert serves(server)
    server.stop()
    said = server.log.read_text()
    assert said.count("the TLS handshake failed") == 10
    assert "20 more messages" in said


# Reading credentials again


def test_sighup_reads_the_credentials_again(program: Program, serve: Serve, tmp_path: Path) -> None:
    keys = pre_shared_keys(tmp_path / "keys.psk", "alice")
    server = serve("--ram", "1M", "--listen", "127.0.0.1:0", "--tls=require", f"--tls-psk={keys}")
    nbdinfo = program("nbdinfo", "libnbd-bin")

    def answers(user: str) -> bool:
        uri = f"nbds://{user}@127.0.0.1:{port(server)}/?tls-psk-file={keys}"
        return subprocess.run([nbdinfo, uri], capture_output=True, check=False, timeout=60).returncode == 0

    assert answers("alice")
    pre_shared_keys(keys, "bob")
    assert not answers("bob")
    server.process.send_signal(signal.SIGHUP)
    assert answers("bob")
    assert not answers("alice")
    kept = shutil.copy(keys, tmp_path / "kept.psk")
    keys.write_text("broken")
    server.process.send_signal(signal.SIGHUP)
    with plain(port(server)):
        pass  # it lives, and has handled the signal before it accepted
    shutil.copy(kept, keys)
    assert answers("bob")
