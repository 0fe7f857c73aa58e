"""A run directory is trusted only if no other user than its owner and root could have created it."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.control.rundir import RunDir
from blkloom.control.trusted_path import open_private
from blkloom.errors import NoSupervisor, UsageError
from left_behind import no_descriptor_left

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files to another user")


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A directory of this user's alone."""
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.fixture
def path(parent: Path) -> Path:
    """A run directory in it."""
    path = parent / "run"
    path.mkdir(mode=0o700)
    return path


def inode_of(path: Path) -> int:
    """Of the directory that is opened."""
    descriptor = open_private(path)
    try:
        return os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)


@contextmanager
def answering(path: Path, *, uid: int | None = None) -> Iterator[socket.socket]:
    """A socket that listens where a supervisor would, of another user if `uid` says so."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path / "control.sock"))
        if uid is not None:
            os.seteuid(uid)
        try:
            listening.listen()
        finally:
            if uid is not None:
                os.seteuid(0)
        listening.setblocking(False)
        yield listening


def was_reached(listening: socket.socket) -> bool:
    """Whether a client has connected."""
    try:
        listening.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def test_what_is_this_users_all_the_way_is_opened(path: Path) -> None:
    assert inode_of(path) == path.stat().st_ino


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_parent_that_others_may_write_to_is_refused_with_the_cure(parent: Path, path: Path, mode: int) -> None:
    parent.chmod(mode)
    with pytest.raises(UsageError, match=f"{parent} can be written to by others, .*; chmod go-w {parent}"):
        open_private(path)


def test_in_a_directory_with_the_sticky_bit_ones_own_is_safe(parent: Path, path: Path) -> None:
    parent.chmod(0o1777)
    assert inode_of(path) == path.stat().st_ino


@as_root
@pytest.mark.parametrize("mode", [0o755, 0o1777])
def test_a_parent_of_another_user_is_refused(parent: Path, path: Path, mode: int) -> None:
    parent.chmod(mode)
    os.chown(parent, NOBODY, -1)
    with pytest.raises(UsageError, match=f"{parent} belongs to user {NOBODY}, who could put another"):
        open_private(path)


@as_root
@pytest.mark.parametrize("make", [False, True])
def test_the_directory_of_another_user_is_refused(path: Path, make: bool) -> None:
    os.chown(path, NOBODY, -1)
    with pytest.raises(UsageError, match=f"{path} belongs to user {NOBODY}, not to you"):
        open_private(path, make=make)


def test_one_that_is_a_symbolic_link_is_refused(parent: Path, path: Path) -> None:
    (parent / "link").symlink_to(path)
    with pytest.raises(UsageError, match=r"link is a symbolic link, .*; name the directory itself"):
        open_private(parent / "link")


@pytest.mark.parametrize("target", [".", "../{name}", "{parent}"])
def test_a_link_of_this_user_on_the_way_is_followed(parent: Path, path: Path, target: str) -> None:
    (parent / "link").symlink_to(target.format(parent=parent, name=parent.name))
    assert inode_of(parent / "link" / "run") == path.stat().st_ino


@as_root
def test_a_link_of_another_user_on_the_way_is_refused(parent: Path, path: Path) -> None:
    (parent / "link").symlink_to(".")
    os.chown(parent / "link", NOBODY, -1, follow_symlinks=False)
    with pytest.raises(UsageError, match=f"link belongs to user {NOBODY}"):
        open_private(parent / "link" / "run")


def test_where_a_link_on_the_way_leads_is_looked_at_too(parent: Path) -> None:
    (parent / "open").mkdir(mode=0o700)
    (parent / "open" / "run").mkdir(mode=0o700)
    (parent / "open").chmod(0o777)
    (parent / "link").symlink_to("open")
    with pytest.raises(UsageError, match=f"{parent}/open can be written to by others"):
        open_private(parent / "link" / "run")


def test_links_that_lead_to_each_other_end(parent: Path) -> None:
    (parent / "a").symlink_to("b")
    (parent / "b").symlink_to("a")
    with pytest.raises(UsageError, match="more than 40 symbolic links"):
        open_private(parent / "a" / "run")


def test_missing_directories_are_not_writable_for_others(parent: Path) -> None:
    before = os.umask(0)
    try:
        os.close(open_private(parent / "a" / "b", make=True))
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (parent / "a", parent / "a" / "b")] == [0o755, 0o700]


def test_what_is_refused_leaves_no_descriptor_open(parent: Path, path: Path) -> None:
    (parent / "link").symlink_to(path)
    for wrong in (parent / "link", parent / "none"):
        with no_descriptor_left(), pytest.raises((UsageError, FileNotFoundError)):
            open_private(wrong)


# The client


def test_a_directory_in_which_others_have_a_hand_is_not_even_connected_to(parent: Path, path: Path) -> None:
    with answering(path) as listening:
        parent.chmod(0o777)
        for start in (False, True):
            with pytest.raises(UsageError, match="can be written to by others"):
                Client(path, start=start)
        assert not was_reached(listening)


@as_root
def test_a_supervisor_of_another_user_is_told_nothing(path: Path) -> None:
    with answering(path, uid=NOBODY) as listening:
        with pytest.raises(UsageError, match=f"the supervisor at {path}/control.sock is of user {NOBODY}"):
            Client(path)
        connected, _ = listening.accept()
        with connected:
            assert connected.recv(1) == b""


def test_where_nothing_answers_and_nothing_is_to_be_started_that_is_said(path: Path) -> None:
    with pytest.raises(NoSupervisor, match="no supervisor answers"):
        Client(path, start=False)
    assert list(path.iterdir()) == []


def test_a_supervisors_directory_is_made_where_it_is_safe_only(parent: Path) -> None:
    parent.chmod(0o777)
    with pytest.raises(UsageError, match="can be written to by others"):
        RunDir.at(parent / "run").make()
    assert list(parent.iterdir()) == []
