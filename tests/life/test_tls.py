"""TLS exports of a supervisor: deaths and upgrades of workers cut sessions only, and keys stay in their files."""

from __future__ import annotations

import os
import shutil
import signal
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blkloom.control.client import Client
from blkloom.errors import UsageError
from blkloom.export.nbd.codes import Option, Reply
from certificates import Authority, pre_shared_keys
from tls_client import READ, encrypted, exactly, go, plain, reply, request

from .conftest import Life, until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def server_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Authority(tmp_path_factory.mktemp("pki")).issue("server", "/CN=localhost")


def exported(client: Client, **tls: Any) -> int:
    """A new device `disk` with an export on TCP. Its port."""
    client.create("disk", table="0 2048 ram")
    return client.export("disk", host="127.0.0.1", options={"tls": {"mode": "require", **tls}}).port


def reads(port: int) -> bool:
    with encrypted(port) as stream:
        go(stream)
        stream.sendall(request(READ, 0, 512))
        return exactly(stream, 16 + 512)[16:] == bytes(512)


def test_an_upgrade_ends_tls_sessions_cleanly_and_clients_connect_again(client: Client, server_files: Path) -> None:
    port = exported(client, certificates=str(server_files))
    with encrypted(port) as stream:
        go(stream)
        (before,) = client.info("disk")
        client.upgrade()
        assert stream.recv(1) == b""  # a closing message, which ssl tells from an end without one
    (after,) = client.info("disk")
    assert after.worker != before.worker
    assert reads(port)


def test_clients_connect_again_after_the_death_of_the_worker(client: Client, server_files: Path) -> None:
    port = exported(client, certificates=str(server_files))
    with encrypted(port) as stream:
        go(stream)
        (before,) = client.info("disk")
        os.kill(before.worker, signal.SIGKILL)
        with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):  # no closing message
            stream.recv(1)
    assert reads(port)  # it waits for the next worker
    until(client, "disk", lambda found: found.worker not in (0, before.worker))


def test_the_device_goes_on_without_its_credentials_and_the_export_with_new_ones(
    client: Client, server_files: Path, tmp_path: Path
) -> None:
    files = tmp_path / "files"
    shutil.copytree(server_files, files)
    port = exported(client, certificates=str(files))
    shutil.rmtree(files)
    client.upgrade()
    client.read("disk", 0, 512)
    with plain(port) as stream:
        stream.sendall(b"IHAVEOPT" + bytes([0, 0, 0, Option.STARTTLS]) + bytes(4))
        assert reply(stream)[1] == Reply.ACK
        assert stream.recv(1) == b""
    with pytest.raises(UsageError, match=r"server-cert\.pem: No such file"):
        client.reload_tls("disk")
    shutil.copytree(server_files, files)
    client.reload_tls("disk")
    assert reads(port)


def test_an_export_whose_credentials_cannot_be_read_does_not_keep_others_from_new_ones(
    client: Client, server_files: Path, tmp_path: Path
) -> None:
    client.create("disk", table="0 2048 ram")
    folders = [tmp_path / name for name in ("one", "two")]
    ports = []
    for files in folders:
        shutil.copytree(server_files, files)
        options = {"tls": {"mode": "require", "certificates": str(files)}}
        ports.append(client.export("disk", host="127.0.0.1", options=options).port)
        shutil.rmtree(files)
    client.upgrade()  # the next worker has none
    shutil.copytree(server_files, folders[1])
    with pytest.raises(UsageError, match=f"{folders[0]}/server-cert.pem: No such file"):
        client.reload_tls("disk")
    assert reads(ports[1])


def test_an_export_whose_credentials_cannot_be_used_is_not_made(client: Client, tmp_path: Path) -> None:
    client.create("disk", table="0 2048 ram")
    for options, said in (
        ({"tls": {"mode": "require", "psk": str(tmp_path / "none")}}, "No such file"),
        ({"tls": {"mode": "require", "psk": "keys"}}, "must be absolute"),
        ({"tls": {"mode": "perhaps"}}, "Invalid enum value 'perhaps'"),
        ({"access": {"certificates": ["me"]}}, "no client proves"),
        ({"unknown": 1}, "unknown field"),
    ):
        with pytest.raises(UsageError, match=said):
            client.export("disk", host="127.0.0.1", options=options)
    assert len(client.info("disk")[0].exports) == 1
    client.unexport("disk", client.info("disk")[0].exports[0].id)
    with pytest.raises(UsageError, match="the automatic socket has neither TLS nor rules"):
        client.export("disk", options={"access": {"read_only_for": ["user=7"]}})
    with pytest.raises(UsageError, match="no export of device 'disk' has TLS"):
        client.reload_tls("disk")


def test_keys_are_in_no_state_file_no_process_list_and_no_message(
    blkloom: str, client: Client, life: Life, tmp_path: Path, program: Callable[[str, str], str]
) -> None:
    keys = pre_shared_keys(tmp_path / "keys.psk", "alice")
    secret = keys.read_text().strip().partition(":")[2]
    client.create("disk", table="0 2048 ram")
    environment = os.environ | {"BLKLOOM_RUN_DIR": str(life.run_dir)}
    words = ["--listen", "127.0.0.1:0", "--tls=require", f"--tls-psk={keys}", "--allow-certificate=alice"]

    def run(*words: str) -> str:
        done = subprocess.run([blkloom, *words], capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    uri = run("export", "disk", *words).strip()
    assert uri.startswith("nbds://127.0.0.1:")
    run("export", "disk", "--reload-tls")
    address = uri.removeprefix("nbds://").removesuffix("/disk")
    named = f"nbds://alice@{address}/disk?tls-psk-file={keys}"
    subprocess.run([program("nbdinfo", "libnbd-bin"), named], check=True, capture_output=True, timeout=60)
    seen = run("info", "disk") + run("export", "disk", "--list") + str(client.info("disk"))
    for process in life.processes():
        seen += Path(f"/proc/{process}/cmdline").read_text(errors="replace")
    for path in life.run_dir.rglob("*"):
        if path.is_file():
            seen += path.read_text(errors="replace")
    assert str(keys) in seen
    assert secret not in seen


def test_saved_exports_have_tls_and_rules_again(
    blkloom: str, client: Client, life: Life, server_files: Path, tmp_path: Path
) -> None:
    tls = {"mode": "require", "certificates": str(server_files), "verify_peer": True}
    rules = {"certificates": ["laptop", "CN=my desk,O=Example"], "addresses": ["127.0.0.0/8"], "users": [7]}
    client.create("disk", table="0 2048 zero")
    options = {"tls": tls, "access": rules, "per_host": 3}
    made = client.export("disk", host="127.0.0.1", options=options)
    environment = os.environ | {"BLKLOOM_RUN_DIR": str(life.run_dir)}
    for words in (["save", "disk"], ["remove", "disk"], ["restore", "disk"]):
        further = [] if words[0] == "remove" else ["--directory", str(tmp_path)]
        subprocess.run([blkloom, *words, *further], check=True, capture_output=True, env=environment, timeout=60)
    (again,) = [export for export in client.info("disk")[0].exports if export.port]
    assert (again.port, again.details) == (made.port, made.details)


def test_rules_hold_for_clients_that_were_handed_over(client: Client) -> None:
    """A client for which an export is read-only may not write after an upgrade either."""
    client.create("disk", table="0 2048 ram")
    made = client.export("disk", host="127.0.0.1", options={"access": {"read_only_for": ["address=127.0.0.0/8"]}})
    with plain(made.port) as stream:
        go(stream)
        client.upgrade()
        stream.sendall(request(1, 0, 512) + b"\xff" * 512)
        assert int.from_bytes(exactly(stream, 16)[4:8]) == 1  # EPERM
        stream.sendall(request(READ, 0, 512))
        assert exactly(stream, 16 + 512)[16:] == bytes(512)


def test_qemu_goes_on_after_the_death_of_the_worker(
    client: Client, tmp_path: Path, program: Callable[[str, str], str]
) -> None:
    keys = pre_shared_keys(tmp_path / "keys.psk", "alice")
    port = exported(client, psk=str(keys))
    credentials = f"tls-creds-psk,id=t,dir={tmp_path},username=alice,endpoint=client"
    image = f"driver=nbd,host=127.0.0.1,port={port},export=disk,tls-creds=t,reconnect-delay=60"
    command = ["stdbuf", "-oL", program("qemu-io", "qemu-utils"), "--object", credentials, "--image-opts", image]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        for _ in range(3):
            for asked, said in (("write -P 0x5a 4k 4k", "wrote 4096/4096"), ("read -P 0x5a 4k 4k", "read 4096/4096")):
                qemu.stdin.write(f"{asked}\n")  # one by one: it does not look for a second line that it has read
                while said not in (line := qemu.stdout.readline()):
                    assert line, "qemu-io has ended"
                    assert "failed" not in line
            (before,) = client.info("disk")
            os.kill(before.worker, signal.SIGKILL)
            until(client, "disk", lambda found, former=before.worker: found.worker not in (0, former))
        qemu.stdin.close()
        assert qemu.wait(60) == 0
