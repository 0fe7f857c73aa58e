"""The directory of device files: who may change it, which files are read, and that a file is replaced as a whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blkloom.boot.directory import LONGEST, Directory, default_directory
from blkloom.errors import BackingError, UsageError
from conformance.file_systems import needs_root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "devices.d"
    made.mkdir(mode=0o755)
    return made


@pytest.fixture
def directory(folder: Path) -> Iterator[Directory]:
    with Directory(folder) as opened:
        yield opened


def test_what_is_written_is_read_and_listed_by_name(directory: Directory, folder: Path) -> None:
    directory.write("my disk", "0 8 zero\n")
    directory.write("a", "0 8 error\n")
    directory.write("a", "0 8 zero\n")
    (folder / "README").write_text("no device")
    (folder / ".hidden.table").write_text("no device")
    assert directory.names() == ["a", "my disk"]
    assert (directory.read("a"), directory.read("my disk")) == ("0 8 zero\n", "0 8 zero\n")
    assert sorted(path.name for path in folder.glob("*.table")) == [".hidden.table", "a.table", "my\\x20disk.table"]


def test_a_name_with_a_space_may_be_the_name_of_the_file(directory: Directory, folder: Path) -> None:
    (folder / "my disk.table").write_text("0 8 zero\n")
    assert directory.names() == ["my disk"]
    assert directory.read("my disk") == "0 8 zero\n"


def test_bytes_that_are_not_utf8_stay(directory: Directory, folder: Path) -> None:
    (folder / "a.table").write_bytes(b"0 8 loop /srv/\xff.img\n")
    assert os.fsencode(directory.read("a")) == b"0 8 loop /srv/\xff.img\n"


def make_link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def make_huge(path: Path) -> None:
    path.touch(0o600)
    os.truncate(path, LONGEST + 1)


def make_writable(path: Path) -> None:
    path.touch()
    path.chmod(0o646)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (make_link, "is a symbolic link"),
        (make_huge, f"has more than {LONGEST} bytes"),
        (os.mkfifo, "is no regular file"),
        (Path.mkdir, "Is a directory"),
        (make_writable, "can be written to by others"),
        (lambda path: path.write_bytes(b"0 8 \0zero"), "has NUL bytes"),
    ],
)
def test_a_hostile_file_is_refused(directory: Directory, make: Callable[[Path], object], says: str) -> None:
    make(directory.file("a"))
    with pytest.raises(BackingError) as raised:
        directory.read("a")
    assert says in str(raised.value)
    assert str(directory.file("a")) in str(raised.value)


def test_a_missing_file_is_an_error(directory: Directory) -> None:
    with pytest.raises(BackingError) as raised:
        directory.read("a")
    assert raised.value.errno == errno.ENOENT


def test_a_file_of_another_user_is_refused(directory: Directory) -> None:
    needs_root("a file of another user")
    directory.write("a", "0 8 zero\n")
    os.chown(directory.file("a"), 12345, 0)
    with pytest.raises(BackingError, match="belongs to user 12345"):
        directory.read("a")


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_directory_that_others_can_write_to_is_refused(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    with pytest.raises(UsageError, match="can be written to by others"):
        Directory(folder)


def test_a_directory_below_one_that_others_can_write_to_is_refused(folder: Path) -> None:
    folder.parent.chmod(0o777)
    with pytest.raises(UsageError, match="can be written to by others"):
        Directory(folder)


def test_a_directory_of_another_user_is_refused(folder: Path) -> None:
    needs_root("a directory of another user")
    os.chown(folder, 12345, 0)
    with pytest.raises(UsageError, match="belongs to user 12345"):
        Directory(folder)


def test_a_write_that_fails_leaves_the_former_file(
    directory: Directory, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.write("a", "0 8 zero\n")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        directory.write("a", "0 16 zero\n")
    assert [path.name for path in folder.iterdir()] == ["a.table"]
    assert directory.read("a") == "0 8 zero\n"


@pytest.mark.parametrize(
    ("environment", "path"),
    [
        ({"XDG_CONFIG_HOME": "/c", "HOME": "/h"}, "/c/blkloom/devices.d"),
        ({"XDG_CONFIG_HOME": "c", "HOME": "/h"}, "/h/.config/blkloom/devices.d"),
        ({"HOME": "/h"}, "/h/.config/blkloom/devices.d"),
    ],
)
def test_a_user_has_a_directory_of_their_own(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], path: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_directory(environment) == Path(path)


def test_root_has_the_directory_in_etc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_directory({"XDG_CONFIG_HOME": "/c"}) == Path("/etc/blkloom/devices.d")
