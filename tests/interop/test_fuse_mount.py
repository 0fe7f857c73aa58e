"""Mounting and unmounting FUSE files, as root and as an ordinary user, and the errors when it is not possible."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fuse_ordinary_user
from blkloom.errors import MountError
from blkloom.export.fuse.mount import KIND, Mount, answers, mount, unmount
from blkloom.export.fuse.mountinfo import mounted_at
from faulty_fs import needs_fuse
from fuse_memory import fuse_memory, server

Program = Callable[[str, str], str]
SIZE = 1 << 20


@pytest.fixture
def mounts() -> Iterator[list[tuple[Mount, int]]]:
    """Mounts to be undone, and their descriptors."""
    needs_fuse()
    made: list[tuple[Mount, int]] = []
    yield made
    for mounted, device in made:
        os.close(device)
        if mounted_at(mounted.path):
            unmount(mounted, lazy=True)


def test_a_mount_is_seen_with_its_kind_and_source_and_leaves_nothing(tmp_path: Path) -> None:
    with fuse_memory(tmp_path / "node", SIZE) as path:
        found = mounted_at(str(path))
        assert found is not None
        assert (found.kind, found.source) == (KIND, "memory")
        assert {"nosuid", "nodev", "rw", "default_permissions"} <= found.options
    assert mounted_at(str(path)) is None
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_that_was_there_stays(tmp_path: Path, mounts: list[tuple[Mount, int]]) -> None:
    (tmp_path / "node").touch()
    mounts.append(mount(tmp_path / "node", source="test"))
    unmount(mounts[0][0])
    assert (tmp_path / "node").read_bytes() == b""


def test_a_path_is_told_apart_from_links_to_it(tmp_path: Path, mounts: list[tuple[Mount, int]]) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    mounts.append(mount(tmp_path / "link" / "a b\\c", source="a b,c\\d"))
    found = mounted_at(str(tmp_path / "real" / "a b\\c"))
    assert found is not None
    assert found.source == "a b,c\\d"
    assert mounts[0][0].path == found.path


def test_nothing_is_mounted_over_what_is_there(tmp_path: Path) -> None:
    needs_fuse()
    (tmp_path / "file").write_bytes(b"hello")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name, words in (("file", "not empty"), ("folder", "not a regular file"), ("link", "not a regular file")):
        with pytest.raises(MountError, match=words) as caught:
            mount(tmp_path / name, source="test")
        assert (caught.value.errno, caught.value.path) == (errno.EEXIST, str(tmp_path / name))
    with pytest.raises(MountError, match="No such file or directory") as caught:
        mount(tmp_path / "missing" / "node", source="test")
    assert caught.value.errno == errno.ENOENT


def test_a_mount_that_is_served_is_not_replaced(tmp_path: Path) -> None:
    with fuse_memory(tmp_path / "node", SIZE) as path:
        with pytest.raises(MountError, match="another export is mounted there") as caught:
            mount(path, source="second")
        assert caught.value.errno == errno.EBUSY
        assert answers(str(path)) is True


def test_the_mount_of_a_server_that_has_ended_is_replaced(tmp_path: Path) -> None:
    needs_fuse()
    _, device = mount(tmp_path / "node", source="first")
    os.close(device)
    assert answers(str(tmp_path / "node")) is False
    with fuse_memory(tmp_path / "again", SIZE), fuse_memory(tmp_path / "node", SIZE, kept=True) as path:
        assert path.stat().st_size == SIZE
        found = mounted_at(str(path))
        assert found is not None
        assert found.source == "memory"
    assert mounted_at(str(path)) is None, "the first one is gone, too"


def test_another_mount_at_the_path_is_in_the_way(tmp_path: Path, program: Program) -> None:
    if os.geteuid() != 0:
        pytest.skip("a bind mount is made by root")
    (tmp_path / "node").touch()
    subprocess.run([program("mount", "mount"), "--bind", tmp_path / "node", tmp_path / "node"], check=True)
    try:
        with pytest.raises(MountError, match="is mounted there") as caught:
            mount(tmp_path / "node", source="test")
        assert caught.value.errno == errno.EBUSY
    finally:
        subprocess.run(["umount", tmp_path / "node"], check=True)


def test_a_file_in_use_is_unmounted_only_lazily(tmp_path: Path) -> None:
    with fuse_memory(tmp_path / "node", SIZE) as path:
        mounted = Mount(str(path))
        with path.open("r+b", buffering=0) as file:
            with pytest.raises(MountError, match="Device or resource busy") as caught:
                unmount(mounted)
            assert caught.value.errno == errno.EBUSY
            os.pwrite(file.fileno(), b"hello", 0)


def test_a_read_only_mount_refuses_writers(tmp_path: Path) -> None:
    with fuse_memory(tmp_path / "node", SIZE, read_only=True) as path:
        with pytest.raises(OSError, match="Read-only") as caught:
            path.open("r+b")
        assert caught.value.errno == errno.EROFS
        assert path.read_bytes() == bytes(SIZE)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """One that every user can reach."""
    with tempfile.TemporaryDirectory(prefix="blkloom-") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


@pytest.mark.parametrize("allowed", [False, True])
def test_other_users_have_it_only_where_they_are_allowed(open_directory: Path, program: Program, allowed: bool) -> None:
    if os.geteuid() != 0:
        pytest.skip("another user is needed, and only root can be one")
    with fuse_memory(open_directory / "node", SIZE, allow_other=allowed) as path:
        path.chmod(0o644)
        words = [program("cmp", "diffutils"), "-n", "5", path, "/dev/zero"]
        assert subprocess.run(words, user=65534, stderr=subprocess.PIPE, check=False).returncode == 2 * (not allowed)
        path.chmod(0o600)
        assert subprocess.run(words, user=65534, stderr=subprocess.PIPE, check=False).returncode == 2


@pytest.mark.parametrize(
    "case",
    [
        "a_file",
        "a_stale_mount",
        "others_not_allowed",
        "others_allowed",
        "a_limit_of_mounts",
        "a_directory_of_others",
    ],
)
def test_an_ordinary_user_mounts_with_fusermount3(open_directory: Path, program: Program, case: str) -> None:
    needs_fuse()
    if os.geteuid() != 0:
        pytest.skip("the surroundings of these cases are made by root")
    program("fusermount3", "fuse3")
    own = open_directory / "own"
    own.mkdir()
    shutil.copy(server(), own / "server")
    os.chown(own, fuse_ordinary_user.USER, fuse_ordinary_user.USER)
    words = [program("unshare", "util-linux"), "--mount", sys.executable, fuse_ordinary_user.__file__]
    done = subprocess.run([*words, own, own / "server", case], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (own / "node").exists() == (case == "a_stale_mount"), "the file of a mount that was replaced stays"
