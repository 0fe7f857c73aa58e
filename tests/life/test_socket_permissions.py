"""Owners and permissions of listening sockets: who may connect, over restarts, upgrades and save; and the commands for
disks of virtual machines.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.control.states import SocketPermissions
from blkloom.errors import ListenError, UsageError
from conformance.file_systems import needs_root
from vhost_user_driver import Machine

from .conftest import Life, info, until

GROUP = 7
NOBODY = 65534
pytestmark = pytest.mark.timeout(120)
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that other users can enter."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o755)
        yield Path(made)


@pytest.fixture
def run(blkloom: str, life: Life) -> Run:
    """Runs a command in the run directory."""

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"BLKLOOM_RUN_DIR": str(life.run_dir)}
        return subprocess.run([blkloom, *words], capture_output=True, text=True, check=False, env=environment)

    return run


def owner(path: Path) -> tuple[int, int, int]:
    """User, group, permission bits."""
    found = path.stat()
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


def connects_as(path: Path, user: int, group: int) -> bool:
    """Whether another user can connect."""
    code = f"import socket; socket.socket(socket.AF_UNIX).connect({os.fspath(path)!r})"
    command = ["/usr/bin/python3", "-c", code]
    done = subprocess.run(
        command, user=user, group=group, extra_groups=[], stderr=subprocess.DEVNULL, check=False, cwd="/"
    )
    return done.returncode == 0


@pytest.mark.parametrize("kind", ["nbd", "vhost-user"])
def test_the_users_that_the_permissions_allow_can_connect(client: Client, folder: Path, kind: str) -> None:
    needs_root("connections of other users")
    client.create("disk", table="0 2048 ram")
    path = folder / "socket"
    where = {"unix": str(path)} if kind == "nbd" else {"path": str(path)}
    client.export("disk", kind=kind, socket=SocketPermissions(mode=0o660, gid=GROUP), **where)  # type: ignore[arg-type]
    assert owner(path) == (0, GROUP, 0o660)
    assert connects_as(path, NOBODY, GROUP)
    assert not connects_as(path, NOBODY, NOBODY)
    client.unexport("disk", str(path))
    client.export("disk", kind=kind, **where)  # type: ignore[arg-type]
    assert owner(path) == (0, 0, 0o600)
    assert not connects_as(path, NOBODY, GROUP)


@pytest.mark.parametrize("kind", ["nbd", "vhost-user"])
def test_permissions_outlive_workers_and_supervisors(client: Client, life: Life, folder: Path, kind: str) -> None:
    client.create("disk", table="0 2048 zero")
    path = folder / "socket"
    where = {"unix": str(path)} if kind == "nbd" else {"path": str(path)}
    client.export("disk", kind=kind, socket=SocketPermissions(mode=0o606), **where)  # type: ignore[arg-type]
    expected = owner(path)
    assert expected[2] == 0o606
    client.upgrade()
    worker = info(client, "disk").worker
    os.kill(worker, signal.SIGKILL)
    worker = until(client, "disk", lambda found: found.worker not in {0, worker}).worker
    assert owner(path) == expected
    life.kill()
    os.kill(worker, signal.SIGKILL)
    path.unlink()
    life.start()
    with life.client() as again:
        again.resume("disk")
        until(again, "disk", lambda found: found.state == "ACTIVE")
        assert owner(path) == expected


def test_what_has_no_permissions_is_refused(client: Client, folder: Path) -> None:
    client.create("disk", table="0 2048 ram")
    with pytest.raises(UsageError, match="a TCP socket has no owner"):
        client.export("disk", host="127.0.0.1", socket=SocketPermissions(mode=0o660))
    if os.geteuid() != 0:
        with pytest.raises(ListenError, match="cannot be set"):
            client.export("disk", unix=str(folder / "socket"), socket=SocketPermissions(uid=0))
        assert not (folder / "socket").exists()


def test_the_commands_set_permissions(run: Run, client: Client, folder: Path) -> None:
    client.create("disk", table="0 2048 ram")
    made = run("export", "disk", "--vhost-user", folder / "vm", "--socket-mode", "660", "--socket-group", "0")
    assert (made.returncode, made.stdout, made.stderr) == (0, f"{folder / 'vm'}\n", "")
    assert owner(folder / "vm")[2] == 0o660
    made = run("export", "disk", "--socket", folder / "nbd", "--socket-mode", "666")
    assert made.returncode == 0
    assert owner(folder / "nbd")[2] == 0o666
    for words in (["--listen", "0"], ["--fuse"]):
        refused = run("export", "disk", *words, "--socket-mode", "660")
        assert refused.returncode == 1
        assert "are of Unix sockets" in refused.stderr
    refused = run("export", "disk", "--vhost-user", "--fuse")
    assert "--fuse and --vhost-user are incompatible" in refused.stderr
    refused = run("export", "disk", "--vhost-user", "--listen", "0")
    assert "--vhost-user is incompatible with options of NBD" in refused.stderr
    refused = run("export", "disk", "--vhost-user", "--socket-owner", "nobody at all")
    assert "there is no user 'nobody at all'" in refused.stderr


def test_create_prints_the_socket_of_a_virtual_machine(run: Run, life: Life, client: Client) -> None:
    made = run("create", "vm", "--table", "0 2048 ram", "--vhost-user")
    assert (made.returncode, made.stdout) == (0, f"{life.run_dir / 'vhost' / 'vm'}\n")
    with Machine.connected(life.run_dir / "vhost" / "vm") as machine:
        assert machine.capacity == 1 << 20
    listed = run("export", "vm", "--list")
    assert f"auto-vhost-user\t{life.run_dir / 'vhost' / 'vm'}\n" in listed.stdout
    assert f"Socket for VMs:    {life.run_dir / 'vhost' / 'vm'}\n" in run("info", "vm").stdout
    assert run("info", "-c", "--noheadings", "-o", "file", "vm").stdout.strip() == ""
    (life.run_dir / "vhost" / "other").mkdir()
    refused = run("create", "other", "--table", "0 2048 ram", "--vhost-user")
    (life.run_dir / "vhost" / "other").rmdir()
    assert refused.returncode == 1
    assert [found.name for found in client.info()] == ["vm"]


def test_exports_are_saved_and_restored_with_their_permissions(run: Run, client: Client, folder: Path) -> None:
    client.create("disk", table="0 2048 zero")
    client.export("disk", kind="vhost-user")
    path = folder / "socket"
    client.export("disk", kind="vhost-user", path=str(path), socket=SocketPermissions(mode=0o660), read_only=True)
    client.export("disk", unix=str(folder / "nbd"), socket=SocketPermissions(mode=0o666))
    directory = folder / "devices.d"
    assert run("save", "--directory", directory).returncode == 0
    before = [(export.kind, export.address, export.socket) for export in info(client, "disk").exports]
    client.remove("disk")
    restored = run("restore", "--directory", directory)
    assert (restored.stderr, restored.returncode) == ("", 0)
    after = [(export.kind, export.address, export.socket) for export in info(client, "disk").exports]
    assert sorted(after, key=str) == sorted(before, key=str)
    assert owner(path)[2] == 0o660


@pytest.mark.parametrize("count", [1, 2])
def test_serve_serves_virtual_machines(blkloom: str, folder: Path, count: int) -> None:
    images = [folder / f"disk{number}.img" for number in range(count)]
    for image in images:
        image.write_bytes(b"i" * 4096)
    path = folder / "vm"
    sockets = [path] if count == 1 else [path / image.name for image in images]
    command = [blkloom, "serve", *images, "--vhost-user", path, "--socket-mode", "600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline().rstrip("\n") for _ in images] == [str(socket) for socket in sockets]
        for socket in sockets:
            assert owner(socket)[2] == 0o600
            with Machine.connected(socket) as machine:
                assert machine.read(0, 4096) == b"i" * 4096
                machine.write(0, b"w" * 512)
                machine.flush()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not any(socket.exists() for socket in sockets)
    assert all(image.read_bytes()[:513] == b"w" * 512 + b"i" for image in images)
