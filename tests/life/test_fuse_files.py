"""Devices as files: created, used, renamed, resized, suspended, removed, and taken over by another supervisor."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from blkloom.control.client import Client
from blkloom.errors import DeviceBusy, MountError, UsageError
from blkloom.export.fuse.mountinfo import mounted_at
from faulty_fs import needs_fuse

from .conftest import Life, a_life, info, until

SECTORS = 2048
SIZE = SECTORS * 512
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def life(shared: Life) -> Life:
    """The module's."""
    needs_fuse()
    return shared


@pytest.fixture
def disk(client: Client) -> None:
    """A device of that name in memory."""
    client.create("disk", table=f"0 {SECTORS} ram")


@contextmanager
def opened(path: Path, *, cut: bool = False) -> Iterator[int]:
    """A descriptor of the file. cut: nothing serves it when it is closed, and the kernel may say so."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        yield descriptor
    finally:
        with suppress(OSError) if cut else nullcontext():
            os.close(descriptor)


@pytest.mark.usefixtures("disk")
def test_a_device_is_a_file_in_the_run_directory_which_follows_its_name(life: Life, client: Client) -> None:
    export = client.export("disk", kind="fuse")
    path = life.run_dir / "fuse" / "disk"
    assert (export.kind, export.path, export.address) == ("fuse", str(path), str(path))
    assert (path.stat().st_size, path.stat().st_mode, path.stat().st_uid) == (SIZE, 0o100600, os.geteuid())
    with opened(path) as descriptor:
        os.pwrite(descriptor, b"hello", 0)
    client.rename("disk", name="other disk")
    renamed = life.run_dir / "fuse" / "other\\x20disk"
    assert renamed.read_bytes()[:5] == b"hello"
    assert not path.is_symlink()
    assert renamed in [Path(export.path) for export in info(client, "other disk").exports]
    os.kill(info(client, "other disk").worker, signal.SIGKILL)
    assert renamed.read_bytes()[:5] == b"hello"
    assert str(renamed) in [export.path for export in info(client, "other disk").exports]
    with pytest.raises(UsageError, match=r"is exported at .* already"):
        client.export("other disk", kind="fuse")
    client.unexport("other disk", str(renamed))
    assert not renamed.is_symlink()
    assert list((life.run_dir / "mounts").iterdir()) == []


@pytest.mark.usefixtures("disk")
def test_a_device_is_a_file_at_any_path_with_owner_and_mode(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    options = {"user": os.geteuid(), "group": os.getegid(), "mode": 0o640}
    client.export("disk", kind="fuse", path=str(path), options=options)
    assert path.stat().st_mode == 0o100640
    path.chmod(0o600)
    os.kill(info(client, "disk").worker, signal.SIGKILL)
    assert path.stat().st_mode == 0o100600, "what was changed outlives the worker"
    client.rename("disk", name="renamed")
    assert path.stat().st_size == SIZE
    client.unexport("renamed", str(path))
    assert not path.exists()


@pytest.mark.usefixtures("disk")
def test_a_file_that_is_open_is_not_taken_away_and_its_users_are_named(life: Life, client: Client) -> None:
    path = Path(client.export("disk", kind="fuse").path)
    with opened(path):
        until(client, "disk", lambda found: found.connections == 1)
        with pytest.raises(MountError, match=rf"is open \(.*process {os.getpid()}\)") as caught:
            client.unexport("disk", "auto-fuse")
        assert (caught.value.errno, caught.value.path) == (errno.EBUSY, str(path))
        with pytest.raises(DeviceBusy, match="1 client is connected"):
            client.remove("disk")
        assert path.stat().st_size == SIZE
    until(client, "disk", lambda found: found.connections == 0)
    client.unexport("disk", "auto-fuse")
    assert not path.is_symlink()


@pytest.mark.usefixtures("disk")
def test_what_users_ask_fails_once_their_file_is_taken_away_by_force(client: Client) -> None:
    path = Path(client.export("disk", kind="fuse").path)
    with opened(path, cut=True) as descriptor:
        client.unexport("disk", "auto-fuse", force=True)
        assert not path.is_symlink()
        with pytest.raises(OSError, match=r"not connected|connection abort") as caught:
            os.pread(descriptor, 512, 0)
        assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert [export.kind for export in info(client, "disk").exports] == ["nbd"]


@pytest.mark.usefixtures("disk")
def test_a_deferred_removal_waits_until_the_file_is_closed(client: Client) -> None:
    path = Path(client.export("disk", kind="fuse").path)
    with opened(path) as descriptor:
        until(client, "disk", lambda found: found.connections == 1)
        client.remove("disk", deferred=True)
        assert info(client, "disk").deferred
        assert os.pwrite(descriptor, b"x" * 512, 0) == 512
    while client.info():
        pass
    assert not path.is_symlink()


@pytest.mark.usefixtures("disk")
def test_readers_of_a_suspended_device_wait_also_while_its_worker_is_replaced(
    client: Client, beside: Callable[..., Future[Any]]
) -> None:
    path = Path(client.export("disk", kind="fuse").path)
    client.suspend("disk")
    before = info(client, "disk").worker
    process = subprocess.Popen(["head", "-c", "512", path], stdout=subprocess.PIPE)
    until(client, "disk", lambda found: found.connections == 1)
    os.kill(before, signal.SIGKILL)
    until(client, "disk", lambda found: found.worker not in (0, before))
    client.upgrade()
    assert process.poll() is None
    client.resume("disk")
    assert process.communicate(timeout=60)[0] == bytes(512)


def test_users_see_another_size_and_other_contents_after_a_swap(client: Client, tmp_path: Path) -> None:
    for name, letter, size in (("a", b"a", SIZE), ("b", b"b", 2 * SIZE)):
        (tmp_path / name).write_bytes(letter * size)
    client.create("disk", table=f"0 {SECTORS} loop {tmp_path}/a")
    path = Path(client.export("disk", kind="fuse").path)
    with opened(path) as descriptor, mmap.mmap(descriptor, SIZE, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        assert mapped[:3] == b"aaa"
        client.load("disk", f"0 {2 * SECTORS} loop {tmp_path}/b")
        client.resume("disk")
        assert os.fstat(descriptor).st_size == 2 * SIZE
        assert os.pread(descriptor, 3, SIZE) == b"bbb"
        while mapped[:3] != b"bbb":  # the kernel is told on a thread
            pass
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, SIZE)


@pytest.mark.usefixtures("disk")
def test_a_file_for_reading_only_cannot_be_written(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    client.export("disk", kind="fuse", path=str(path), read_only=True)
    assert path.read_bytes() == bytes(SIZE)
    with pytest.raises(OSError, match="Read-only") as caught:
        path.open("r+b")
    assert caught.value.errno == errno.EROFS
    client.unexport("disk", str(path))


@pytest.mark.usefixtures("disk")
@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"path": "disk.img"}, "disk.img: the path of a file must be absolute"),
        ({"options": {"allow_other": True}}, "other users cannot reach a file in .*--fuse PATH --allow-other"),
        ({"options": {"colour": "red"}}, "options of a FUSE file: Object contains unknown field `colour`"),
        ({"kind": "tape"}, "there are no exports of kind 'tape'"),
    ],
)
def test_a_file_that_cannot_be_is_refused(client: Client, call: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        client.export("disk", **{"kind": "fuse", **call})
    assert len(info(client, "disk").exports) == 1


@pytest.mark.usefixtures("disk")
def test_where_a_file_has_contents_nothing_is_mounted(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(MountError, match="not empty") as caught:
        client.export("disk", kind="fuse", path=str(tmp_path / "file"))
    assert (caught.value.errno, caught.value.path) == (errno.EEXIST, str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == b"precious"
    assert len(info(client, "disk").exports) == 1


def test_a_file_outlives_a_worker_whose_backing_file_has_moved(client: Client, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * SIZE)
    client.create("disk", table=f"0 {SECTORS} loop {tmp_path}/a")
    path = Path(client.export("disk", kind="fuse").path)
    (tmp_path / "a").rename(tmp_path / "b")
    os.kill(info(client, "disk").worker, signal.SIGKILL)
    assert path.read_bytes()[:1] == b"a"


# supervisors


@pytest.fixture
def own() -> Iterator[Life]:
    """A supervisor of the test's own."""
    needs_fuse()
    with a_life() as life:
        yield life


def test_a_supervisor_that_is_killed_is_not_noticed_by_users(own: Life) -> None:
    with own.client() as client:
        client.create("disk", table=f"0 {SECTORS} ram")
        path = Path(client.export("disk", kind="fuse").path)
    with opened(path) as descriptor:
        own.kill()
        assert os.pwrite(descriptor, b"1" * 512, 0) == 512
        own.start()
        with own.client() as client:
            worker = until(client, "disk", lambda found: found.connections == 1).worker
            os.kill(worker, signal.SIGKILL)
            assert os.pread(descriptor, 512, 0) == b"1" * 512


def test_a_file_whose_supervisor_and_worker_were_killed_is_mounted_again(own: Life, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"a" * SIZE)
    with own.client() as client:
        client.create("disk", table=f"0 {SECTORS} loop {tmp_path}/image")
        paths = [Path(client.export("disk", kind="fuse", path=path).path) for path in ("", f"{tmp_path}/node")]
        worker = info(client, "disk").worker
    own.kill()
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(OSError, match=r"not connected|connection abort"):
        paths[0].read_bytes()
    own.start()
    assert [path.read_bytes()[:3] for path in paths] == [b"aaa"] * 2


def test_what_nothing_serves_any_more_is_unmounted_when_a_supervisor_starts(own: Life) -> None:
    with own.client() as client:
        client.create("disk", table=f"0 {SECTORS} ram")
        link = Path(client.export("disk", kind="fuse").path)
        where = os.readlink(link)
        worker = info(client, "disk").worker
    own.kill()
    os.kill(worker, signal.SIGKILL)
    (own.run_dir / "devices" / "0.json").unlink()  # of the device nothing is known
    own.start()
    assert mounted_at(where) is None
    assert not link.is_symlink()
    assert list((own.run_dir / "mounts").iterdir()) == []


def test_a_device_that_has_failed_refuses_and_is_the_same_file_once_it_is_resumed(tmp_path: Path) -> None:
    needs_fuse()
    (tmp_path / "image").write_bytes(b"a" * SIZE)
    with a_life("--max-deaths=0") as life, life.client() as client:
        client.create("disk", table=f"0 {SECTORS} loop {tmp_path}/image")
        path = Path(client.export("disk", kind="fuse").path)
        with opened(path, cut=True) as descriptor:
            os.kill(info(client, "disk").worker, signal.SIGKILL)
            until(client, "disk", lambda found: found.state == "FAILED")
            with pytest.raises(OSError, match=r"not connected|connection abort"):
                os.pread(descriptor, 1, 0)
            client.resume("disk")
            assert path.read_bytes()[:3] == b"aaa"


def test_devices_that_stand_on_one_with_a_file_are_stopped_with_it(own: Life) -> None:
    with own.client() as client:
        client.create("lower", table=f"0 {SECTORS} ram")
        client.create("upper", table=f"0 {SECTORS} linear blkloom:lower 0")
        for name in ("lower", "upper"):
            client.export(name, kind="fuse")
        client.stop()
    assert own.process.wait(60) == 0


def test_a_supervisor_does_not_stop_while_a_file_is_open(own: Life) -> None:
    with own.client() as client:
        client.create("disk", table=f"0 {SECTORS} ram")
        path = Path(client.export("disk", kind="fuse").path)
        with opened(path, cut=True) as descriptor:
            until(client, "disk", lambda found: found.connections == 1)
            with pytest.raises(DeviceBusy, match="'disk' \\(1 client\\)"):
                client.stop()
            client.stop(force=True)
            with pytest.raises(OSError, match=r"not connected|connection abort"):
                os.pread(descriptor, 512, 0)
    own.process.wait(60)


def test_the_command_line_makes_and_shows_and_removes_files(own: Life, blkloom: str, tmp_path: Path) -> None:
    def run(*words: str) -> str:
        command = [blkloom, "--run-dir", str(own.run_dir), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    run("create", "disk", "--table", f"0 {SECTORS} ram")
    link, path = str(own.run_dir / "fuse" / "disk"), str(tmp_path / "disk.img")
    assert run("export", "disk", "--fuse") == link
    assert run("export", "disk", "--fuse", path, "--mode", "644", "--allow-other") == path
    assert os.stat(path).st_mode == 0o100644
    assert f"File:              {link}" in run("info", "disk").splitlines()
    assert run("info", "-c", "--noheadings", "-o", "file", "disk") == f"{link},{path}"
    assert f"e1\t{path}" in run("export", "disk", "--list").splitlines()
    run("unexport", "disk", path)
    run("unexport", "disk", "auto-fuse")
    assert not os.path.lexists(path)
    assert not os.path.lexists(link)
