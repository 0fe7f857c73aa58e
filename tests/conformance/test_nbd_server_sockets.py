"""Sockets of the NBD server: files and ports, URIs, socket activation, notifications. No engine."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from blkloom.errors import ListenError, UsageError
from blkloom.export.nbd.listening import adopt, listen_tcp, listen_unix
from blkloom.export.nbd.uri import reachable_host, tcp_uri, unix_uri
from blkloom.export.systemd import PassedDescriptor, ServiceNotifier, adopt_socket, passed_descriptors
from left_behind import no_descriptor_left

# Unix sockets


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_socket_file_is_for_this_user_only_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        listener = listen_unix(tmp_path / "nbd.sock")
    assert stat.S_IMODE((tmp_path / "nbd.sock").stat().st_mode) == 0o600
    assert not listener.socket.getblocking()
    assert not listener.socket.get_inheritable()
    listener.close()


def test_socket_file_is_removed_on_close(tmp_path: Path) -> None:
    listener = listen_unix(tmp_path / "nbd.sock")
    listener.close()
    listener.close()
    assert not list(tmp_path.iterdir())


def test_socket_file_that_is_no_longer_ours_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    ours = listen_unix(path)
    path.unlink()
    theirs = listen_unix(path)
    ours.close()
    assert path.is_socket()
    theirs.close()


def test_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    listener = listen_unix(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["nbd.sock"]
    listener.close()


@pytest.mark.parametrize("backlog_full", [False, True])
def test_socket_with_a_listener_is_not_replaced(tmp_path: Path, backlog_full: bool) -> None:
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as alive, socket.socket(socket.AF_UNIX) as waiting:
        alive.bind(str(path))
        alive.listen(0)
        if backlog_full:
            waiting.connect(str(path))
        with pytest.raises(ListenError, match="another server listens there") as caught:
            listen_unix(path)
        assert caught.value.errno == errno.EADDRINUSE
        assert path.is_socket()


def test_file_that_is_no_socket_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(ListenError, match="is not a socket"):
        listen_unix(tmp_path / "precious")
    assert (tmp_path / "precious").read_text() == "data"


def test_path_too_long_for_a_socket_says_so(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="at most 107 bytes"):
        listen_unix(tmp_path / ("x" * 120))


def test_missing_directory_says_which_path(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match=r"nowhere/nbd\.sock: cannot listen: No such file"):
        listen_unix(tmp_path / "nowhere" / "nbd.sock")


def test_failing_to_listen_leaks_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("file", "nowhere/nbd.sock", "x" * 120):
        with no_descriptor_left(), pytest.raises(ListenError):
            listen_unix(tmp_path / path)


# TCP


def test_free_port_is_the_same_on_every_address() -> None:
    listeners = asyncio.run(listen_tcp("localhost", 0))
    ports = {listener.socket.getsockname()[1] for listener in listeners}
    assert len(ports) == 1
    assert 0 not in ports
    for listener in listeners:
        assert urlsplit(listener.uri("a b")).port in ports
        listener.close()


def test_port_in_use_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            asyncio.run(listen_tcp("127.0.0.1", port))


def test_foreign_address_says_so() -> None:
    with pytest.raises(ListenError, match=r"192\.0\.2\.1"):
        asyncio.run(listen_tcp("192.0.2.1", 0, allow_remote=True))


@pytest.mark.parametrize("host", ["a..b", "a" * 64, "no\0name"])
def test_what_cannot_be_a_name_of_a_host_is_refused(host: str) -> None:
    with pytest.raises(ListenError, match="is no address of this machine"):
        asyncio.run(listen_tcp(host, 0))


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "192.0.2.1", "::ffff:192.0.2.1"])
def test_addresses_that_other_hosts_reach_are_refused_until_allowed(host: str) -> None:
    with pytest.raises(
        UsageError,
        match=r"other hosts can reach .*; .*say --tls=require with --tls-verify-peer or --tls-psk, or confirm it",
    ):
        asyncio.run(listen_tcp(host, 0))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost"])
def test_loopback_needs_no_confirmation(host: str) -> None:
    for listener in asyncio.run(listen_tcp(host, 0)):
        listener.close()


def test_listening_on_all_addresses_has_a_uri_that_other_hosts_can_use() -> None:
    for listener in asyncio.run(listen_tcp("0.0.0.0", 0, allow_remote=True)):
        host = urlsplit(listener.uri("disk")).hostname
        assert host not in (None, "localhost", "127.0.0.1", "0.0.0.0")
        listener.close()


@pytest.mark.parametrize("host", ["example.com", "192.0.2.1", "::1", "localhost"])
def test_an_address_in_a_uri_is_the_one_that_was_named(host: str) -> None:
    assert reachable_host(host) == host


# URIs


@pytest.mark.parametrize(
    ("host", "port", "name", "uri"),
    [
        ("example.com", 10809, "", "nbd://example.com/"),
        ("example.com", 10810, "disk", "nbd://example.com:10810/disk"),
        ("192.0.2.1", 1, "hello world", "nbd://192.0.2.1:1/hello%20world"),
        ("::1", 10809, "/disk", "nbd://[::1]/%2Fdisk"),
        ("fe80::1%eth0", 2, "", "nbd://[fe80::1%25eth0]:2/"),
        ("localhost", 3, "ü?#&", "nbd://localhost:3/%C3%BC%3F%23%26"),
    ],
)
def test_tcp_uri(host: str, port: int, name: str, uri: str) -> None:
    assert tcp_uri(host, port, name) == uri


@pytest.mark.parametrize("path", ["/run/a b/nbd.sock", "/run/ü?&=#%/s", "/run/\udcff"])
@pytest.mark.parametrize("name", ["", "disk", "/disk", "a b/?#&%ü"])
def test_unix_uri_leads_back_to_path_and_name(path: str, name: str) -> None:
    parts = urlsplit(unix_uri(path, name))
    assert (parts.scheme, parts.netloc, parts.fragment) == ("nbd+unix", "", "")
    assert unquote(parts.path.removeprefix("/")) == name
    assert parse_qs(parts.query, errors="surrogateescape") == {"socket": [path]}


def test_unix_uri_of_a_relative_path_is_absolute() -> None:
    assert unix_uri("nbd.sock") == unix_uri(f"{os.getcwd()}/nbd.sock")


# socket activation


@pytest.mark.parametrize(
    "environment",
    [{}, {"LISTEN_FDS": "1"}, {"LISTEN_PID": "7"}, {"LISTEN_FDS": "1", "LISTEN_PID": "8"}],
)
def test_no_descriptors_without_variables_or_for_another_process(environment: dict[str, str]) -> None:
    assert passed_descriptors(environment, pid=7) == []


def test_descriptors_begin_at_three_and_have_their_names() -> None:
    environment = {"LISTEN_FDS": "2", "LISTEN_PID": "7"}
    assert passed_descriptors(environment, pid=7) == [PassedDescriptor(3, ""), PassedDescriptor(4, "")]
    environment["LISTEN_FDNAMES"] = "nbd:admin"
    assert passed_descriptors(environment, pid=7) == [PassedDescriptor(3, "nbd"), PassedDescriptor(4, "admin")]


@pytest.mark.parametrize(
    "change", [{"LISTEN_FDS": "two"}, {"LISTEN_FDS": "-1"}, {"LISTEN_PID": "me"}, {"LISTEN_FDNAMES": "a:b:c"}]
)
def test_malformed_activation_names_the_variable(change: dict[str, str]) -> None:
    with pytest.raises(ListenError, match=next(iter(change))):
        passed_descriptors({"LISTEN_FDS": "2", "LISTEN_PID": "7"} | change, pid=7)


def test_adopted_socket_is_not_inherited_and_its_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        theirs.listen()
        passed = os.dup(theirs.fileno())
        os.set_inheritable(passed, True)
        listener = adopt(adopt_socket(passed))
        assert not listener.socket.get_inheritable()
        assert not listener.socket.getblocking()
        assert listener.uri("a") == unix_uri(path, "a")
        listener.close()
        assert path.is_socket()


def test_descriptor_that_does_not_listen_is_refused_and_stays_open() -> None:
    with socket.socket(socket.AF_UNIX) as idle:
        with pytest.raises(ListenError, match="no listening stream socket"):
            adopt_socket(idle.fileno())
        assert idle.getsockname() == ""
    end, other = os.pipe()
    with pytest.raises(ListenError, match="no socket"):
        adopt_socket(end)
    os.close(end)
    os.close(other)


# notifications


@pytest.mark.parametrize("abstract", [False, True])
def test_service_manager_is_told(tmp_path: Path, abstract: bool) -> None:
    name = f"@blkloom-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        notifier = ServiceNotifier({"NOTIFY_SOCKET": name})
        notifier.ready("two\nexports")
        notifier.status("busy")
        notifier.stopping()
        assert [manager.recv(100) for _ in range(3)] == [b"READY=1\nSTATUS=two exports", b"STATUS=busy", b"STOPPING=1"]


def test_without_a_service_manager_nothing_happens() -> None:
    ServiceNotifier({}).ready("exports")


def test_service_manager_that_is_gone_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ServiceNotifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()
    assert "systemd was not told READY=1" in caplog.text
