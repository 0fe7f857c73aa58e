"""`blkloom loop` with a real supervisor behaves like losetup."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blkloom.control.client import Client
from conformance.nbd_client import READ_ONLY, WRITE, NbdClient

from .conftest import Life, info, read
from .loop_commands import Loop, cells, names, until_gone

pytestmark = pytest.mark.timeout(180)
MIB = 1 << 20
_SET_FLAGS, _IMMUTABLE = 0x40086602, 0x10
"""FS_IOC_SETFLAGS, FS_IMMUTABLE_FL of linux/fs.h."""


@pytest.fixture
def life(shared: Life) -> Life:
    """The module's."""
    return shared


# setting up


def test_find_and_show_give_the_first_free_name_and_a_live_device(
    loop: Loop, client: Client, file: Path, tmp_path: Path, connect: Callable[[str], NbdClient]
) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(b"o" * 1024)
    assert loop("--find") == "loop0\n"
    assert loop("-f", "--show", file) == "loop0\n"
    assert loop("-f", other) == ""
    assert loop("-f") == "loop2\n"
    assert client.table("loop1") == f"0 2 loop {other}"
    assert (read(connect("loop0")), read(connect("loop1"))) == (b"f" * 512, b"o" * 512)


@pytest.mark.parametrize(
    ("words", "name"),
    [(("loop7",), "loop7"), (("/dev/loop3",), "loop3"), (("my disk",), "my disk"), (("--name", "x", "-f"), "x")],
)
def test_a_name_of_ones_own(loop: Loop, client: Client, file: Path, words: tuple[str, ...], name: str) -> None:
    assert loop("--show", *words, file) == f"{name}\n"
    assert names(client) == [name]
    assert "Device or resource busy" in loop.fails(*words, file)


def test_offset_and_size_limit_choose_a_piece_of_the_file(
    loop: Loop, client: Client, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    file.write_bytes(b"a" * 1024 + b"b" * 2048 + b"c" * 5120)
    loop("-f", "-o", "1K", "--sizelimit", "2KiB", file)
    assert client.table("loop0") == f"0 4 loop {file} 1024"
    assert info(client, "loop0").size == 2048
    assert read(connect("loop0"), 0, 2048) == b"b" * 2048
    assert cells(loop("-n", "-l", "-O", "OFFSET,SIZELIMIT", "loop0")) == ["1024", "2048"]


def test_the_end_of_a_file_that_is_no_whole_sector_is_told(loop: Loop, client: Client, tmp_path: Path) -> None:
    odd = tmp_path / "odd.img"
    odd.write_bytes(bytes(1500))
    done = loop.run("-f", "--show", odd)
    assert (done.returncode, done.stdout) == (0, "loop0\n")
    assert done.stderr == (
        f"blkloom: {odd}: Warning: file does not end on a 512-byte sector boundary; "
        "the remaining end of the file will be ignored.\n"
    )
    assert info(client, "loop0").size == 1024


def test_a_file_without_one_whole_sector_is_refused(loop: Loop, client: Client, tmp_path: Path) -> None:
    small = tmp_path / "small.img"
    small.write_bytes(bytes(511))
    said = loop.fails("-f", small)
    assert said.startswith(f"blkloom: {small}: failed to set up loop device: Invalid argument\n")
    assert "it has 511 bytes" in said
    assert client.info() == []


def test_a_read_only_device(loop: Loop, file: Path, connect: Callable[[str], NbdClient]) -> None:
    loop("-r", "-f", file)
    nbd = connect("loop0")
    assert nbd.flags & READ_ONLY
    assert nbd.ask(WRITE, 0, payload=bytes(512)).error
    assert cells(loop("-n", "-l", "-O", "RO", "loop0")) == ["1"]


@contextmanager
def unwritable(file: Path) -> Iterator[None]:
    """A file that no user may write to, not even root."""
    if os.geteuid() != 0:
        file.chmod(0o400)
        yield
        return
    with file.open("rb") as opened:
        try:
            fcntl.ioctl(opened, _SET_FLAGS, struct.pack("l", _IMMUTABLE))
        except OSError as error:
            pytest.skip(f"files cannot be made immutable here: {error}")
        try:
            yield
        finally:
            fcntl.ioctl(opened, _SET_FLAGS, struct.pack("l", 0))


def test_a_file_that_is_not_writable_makes_a_read_only_device_and_that_is_said(
    loop: Loop, client: Client, file: Path
) -> None:
    with unwritable(file):
        done = loop.run("-f", "--show", file)
        assert (done.returncode, done.stdout) == (0, "loop0\n")
        reason = os.strerror(13 if os.geteuid() else 1)
        assert f"{file}: Warning: cannot be written to ({reason}); the loop device is read-only." in done.stderr
        assert info(client, "loop0").read_only
        assert cells(loop("-n", "-l", "-O", "RO", "loop0")) == ["1"]
        loop("-d", "loop0")


@pytest.mark.parametrize("name", ["two words", "back\\slash", "a#b,c;d", "tab\there", "-f", "ä日"])
def test_odd_names_of_files(loop: Loop, client: Client, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(4096))
    assert loop("-f", "--show", path) == "loop0\n"
    (device,) = json.loads(loop("-J"))["loopdevices"]
    assert device["back-file"] == str(path)
    assert loop("-a").partition(": ")[2].endswith(f"({path})\n")
    assert loop("-j", path) == loop("-a") != ""
    with path.open("ab") as file:
        file.truncate(8192)
    loop("-c", "loop0")
    assert info(client, "loop0").size == 8192


def test_a_name_with_a_newline_is_refused_and_a_link_to_it_is_not(loop: Loop, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "new\nline"
    path.write_bytes(bytes(4096))
    said = loop.fails("-f", path)
    assert f"blkloom: {path}: failed to set up loop device: Invalid argument\n" in said
    assert "a table cannot hold a newline" in said
    assert "link to it" in said
    link = tmp_path / "link"
    link.symlink_to(path)
    assert loop("-f", "--show", link) == "loop0\n"
    assert loop("-j", path).endswith(f"({path})\n")


def test_several_that_look_for_a_free_name_at_once_get_one_each(
    loop: Loop, client: Client, blkloom: str, life: Life, tmp_path: Path
) -> None:
    paths = [tmp_path / str(number) for number in range(4)]
    for path in paths:
        path.write_bytes(bytes(512))
    environment = {**os.environ, "BLKLOOM_RUN_DIR": str(life.run_dir)}
    command = [blkloom, "loop", "--no-attach", "-f", "--show"]
    running = [subprocess.Popen([*command, path], env=environment, stdout=subprocess.PIPE, text=True) for path in paths]
    assert sorted(process.communicate(timeout=60)[0].strip() for process in running) == [
        f"loop{number}" for number in range(4)
    ]
    assert {process.returncode for process in running} == {0}


def test_what_has_no_whole_block_is_refused_with_what_gives_it_one(loop: Loop, file: Path, tmp_path: Path) -> None:
    said = loop.fails("-f", "--sizelimit", "100", file)
    assert "from byte 0 on up to a limit of 100" in said
    assert "give --sizelimit 512 or more" in said
    assert "truncate" not in said, "it would cut the file off"
    short = tmp_path / "short"
    short.write_bytes(b"s" * 100)
    assert "make it longer (truncate -s 1536)" in loop.fails("-f", "-o", "1024", short)


def test_several_that_want_the_same_piece_of_a_file_at_once_get_one_device(
    client: Client, blkloom: str, life: Life, file: Path
) -> None:
    environment = {**os.environ, "BLKLOOM_RUN_DIR": str(life.run_dir)}
    command = [blkloom, "loop", "--no-attach", "-L", "-f", "--show", str(file)]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(6)
    ]
    assert [process.communicate(timeout=120)[0] for process in running] == ["loop0\n"] * 6
    assert names(client) == ["loop0"]


def test_nooverlap_uses_the_device_there_is_and_refuses_what_overlaps(
    loop: Loop, client: Client, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    loop("-f", "-o", "1024", "--sizelimit", "2048", file)
    nbd = connect("loop0")
    assert read(nbd)
    loop("-d", "loop0")  # when the client has gone
    assert info(client, "loop0").deferred
    assert loop("-L", "-f", "--show", "-o", "1024", "--sizelimit", "2048", file) == "loop0\n"
    assert not info(client, "loop0").deferred
    for piece in (("-o", "0"), ("-o", "2560"), ("--sizelimit", "1025"), ("-o", "3071", "--sizelimit", "1")):
        said = loop.fails("-L", "-f", *piece, file)
        assert said == f"blkloom: {file}: overlapping loop device exists\nblkloom: it is loop0\n"
    assert loop("-L", "-f", "--show", "--shared", "-o", "3072", file) == "loop1\n"


def test_a_file_in_use_is_refused_unless_it_is_shared(loop: Loop, client: Client, file: Path) -> None:
    loop("-f", file)
    said = loop.fails("-f", file)
    assert said.startswith(f"blkloom: {file}: failed to set up loop device: ")
    assert "in use by device 'loop0'; blkloom loop -d loop0 ends that" in said
    assert loop("-f", "--show", "--shared", file) == "loop1\n"
    loop("-c", "loop1")


# the table


def test_the_table_is_by_number(loop: Loop, file: Path, tmp_path: Path) -> None:
    for number in (10, 9, 2):
        path = tmp_path / str(number)
        path.write_bytes(bytes(512))
        loop(f"loop{number}", path)
    assert loop() == (
        "NAME   SIZELIMIT OFFSET AUTOCLEAR RO "
        + "BACK-FILE".ljust(len(str(tmp_path)) + 3)
        + " DIO LOG-SEC\n"
        + "".join(
            f"{f'loop{n}':6}         0      0         0  0 {tmp_path / str(n)!s:{len(str(tmp_path)) + 3}}   0     512\n"
            for n in (2, 9, 10)
        )
    )
    assert loop("-a") == loop("-j", tmp_path / "2") + loop("loop9") + loop("/dev/loop10")


def test_no_devices_are_no_lines_and_an_empty_list(loop: Loop) -> None:
    assert loop() == loop("-l") == loop("-a") == loop("--raw") == loop("-D") == ""
    assert loop("-J") == '{\n   "loopdevices": [\n\n   ]\n}\n'


def test_columns_of_ones_choice(loop: Loop, life: Life, client: Client, file: Path) -> None:
    loop("-f", file)
    status = file.stat()
    shown = json.loads(loop("-J", "--output-all"))["loopdevices"][0]
    assert shown == {
        "autoclear": False,
        "back-file": str(file),
        "back-ino": status.st_ino,
        "back-maj:min": f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}",
        "name": "loop0",
        "offset": 0,
        "partscan": False,
        "ro": False,
        "sizelimit": 0,
        "maj:min": f"0:{info(client, 'loop0').minor}",
        "dio": False,
        "log-sec": 512,
        "node": None,
        "socket": str(life.socket("loop0")),
        "mode": "file",
    }
    assert cells(loop("-n", "-O", "name,Mode")) == ["loop0", "file"]
    assert loop("-l", "-O", "+SOCKET").splitlines()[0].endswith("DIO LOG-SEC SOCKET")
    assert loop("--raw", "-n", "-O", "SOCKET", "loop0") == f"{life.socket('loop0')}\n"


def test_associated_finds_by_file_and_offset(loop: Loop, file: Path, tmp_path: Path) -> None:
    loop("-f", "--shared", file)
    loop("-f", "--shared", "-o", "512", file)
    link = tmp_path / "link"
    link.symlink_to(file)
    assert len(loop("-j", link).splitlines()) == 2
    assert loop("-j", file, "-o", "512").startswith("loop1: ")
    assert loop("-l", "-n", "-O", "NAME", "-j", file, "-o", "512") == "loop1\n"
    assert loop("-j", tmp_path / "other") == ""


# changes


def test_the_capacity_follows_the_file_and_clients_stay(
    loop: Loop, client: Client, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    loop("-f", file)
    nbd = connect("loop0")
    assert read(nbd) == b"f" * 512
    with file.open("ab") as grown:
        grown.write(b"g" * 8192)
    assert info(client, "loop0").size == 8192
    loop("-c", "loop0")
    assert info(client, "loop0").size == 16384
    assert read(nbd, 8192) == b"g" * 512  # by the client that was there
    os.truncate(file, 4096)
    loop("-c", "loop0")
    assert info(client, "loop0").size == 4096
    assert read(nbd) == b"f" * 512


def test_the_size_limit_outlives_a_growing_file(loop: Loop, client: Client, file: Path) -> None:
    loop("-f", "--sizelimit", "12K", file)
    assert info(client, "loop0").size == 8192
    os.truncate(file, 65536)
    loop("-c", "loop0")
    assert info(client, "loop0").size == 12288


def test_a_file_that_has_nothing_left_keeps_its_device_as_it_was(loop: Loop, client: Client, file: Path) -> None:
    loop("-f", file)
    os.truncate(file, 0)
    said = loop.fails("-c", "loop0")
    assert said.startswith("blkloom: loop0: set capacity failed: Invalid argument\n")
    assert (info(client, "loop0").size, info(client, "loop0").inactive) == (8192, False)


def test_the_file_of_a_live_read_only_device_is_changed(
    loop: Loop, client: Client, file: Path, tmp_path: Path, connect: Callable[[str], NbdClient]
) -> None:
    new = tmp_path / "new.img"
    new.write_bytes(b"n" * 8192)
    loop("-f", "-r", file)
    nbd = connect("loop0")
    assert read(nbd) == b"f" * 512
    loop("--change", new, "loop0")
    assert read(nbd) == b"n" * 512
    assert loop("-n", "-O", "BACK-FILE") == f"{new}\n"
    new.write_bytes(b"n" * 8191)
    said = loop.fails("--change", new, "loop0")
    assert said.startswith("blkloom: loop0: change of the backing file failed: Invalid argument\n")
    assert "would have 7680 bytes, and has 8192" in said
    assert "No such file or directory" in loop.fails("--change", tmp_path / "none", "loop0")


def test_the_file_of_a_writable_device_is_not_changed(loop: Loop, file: Path, tmp_path: Path) -> None:
    new = shutil.copy(file, tmp_path / "new.img")
    loop("-f", file)
    assert "its contents would change under its clients" in loop.fails("--change", new, "loop0")


def test_direct_io_is_turned_on_and_off(loop: Loop, client: Client, file: Path) -> None:
    loop("-f", "--direct-io", file)
    assert client.table("loop0") == f"0 16 loop {file} 0 1 direct_io"
    loop("--direct-io=off", "loop0")
    assert client.table("loop0") == f"0 16 loop {file}"
    loop("--direct-io=on", "loop0")
    assert client.table("loop0") == f"0 16 loop {file} 0 1 direct_io"


# the end


def test_detach_removes_and_a_device_in_use_goes_with_its_last_client(
    loop: Loop, client: Client, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    loop("-f", file)
    nbd = connect("loop0")
    loop("-d", "loop0")
    assert cells(loop("-n", "-l", "-O", "AUTOCLEAR", "loop0")) == ["1"]
    assert read(nbd) == b"f" * 512
    nbd.disconnect()
    until_gone(client, "loop0")
    said = loop.fails("-d", "loop0")
    assert said.startswith("blkloom: loop0: failed to use device: No such device\n")


def test_one_that_cannot_be_detached_does_not_keep_the_others(loop: Loop, client: Client, file: Path) -> None:
    loop("-f", file)
    client.create("disk", table="0 8 zero")
    said = loop.fails("-d", "none", "disk", "loop0")
    assert "blkloom: none: failed to use device: No such device" in said
    assert "blkloom: disk: failed to use device: Inappropriate ioctl for device" in said
    assert names(client) == ["disk"]


def test_detach_all_takes_loop_devices_only(loop: Loop, client: Client, file: Path) -> None:
    loop("-f", "--shared", file)
    loop("-f", "--shared", "-P", file)
    client.create("disk", table="0 8 zero")
    loop("-D")
    assert names(client) == ["disk"]


# help


def test_help_names_every_option(loop: Loop) -> None:
    from blkloom.cli.loop_options import LOSETUPS, OURS

    told = loop("--help")
    assert {name for name in (*LOSETUPS, *OURS) if f"--{name}" not in told} <= {"verbose", "version"}
    assert loop("-h") == told
    assert loop("--version").startswith("blkloom loop from blkloom ")
