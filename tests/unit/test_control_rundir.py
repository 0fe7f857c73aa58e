"""Only the owner can use a run directory, and one rule decides where it is."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from blkloom.control import rundir
from blkloom.control.client import Client
from blkloom.control.rundir import RunDir
from blkloom.device_names import unmangle
from blkloom.errors import NoSupervisor, UsageError


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`user(uid)`: who this process is taken for."""
    return lambda uid: monkeypatch.setattr(rundir.os, "geteuid", lambda: uid)


def test_a_users_is_in_his_runtime_directory(user: Callable[[int], None]) -> None:
    user(1000)
    assert RunDir.default({"XDG_RUNTIME_DIR": "/run/user/1000"}).path == Path("/run/user/1000/blkloom")


@pytest.mark.parametrize("environment", [{}, {"XDG_RUNTIME_DIR": ""}, {"XDG_RUNTIME_DIR": "here"}])
def test_without_a_runtime_directory_a_user_is_told_what_to_set(
    user: Callable[[int], None], environment: dict[str, str]
) -> None:
    user(1000)
    with pytest.raises(UsageError, match=r"XDG_RUNTIME_DIR is not set; .* --run-dir DIR or BLKLOOM_RUN_DIR"):
        RunDir.default(environment)


def test_roots_is_the_systems_whatever_the_environment_says(user: Callable[[int], None]) -> None:
    user(0)
    assert RunDir.default({"XDG_RUNTIME_DIR": "/run/user/1000"}).path == Path("/run/blkloom")


@pytest.mark.parametrize("number", [0, 1000])
def test_the_one_that_the_environment_names_goes_first(user: Callable[[int], None], number: int) -> None:
    user(number)
    assert RunDir.default({"BLKLOOM_RUN_DIR": "/x/y", "XDG_RUNTIME_DIR": "/run/user/1"}).path == Path("/x/y")


def test_a_client_in_python_is_of_the_run_directory_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLKLOOM_RUN_DIR", str(tmp_path / "run"))
    with pytest.raises(NoSupervisor, match=f"at {tmp_path}/run/control.sock"):
        Client(start=False)


def test_a_relative_path_stays_where_it_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = RunDir.at("here")
    monkeypatch.chdir("/")
    assert found.path == tmp_path / "here"


def test_it_is_made_with_its_parents_for_the_owner_alone(tmp_path: Path) -> None:
    made = RunDir.at(tmp_path / "a" / "b")
    before = os.umask(0)
    try:
        made.make()
        made.make()
    finally:
        os.umask(before)
    for path in (made.path, made.devices, made.states, made.workers):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_one_that_is_open_to_others_is_refused_with_the_cure(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    with pytest.raises(UsageError, match=f"{tmp_path} is open to others; chmod 700 {tmp_path}"):
        RunDir.at(tmp_path).make()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_other_things_is_not_to_be_closed_to_others(tmp_path: Path) -> None:
    (tmp_path / "passwd").touch()
    tmp_path.chmod(0o755)
    with pytest.raises(UsageError, match=f"{tmp_path} is open to others; choose another with --run-dir"):
        RunDir.at(tmp_path).make()


def test_a_directory_of_another_user_is_refused(tmp_path: Path, user: Callable[[int], None]) -> None:
    tmp_path.chmod(0o700)
    user(os.getuid() + 1)
    with pytest.raises(UsageError, match=rf"belongs to user {os.getuid()}, .*; choose another with --run-dir"):
        RunDir.at(tmp_path).make()


def test_where_a_file_is_there_can_be_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is no directory; choose another with --run-dir"):
        RunDir.at(tmp_path / "file").make()


@pytest.mark.parametrize("name", ["disk", "my disk", "a:b", "ü", "\\x20"])
def test_a_device_has_a_socket_in_the_folder_whose_name_says_whose_it_is(name: str) -> None:
    path = RunDir.at("/r").device(name)
    assert path.parent == Path("/r/dev")
    assert unmangle(path.name) == name


@pytest.mark.parametrize("length", [1, 80, 81, 82, 300, 4000])
def test_sockets_have_paths_that_a_socket_can_have(length: int) -> None:
    places = RunDir.at("/" + "r" * (length - 1))
    for path in (places.control, places.worker("0123456789ab"), places.device("disk"), places.device("x" * 127)):
        assert len(os.fsencode(path)) <= 107
    assert (places.sockets == places.path) == (length <= 81)
    assert places.state(0).is_relative_to(places.path)


def test_two_long_paths_have_sockets_apart_and_each_user_his_own(user: Callable[[int], None]) -> None:
    user(1000)
    found = {RunDir.at("/" + "r" * 200 + end).sockets for end in "ab"}
    user(1001)
    found |= {RunDir.at("/" + "r" * 200 + end).sockets for end in "ab"}
    assert len(found) == 4


def test_everything_has_a_place_of_its_own() -> None:
    places = RunDir.at("/r")
    found = [places.control, places.lock, places.start_lock, places.log, places.device("x")]
    found += [places.worker("0"), places.worker("1"), places.state(0), places.state(1)]
    assert len(set(found)) == len(found)
