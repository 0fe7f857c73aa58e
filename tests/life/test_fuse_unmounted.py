"""FUSE files that users unmount by hand: their exports end, and return only after a new `export`."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.errors import MountError, UsageError
from blkloom.export.fuse.mountinfo import mounted_at
from faulty_fs import needs_fuse

from .conftest import Life, a_life, info, until

SECTORS = 2048
PATIENCE = 60.0
pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def life(shared: Life) -> Life:
    """The module's."""
    needs_fuse()
    return shared


@pytest.fixture
def own() -> Iterator[Life]:
    """A supervisor of the test's own."""
    needs_fuse()
    with a_life() as life:
        yield life


def unmount(path: Path, *options: str) -> None:
    """As users do."""
    command = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    subprocess.run([*command, *options, os.path.realpath(path)], check=True, stderr=subprocess.PIPE, timeout=PATIENCE)


def make(client: Client, path: str = "") -> Path:
    """`disk`, with an a at its beginning, and its file."""
    client.create("disk", table=f"0 {SECTORS} ram")
    file = Path(client.export("disk", kind="fuse", path=path).path)
    with file.open("r+b") as opened:
        opened.write(b"a")
    until(client, "disk", lambda found: found.connections == 0)
    return file


def files(client: Client) -> list[str]:
    return [export.path for export in info(client, "disk").exports if export.kind == "fuse"]


def until_gone(client: Client) -> None:
    until(client, "disk", lambda found: [export.kind for export in found.exports] == ["nbd"])


@pytest.mark.parametrize("where", ["in the run directory", "at a path"])
def test_it_is_no_export_any_more_and_can_be_one_again(life: Life, client: Client, tmp_path: Path, where: str) -> None:
    path = str(tmp_path / "node") if where == "at a path" else ""
    for _ in range(2):
        file = make(client, path)
        for _ in range(3):
            unmount(file)
            until_gone(client)
            assert not os.path.lexists(file), "what was made for the mount goes with it"
            assert list((life.run_dir / "mounts").iterdir()) == []
            assert "fuse" not in (life.run_dir / "devices" / f"{info(client, 'disk').minor}.json").read_text()
            with pytest.raises(UsageError, match="has no export"):
                client.unexport("disk", str(file))
            client.export("disk", kind="fuse", path=path)
            assert file.read_bytes()[:1] == b"a"
        client.remove("disk", retry=True)


def test_no_worker_that_comes_brings_it_back(client: Client) -> None:
    file = make(client)
    unmount(file)
    until_gone(client)
    before = info(client, "disk").worker
    os.kill(before, signal.SIGKILL)
    until(client, "disk", lambda found: found.worker not in (0, before))
    client.upgrade()
    assert files(client) == []
    assert not file.is_symlink()


def test_its_users_go_on_until_they_close_it(client: Client, tmp_path: Path) -> None:
    file = make(client, str(tmp_path / "node"))
    descriptor = os.open(file, os.O_RDWR)
    try:
        until(client, "disk", lambda found: found.connections == 1)
        unmount(file, "-l" if os.geteuid() == 0 else "-z")
        assert os.pread(descriptor, 1, 0) == b"a"
        assert files(client) == [str(file)]
    finally:
        os.close(descriptor)
    until_gone(client)
    client.export("disk", kind="fuse", path=str(file))
    assert file.read_bytes()[:1] == b"a"


def test_a_supervisor_that_comes_back_is_told_of_it(own: Life) -> None:
    with own.client() as client:
        file = make(client)
        where = os.path.realpath(file)
    own.kill()
    unmount(file)
    assert mounted_at(where) is None
    own.start()
    with own.client() as client:
        until_gone(client)
        client.export("disk", kind="fuse")
        assert file.read_bytes()[:1] == b"a"


@pytest.mark.parametrize("verb", ["upgrade", "unexport", "suspend", "remove"])
def test_it_may_be_unmounted_while_something_is_under_way(own: Life, verb: str, tmp_path: Path) -> None:
    """Whichever comes first: the export ends, or the device does."""
    calls: dict[str, Callable[[Client], object]] = {
        "upgrade": lambda client: client.upgrade(),
        "unexport": lambda client: client.unexport("disk", str(tmp_path / "node")),
        "suspend": lambda client: client.suspend("disk"),
        "remove": lambda client: client.remove("disk", retry=True),
    }
    for number in range(6):
        with own.client() as client:
            file = make(client, str(tmp_path / "node"))
            with ThreadPoolExecutor(1) as beside:
                unmounting = beside.submit(unmount, file)
                if number % 2:
                    wait([unmounting], PATIENCE)
                try:
                    calls[verb](client)
                except UsageError:
                    pass  # it was gone before
                except MountError as error:
                    if error.errno != errno.EBUSY:  # umount(8) may hold it
                        raise
                with suppress(subprocess.CalledProcessError):  # likewise
                    unmounting.result(PATIENCE)
        with own.client() as client:
            if client.info():
                until_gone(client)
                client.remove("disk", retry=True)
            assert not file.exists()
