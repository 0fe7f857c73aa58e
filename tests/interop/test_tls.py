"""TLS and access rules of `blkloom serve` against the real clients: libnbd, QEMU and nbdkit's nbd plugin."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certificates import Authority, pre_shared_keys

pytestmark = pytest.mark.timeout(120)

MiB = 1 << 20
Program = Callable[[str, str], str]
Serve = Callable[..., Any]
LOOPBACK = ("--listen", "localhost:0")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(8 * MiB))
    return path


def attempt(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=60)


def run(*command: str | Path) -> str:
    done = attempt(*command)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}"
    return done.stdout


def port_of(uri: str) -> str:
    return uri.rpartition(":")[2].rstrip("/")


def with_files(uri: str, files: Path) -> str:
    """A URI of libnbd with the certificates of a client."""
    return f"nbds://localhost:{port_of(uri)}/?tls-certificates={files}"


def with_key(uri: str, user: str, keys: Path) -> str:
    return f"nbds://{user}@localhost:{port_of(uri)}/?tls-psk-file={keys}"


def verifying(server_files: Path) -> list[str]:
    return [*LOOPBACK, "--tls=require", f"--tls-certificates={server_files}", "--tls-verify-peer"]


def x509(uri: str, files: Path, *further: str) -> list[str]:
    """Options of QEMU's programs."""
    credentials = ",".join([f"tls-creds-x509,id=t,dir={files},endpoint=client,verify-peer=yes", *further])
    return ["--object", credentials, "--image-opts", f"driver=nbd,host=localhost,port={port_of(uri)},tls-creds=t"]


def psk(uri: str, directory: Path, user: str, *further: str) -> list[str]:
    credentials = ",".join([f"tls-creds-psk,id=t,dir={directory},username={user},endpoint=client", *further])
    return ["--object", credentials, "--image-opts", f"driver=nbd,host=localhost,port={port_of(uri)},tls-creds=t"]


VERSIONS = {"1.2": "priority=NORMAL:-VERS-ALL:+VERS-TLS1.2", "1.3": "priority=NORMAL:-VERS-ALL:+VERS-TLS1.3"}


# Certificates


def test_the_uri_says_tls_where_clients_must_use_it(serve: Serve, image: Path, server_files: Path) -> None:
    assert serve("--ram", "1M", *verifying(server_files)).uri.startswith("nbds://")
    allowed = serve(image, *LOOPBACK, "--tls=on", f"--tls-certificates={server_files}", "--read-only")
    assert allowed.uri.startswith("nbd://")


def test_libnbd_copies_both_ways_with_certificates(
    program: Program, serve: Serve, image: Path, server_files: Path, client_files: Path, tmp_path: Path
) -> None:
    server = serve("--ram", "8M", *verifying(server_files))
    uri = with_files(server.uri, client_files)
    nbdcopy = program("nbdcopy", "libnbd-bin")
    run(nbdcopy, image, uri)
    run(nbdcopy, "--connections=4", uri, tmp_path / "copy.img")
    assert (tmp_path / "copy.img").read_bytes() == image.read_bytes()
    (told,) = json.loads(run(program("nbdinfo", "libnbd-bin"), "--json", uri))["exports"]
    assert told["export-size"] == 8 * MiB


@pytest.mark.parametrize("version", VERSIONS)
def test_qemu_reads_and_writes_with_certificates(
    program: Program,
    serve: Serve,
    image: Path,
    server_files: Path,
    client_files: Path,
    tmp_path: Path,
    version: str,
) -> None:
    server = serve(image, *verifying(server_files))
    options = x509(server.uri, client_files, VERSIONS[version])
    copied = tmp_path / "copy.img"
    run(program("qemu-img", "qemu-utils"), "convert", *options, "-O", "raw", copied)
    assert copied.read_bytes() == image.read_bytes()
    commands = ["-c", "write -P 0x5a 1M 256k", "-c", "flush", "-c", "read -P 0x5a 1M 256k"]
    run(program("qemu-io", "qemu-utils"), *options, *commands)
    assert image.read_bytes()[MiB : MiB + 262144] == bytes([0x5A]) * 262144


def test_nbdkit_reads_with_certificates(
    program: Program, serve: Serve, image: Path, server_files: Path, client_files: Path, tmp_path: Path
) -> None:
    server = serve(image, *verifying(server_files))
    nbdkit, copied = program("nbdkit", "nbdkit"), tmp_path / "copy.img"
    plugin = ["nbd", "hostname=localhost", f"port={port_of(server.uri)}", "tls=require"]
    run(nbdkit, "-U", "-", *plugin, f"tls-certificates={client_files}", "--run", f'nbdcopy "$uri" {copied}')
    assert copied.read_bytes() == image.read_bytes()


def test_certificates_are_not_asked_for_unless_they_are_verified(
    program: Program, serve: Serve, image: Path, server_files: Path, authority: Authority, tmp_path: Path
) -> None:
    server = serve(image, *LOOPBACK, "--tls=require", f"--tls-certificates={server_files}")
    trusting = tmp_path / "trusting"
    trusting.mkdir()
    shutil.copy(authority.directory / "ca-cert.pem", trusting)
    run(program("nbdinfo", "libnbd-bin"), with_files(server.uri, trusting))


def test_tls_over_a_unix_socket(program: Program, serve: Serve, image: Path, tmp_path: Path) -> None:
    keys = pre_shared_keys(tmp_path / "keys.psk", "alice")
    server = serve(image, "--socket", tmp_path / "nbd.sock", "--tls=require", f"--tls-psk={keys}")
    assert server.uri.startswith("nbds+unix:///")
    run(program("nbdinfo", "libnbd-bin"), f"nbds+unix://alice@/?socket={tmp_path}/nbd.sock&tls-psk-file={keys}")


def test_clients_without_a_good_certificate_are_refused_and_the_log_says_why(
    program: Program, serve: Serve, image: Path, server_files: Path, authority: Authority, tmp_path: Path
) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    shutil.copy(authority.directory / "ca-cert.pem", nothing)
    other = Authority(tmp_path, "other").issue("stranger", "/CN=laptop", role="client")
    shutil.copy(authority.directory / "ca-cert.pem", other)  # it trusts the server
    expired = authority.issue("expired", "/CN=expired", days=-1, role="client")
    server = serve(image, *verifying(server_files))
    for files in (nothing, other, expired):
        refused = attempt(program("nbdinfo", "libnbd-bin"), with_files(server.uri, files))
        assert refused.returncode != 0
    server.stop()
    said = server.log.read_text()
    assert said.count("peer did not return a certificate") == 2  # GnuTLS sends none of another authority
    assert "certificate has expired" in said


def test_a_server_certificate_is_for_servers_only(
    program: Program, serve: Serve, image: Path, server_files: Path, authority: Authority
) -> None:
    made = authority.issue("wrong-purpose", "/CN=laptop")
    for kind in ("cert", "key"):
        (made / f"server-{kind}.pem").rename(made / f"client-{kind}.pem")
    server = serve(image, *verifying(server_files))
    assert attempt(program("nbdinfo", "libnbd-bin"), with_files(server.uri, made)).returncode != 0


def test_revoked_certificates_are_refused(
    program: Program, serve: Serve, image: Path, authority: Authority, client_files: Path, tmp_path: Path
) -> None:
    revoked = authority.issue("revoked", "/CN=revoked", role="client")
    server_files = authority.issue("with-list", "/CN=localhost")
    shutil.copy(authority.revoke("revoked"), server_files)
    server = serve(image, *verifying(server_files))
    nbdinfo = program("nbdinfo", "libnbd-bin")
    assert attempt(nbdinfo, with_files(server.uri, revoked)).returncode != 0
    run(nbdinfo, with_files(server.uri, client_files))
    server.stop()
    assert "certificate revoked" in server.log.read_text()


def test_a_revocation_list_that_cannot_be_read_is_an_error(blkloom: str, authority: Authority) -> None:
    server_files = authority.issue("without-list", "/CN=localhost")
    (server_files / "ca-crl.pem").symlink_to("nowhere")
    done = attempt(blkloom, "serve", "--ram", "1M", *verifying(server_files))
    assert done.returncode == 64
    assert f"{server_files}/ca-crl.pem: No such file" in done.stderr


def test_clients_refuse_a_server_of_another_authority(
    program: Program, serve: Serve, image: Path, client_files: Path, tmp_path: Path
) -> None:
    impostor = Authority(tmp_path, "impostor").issue("server", "/CN=localhost")
    server = serve(image, *LOOPBACK, "--tls=require", f"--tls-certificates={impostor}")
    assert attempt(program("nbdinfo", "libnbd-bin"), with_files(server.uri, client_files)).returncode != 0


# Pre-shared keys


@pytest.mark.parametrize("version", VERSIONS)
def test_qemu_reads_and_writes_with_a_key(
    program: Program, serve: Serve, image: Path, tmp_path: Path, version: str
) -> None:
    keys = pre_shared_keys(tmp_path / "keys.psk", "alice", "bob")
    server = serve(image, *LOOPBACK, "--tls=require", f"--tls-psk={keys}")
    priority = "" if version == "1.3" else VERSIONS["1.2"]
    options = psk(server.uri, tmp_path, "bob", *([priority] if priority else []))
    copied = tmp_path / "copy.img"
    run(program("qemu-img", "qemu-utils"), "convert", *options, "-O", "raw", copied)
    assert copied.read_bytes() == image.read_bytes()
    run(program("qemu-io", "qemu-utils"), *options, "-c", "write -P 0x5a 1M 256k", "-c", "read -P 0x5a 1M 256k")


def test_nbdkit_and_libnbd_read_with_a_key(program: Program, serve: Serve, image: Path, tmp_path: Path) -> None:
    keys, copied = pre_shared_keys(tmp_path / "keys.psk", "alice"), tmp_path / "copy.img"
    server = serve(image, *LOOPBACK, "--tls=require", f"--tls-psk={keys}")
    run(program("nbdcopy", "libnbd-bin"), with_key(server.uri, "alice", keys), copied)
    assert copied.read_bytes() == image.read_bytes()
    copied.unlink()
    plugin = ["nbd", "hostname=localhost", f"port={port_of(server.uri)}", "tls=require", "tls-username=alice"]
    run(program("nbdkit", "nbdkit"), "-U", "-", *plugin, f"tls-psk={keys}", "--run", f'nbdcopy "$uri" {copied}')
    assert copied.read_bytes() == image.read_bytes()


def test_unknown_users_and_wrong_keys_are_refused(program: Program, serve: Serve, image: Path, tmp_path: Path) -> None:
    keys = pre_shared_keys(tmp_path / "keys.psk", "alice")
    server = serve(image, *LOOPBACK, "--tls=require", f"--tls-psk={keys}")
    others = pre_shared_keys(tmp_path / "others.psk", "alice", "eve")
    for user in ("alice", "eve"):
        refused = attempt(program("nbdinfo", "libnbd-bin"), with_key(server.uri, user, others))
        assert refused.returncode != 0
    server.stop()
    assert server.log.read_text().count("the TLS handshake failed") == 2


# Modes


def test_clients_without_tls_are_told_that_it_is_required(
    program: Program, serve: Serve, image: Path, server_files: Path, client_files: Path
) -> None:
    server = serve(image, *verifying(server_files))
    plain = f"nbd://localhost:{port_of(server.uri)}/"
    assert attempt(program("nbdinfo", "libnbd-bin"), plain).returncode != 0
    refused = attempt(program("qemu-img", "qemu-utils"), "info", plain)
    assert "TLS" in refused.stderr


def test_allow_serves_clients_with_and_without_tls(
    program: Program, serve: Serve, image: Path, server_files: Path, client_files: Path
) -> None:
    server = serve(image, *LOOPBACK, "--tls=allow", f"--tls-certificates={server_files}", "--read-only")
    nbdinfo = program("nbdinfo", "libnbd-bin")
    assert "without TLS" in run(nbdinfo, f"nbd://localhost:{port_of(server.uri)}/")
    assert "with TLS" in run(nbdinfo, with_files(server.uri, client_files))


def test_remote_addresses_need_no_other_word_if_clients_must_prove_who_they_are(
    serve: Serve, blkloom: str, server_files: Path, tmp_path: Path
) -> None:
    remote = ["--ram", "1M", "--listen", "0.0.0.0:0"]
    keys, files = f"--tls-psk={pre_shared_keys(tmp_path / 'keys.psk', 'alice')}", f"--tls-certificates={server_files}"
    serve(*remote, "--tls=require", keys)
    serve(*remote, "--tls=require", files, "--tls-verify-peer")
    for words in (["--tls=allow", keys], ["--tls=require", files]):
        refused = attempt(blkloom, "serve", *remote, *words)
        assert refused.returncode == 64
        assert "say --tls=require with --tls-verify-peer or --tls-psk" in refused.stderr
    serve(*remote, "--tls=require", files, "--allow-remote")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tls=require"], "either certificates or pre-shared keys"),
        (["--tls-certificates=."], "say --tls=require or --tls=allow"),
        (["--tls=require", "--tls-certificates=.", "--tls-psk=keys"], "either certificates or pre-shared keys"),
        (["--tls=require", "--tls-psk=keys", "--tls-verify-peer"], "leave out --tls-verify-peer"),
        (["--tls=require", "--tls-certificates=/nowhere"], "/nowhere/server-cert.pem"),
        (["--tls=require", "--tls-psk=/nowhere"], "/nowhere: No such file"),
        (["--tls=require", "--tls-certificates=.", "--allow-certificate=me"], "--tls-verify-peer"),
        (["--allow-address=192.0.2.1/24"], "bits of hosts"),
        (["--allow-user=nobody-of-that-name"], "there is no user"),
        (["--read-only-for=color=red"], "'color=red' is no rule"),
    ],
)
def test_what_cannot_be_is_said_with_its_remedy(blkloom: str, words: list[str], said: str) -> None:
    refused = attempt(blkloom, "serve", "--ram", "1M", *words)
    assert refused.returncode != 0
    assert said in refused.stderr


def test_unusable_files_are_named_and_no_key_is_printed(
    blkloom: str, server_files: Path, authority: Authority, tmp_path: Path
) -> None:
    def refused(name: str, contents: bytes) -> str:
        files = tmp_path / "files"
        shutil.rmtree(files, ignore_errors=True)
        shutil.copytree(server_files, files)
        (files / name).write_bytes(contents)
        words = ["--tls=require", f"--tls-certificates={files}", "--tls-verify-peer"]
        done = attempt(blkloom, "serve", "--ram", "1M", *words)
        assert done.returncode == 64
        assert str(files / name) in done.stderr
        return done.stderr

    for name in ("server-cert.pem", "server-key.pem", "ca-cert.pem"):
        refused(name, b"")
    assert "not the key of server-cert.pem" in refused(
        "server-key.pem", (authority.directory / "ca-key.pem").read_bytes()
    )
    subprocess.run(
        [
            "openssl",
            "pkey",
            "-aes256",
            "-passout",
            "pass:x",
            "-in",
            server_files / "server-key.pem",
            "-out",
            tmp_path / "e",
        ],
        check=True,
        capture_output=True,
    )
    assert "without a password" in refused("server-key.pem", (tmp_path / "e").read_bytes())
    (tmp_path / "keys.psk").write_text("alice:secret-that-is-no-number\n")
    done = attempt(blkloom, "serve", "--ram", "1M", "--tls=require", f"--tls-psk={tmp_path}/keys.psk")
    assert "line 1: the key is not hexadecimal" in done.stderr
    assert "secret" not in done.stderr


# Access


def test_exports_are_for_the_certificates_that_are_allowed(
    program: Program, serve: Serve, image: Path, server_files: Path, client_files: Path, authority: Authority
) -> None:
    other = authority.issue("desk", "/O=Example/CN=desk", role="client")
    nbdinfo = program("nbdinfo", "libnbd-bin")
    for name in ("laptop", "CN=laptop,O=Example"):
        server = serve(image, *verifying(server_files), "--allow-certificate", name, "--shared")
        run(nbdinfo, with_files(server.uri, client_files))
        refused = attempt(nbdinfo, with_files(server.uri, other))
        assert refused.returncode != 0
        server.stop()
        assert "refused: this export is not for your certificate or key" in server.log.read_text()


def test_a_common_name_does_not_pass_for_a_distinguished_name(
    program: Program, serve: Serve, image: Path, server_files: Path, authority: Authority
) -> None:
    forged = authority.issue("forged", "/CN=CN=laptop,O=Example", role="client")
    server = serve(image, *verifying(server_files), "--allow-certificate", "CN=laptop,O=Example")
    assert attempt(program("nbdinfo", "libnbd-bin"), with_files(server.uri, forged)).returncode != 0


def test_exports_are_for_the_keys_that_are_allowed_and_for_some_read_only(
    program: Program, serve: Serve, image: Path, tmp_path: Path
) -> None:
    keys = pre_shared_keys(tmp_path / "keys.psk", "alice", "bob", "eve")
    words = ["--allow-certificate=alice", "--allow-certificate=bob", "--read-only-for=certificate=bob"]
    server = serve(image, *LOOPBACK, "--tls=require", f"--tls-psk={keys}", *words)
    nbdinfo = program("nbdinfo", "libnbd-bin")

    def read_only(user: str) -> bool:
        (told,) = json.loads(run(nbdinfo, "--json", with_key(server.uri, user, keys)))["exports"]
        return bool(told["is_read_only"])

    assert not read_only("alice")
    assert read_only("bob")
    assert attempt(nbdinfo, with_key(server.uri, "eve", keys)).returncode != 0
    qemu_io = program("qemu-io", "qemu-utils")
    assert attempt(qemu_io, *psk(server.uri, tmp_path, "bob"), "-c", "write 0 4k").returncode != 0


def test_addresses_that_are_not_allowed_are_closed_at_once(serve: Serve, image: Path) -> None:
    server = serve(image, *LOOPBACK, "--allow-address=192.0.2.0/24,2001:db8::/32")
    with socket.create_connection(("localhost", int(port_of(server.uri)))) as client:
        client.settimeout(30)
        assert client.recv(1) == b""
    assert "access refused: 127.0.0.1: this export is not for your address" in server.log.read_text()


def test_addresses_that_are_allowed_are_served(program: Program, serve: Serve, image: Path) -> None:
    server = serve(image, *LOOPBACK, "--allow-address=192.0.2.0/24", "--allow-address=127.0.0.0/8")
    run(program("nbdinfo", "libnbd-bin"), server.uri)


def test_users_of_a_socket_are_told_apart(program: Program, serve: Serve, image: Path, tmp_path: Path) -> None:
    nbdinfo, me = program("nbdinfo", "libnbd-bin"), os.getuid()
    run(nbdinfo, serve(image, "--shared", f"--allow-user={me}").uri)
    server = serve(image, "--shared", f"--allow-user={me + 1}")
    refused = attempt(nbdinfo, server.uri)
    assert refused.returncode != 0
    server.stop()
    assert "refused: this export is not for your user" in server.log.read_text()
    server = serve(image, "--shared", f"--read-only-for=user={me}")
    (told,) = json.loads(run(nbdinfo, "--json", server.uri))["exports"]
    assert told["is_read_only"]


def test_one_peer_has_only_so_many_connections(program: Program, serve: Serve, image: Path) -> None:
    server = serve(image, "--read-only", "--max-connections-per-peer=2")
    path = server.uri.rpartition("=")[2]
    held = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    for client in held:
        client.connect(path)
        assert client.recv(8) == b"NBDMAGIC"
    assert attempt(program("nbdinfo", "libnbd-bin"), server.uri).returncode != 0
    assert "2 connections, the most of one user" in server.log.read_text()
    for client in held:
        client.close()
