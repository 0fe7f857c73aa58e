"""`blkloom loop` on a real supervisor: what losetup's users expect of it, and beside losetup itself."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from blkloom.control.client import Client
from conformance.file_systems import EXT4, made_on_a_device, needs_root
from conformance.nbd_client import READ_ONLY, WRITE, NbdClient
from partition_images import mbr

from .conftest import Life, info, read

pytestmark = pytest.mark.timeout(180)
MIB = 1 << 20
_SET_FLAGS, _IMMUTABLE = 0x40086602, 0x10
"""FS_IOC_SETFLAGS, FS_IMMUTABLE_FL of linux/fs.h."""


@pytest.fixture
def life(shared: Life) -> Life:
    """The module's."""
    return shared


@dataclass(frozen=True)
class Loop:
    """`blkloom loop ...` as a process."""

    command: str
    run_dir: Path

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Whatever comes of it."""
        return subprocess.run(
            [self.command, "loop", *map(str, words)],
            env={**os.environ, "BLKLOOM_RUN_DIR": str(self.run_dir), "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=60,
            check=False,
        )

    def __call__(self, *words: str | Path) -> str:
        """What it prints; it succeeds and complains of nothing."""
        done = self.run(*words)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def fails(self, *words: str | Path) -> str:
        """What it says; it fails as losetup does and prints nothing."""
        done = self.run(*words)
        assert (done.returncode, done.stdout) == (1, "")
        return done.stderr


@pytest.fixture
def loop(blkloom: str, life: Life) -> Loop:
    """The command."""
    return Loop(blkloom, life.run_dir)


def cells(line: str) -> list[str]:
    return line.split()


def names(client: Client) -> list[str]:
    return sorted(device.name for device in client.info())


def until_gone(client: Client, *gone: str) -> None:
    """Waits for devices to go by themselves."""
    while {device.name for device in client.info()} & set(gone):
        pass


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
    """A file that nobody may write to, not even root."""
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
    assert loop("-j", path).endswith(f"({link})\n")


def test_several_that_look_for_a_free_name_at_once_get_one_each(
    loop: Loop, client: Client, blkloom: str, life: Life, tmp_path: Path
) -> None:
    paths = [tmp_path / str(number) for number in range(4)]
    for path in paths:
        path.write_bytes(bytes(512))
    environment = {**os.environ, "BLKLOOM_RUN_DIR": str(life.run_dir)}
    running = [
        subprocess.Popen([blkloom, "loop", "-f", "--show", path], env=environment, stdout=subprocess.PIPE, text=True)
        for path in paths
    ]
    assert sorted(process.communicate(timeout=60)[0].strip() for process in running) == [
        f"loop{number}" for number in range(4)
    ]
    assert {process.returncode for process in running} == {0}


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
    assert "in use" in said or "busy" in said
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


# beside losetup


@pytest.fixture
def losetup(program: Callable[[str, str], str]) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """The real one; devices of its making go after the test."""
    path = program("losetup", "mount")
    needs_root("losetup")
    made: list[str] = []

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["losetup", *map(str, words)],
            executable=path,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            check=False,
        )
        if "--show" in words and done.returncode == 0:
            made.append(done.stdout.strip())
        return done

    yield run
    for device in made:
        subprocess.run([path, "-d", device], check=True)


SAME = "SIZELIMIT,OFFSET,AUTOCLEAR,RO,BACK-FILE,DIO,LOG-SEC,BACK-INO,PARTSCAN"


@pytest.mark.parametrize("form", [(), ("-n",), ("--raw",), ("--raw", "-n"), ("-J",)])
@pytest.mark.parametrize("setup", [(), ("-r", "-o", "512", "--sizelimit", "4K"), ("--sizelimit=1KB",)])
@pytest.mark.parametrize("name", ["plain.img", "a b\\c \\x20\t\x01ä.img"])
def test_lists_are_those_of_losetup(
    loop: Loop,
    losetup: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    name: str,
    setup: tuple[str, ...],
    form: tuple[str, ...],
) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(8192))
    device = losetup("-f", "--show", *setup, path).stdout.strip()
    # Older ones pad the numbers of devices in the other forms too.
    columns = SAME + (",BACK-MAJ:MIN" if form in ((), ("-n",)) else "")
    kernel = losetup("-l", "-O", columns, *form, device).stdout
    kernel_line = losetup(device).stdout
    if setup == ("--sizelimit=1KB",):
        assert loop.run("--shared", *setup, "loop0", path).returncode == 0
    else:
        loop("--shared", *setup, "loop0", path)
    ours = loop("-l", "-O", columns, *form, "loop0")
    assert ours == kernel
    assert loop("loop0") == kernel_line.replace(device, "loop0")


SAID = [
    ("-f", "--show", "nosuch"),
    ("-f", "/"),
    ("-o", "x", "-f", "a"),
    ("-o", "-1", "-f", "a"),
    ("--sizelimit", "1Q", "-f", "a"),
    ("-b", "x", "-f", "a"),
    ("--raw", "-J"),
    ("-l", "-O", "FOO"),
    ("-f", "a", "b"),
    ("-r",),
    ("-r", "DEVICE"),
    ("-P", "DEVICE"),
    ("-o", "512", "DEVICE"),
    ("-a", "-o", "512"),
    ("-f", "-r"),
    ("--direct-io=foo", "DEVICE"),
    ("--foo",),
    ("--all=1",),
    ("-Z",),
    ("-o",),
    ("--offset",),
    ("-d", "/dev/loop7777"),
    ("-c", "/dev/loop7777"),
    ("/dev/loop7777",),
    ("-l", "/dev/loop7777"),
    ("DEVICE", "FILE"),
]


@pytest.mark.parametrize("words", SAID, ids=" ".join)
def test_what_is_wrong_is_said_in_the_words_of_losetup(
    loop: Loop, losetup: Callable[..., subprocess.CompletedProcess[str]], file: Path, words: tuple[str, ...]
) -> None:
    device = losetup("-f", "--show", file).stdout.strip()
    loop("--shared", "loop0", file)

    def with_names(device: str) -> list[str]:
        return [{"DEVICE": device, "FILE": str(file)}.get(word, word) for word in words]

    kernel = losetup(*with_names(device))
    ours = loop.run(*with_names("loop0"))
    assert kernel.returncode == ours.returncode == 1
    first, *rest = ours.stderr.splitlines()
    kernel_first, *kernel_rest = kernel.stderr.splitlines()
    assert first.removeprefix("blkloom: ").replace("loop0", device) == kernel_first.removeprefix("losetup: ")
    if kernel_rest:
        assert rest[0] == kernel_rest[0].replace("losetup", "blkloom loop")


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


def test_a_block_map_is_shown_as_the_mode_and_its_partitions_are_found(
    loop: Loop, client: Client, program: Callable[[str, str], str], partitioned: Path, tmp_path: Path
) -> None:
    with made_on_a_device(program, EXT4, 512, tmp_path) as (place, _), ExitStack() as stack:
        stack.callback(client.remove_all, force=True)
        path = place / "disk.img"
        path.write_bytes(partitioned.read_bytes())  # without holes
        assert loop("-f", "--show", "-P", "--block-map", path) == "loop0\n"
        assert cells(loop("-n", "-O", "MODE,DIO", "loop0")) == ["block_map", "0"]
        assert sorted(tables(client)) == ["loop0p1", "loop0p2", "loop0p3", "loop0p5"]
        loop("-c", "loop0")
        assert cells(loop("-n", "-O", "MODE", "loop0")) == ["block_map"]
        loop("-d", "loop0")
        assert client.info() == []
        path.write_bytes(bytes(4096))
        os.truncate(path, 8192)
        said = loop.fails("-f", "--block-map", path)
        assert said.startswith(f"blkloom: {path}: failed to set up loop device: ")
        assert "block map is not possible" in said


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


# partitions


@pytest.fixture
def partitioned(tmp_path: Path) -> Path:
    """A disk of 1 MiB with partition 1, an extended one with 5, and 3; each full of its number."""
    return write_partitions(tmp_path / "disk.img", {1: (64, 64), 2: (256, 256), 3: (1024, 512), 5: (272, 32)})


def write_partitions(path: Path, partitions: dict[int, tuple[int, int]]) -> Path:
    """Start and length in sectors; 2 is the extended one."""
    data = bytearray(path.read_bytes() if path.exists() else bytes(MIB))
    primary = [partitions.get(number, (0, 0)) for number in (1, 2, 3, 4)]
    data[:512] = mbr(*((0, 5 if number == 2 else 0x83, *piece) for number, piece in enumerate(primary, 1)))
    for number, (start, length) in partitions.items():
        if number != 2:
            data[start * 512 : (start + length) * 512] = b"%d" % number * (length * 512)
    if 5 in partitions:
        record = partitions[2][0]
        data[record * 512 : record * 512 + 512] = mbr((0, 0x83, partitions[5][0] - record, partitions[5][1]))
    path.write_bytes(data)
    return path


def tables(client: Client) -> dict[str, str]:
    """Of the partitions."""
    return {device.name: client.table(device.name) for device in client.info() if device.deps[0].startswith("blkloom:")}


def test_partitions_are_devices_that_stand_on_theirs_and_go_before_it(
    loop: Loop, client: Client, partitioned: Path, connect: Callable[[str], NbdClient]
) -> None:
    assert loop("-P", "-f", "--show", partitioned) == "loop0\n"
    assert tables(client) == {
        "loop0p1": "0 64 linear blkloom:loop0 64",
        "loop0p2": "0 2 linear blkloom:loop0 256",
        "loop0p3": "0 512 linear blkloom:loop0 1024",
        "loop0p5": "0 32 linear blkloom:loop0 272",
    }
    clients = [connect(f"loop0p{number}") for number in (1, 3, 5)]
    assert [read(nbd) for nbd in clients] == [b"1" * 512, b"3" * 512, b"5" * 512]
    assert cells(loop("-n", "-O", "NAME,PARTSCAN")) == ["loop0", "1"]
    assert "a partition" in loop.fails("-d", "loop0p1")
    loop("-d", "loop0")
    assert names(client) == ["loop0", "loop0p1", "loop0p3", "loop0p5"]  # these have clients
    for nbd in clients:
        nbd.disconnect()
    until_gone(client, "loop0", "loop0p1", "loop0p3", "loop0p5")


def test_partitions_of_a_read_only_device_are_read_only(
    loop: Loop, partitioned: Path, connect: Callable[[str], NbdClient]
) -> None:
    loop("-r", "-P", "--name", "disk", "-f", partitioned)
    assert connect("disk1").flags & READ_ONLY


def test_partitions_are_found_at_the_block_size_there_is_and_without_a_client_noticed(
    loop: Loop, client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(mbr((0, 0x83, 2, 3)).ljust(MIB, b"\0"))
    loop("-P", "-f", "-b", "4096", "--autoclear", path)
    assert tables(client) == {"loop0p1": "0 24 linear blkloom:loop0 16"}
    assert info(client, "loop0").size == MIB


def test_set_capacity_reads_partitions_again_and_leaves_the_right_ones_alone(
    loop: Loop, client: Client, partitioned: Path, connect: Callable[[str], NbdClient]
) -> None:
    loop("-P", "-f", partitioned)
    nbd = connect("loop0p1")
    number = info(client, "loop0p1").minor
    write_partitions(partitioned, {1: (64, 64), 3: (1024, 600), 4: (1800, 100)})
    loop("-c", "loop0")
    assert tables(client) == {
        "loop0p1": "0 64 linear blkloom:loop0 64",
        "loop0p3": "0 600 linear blkloom:loop0 1024",
        "loop0p4": "0 100 linear blkloom:loop0 1800",
    }
    assert info(client, "loop0p1").minor == number
    assert read(nbd) == b"1" * 512
    os.truncate(partitioned, 1024 * 512)
    done = loop.run("-c", "loop0")
    assert (done.returncode, done.stderr.count("is beyond the end of the device")) == (0, 2)
    assert sorted(tables(client)) == ["loop0p1"]
    assert read(nbd) == b"1" * 512


def test_a_partition_in_use_that_should_be_another_is_kept_and_that_is_said(
    loop: Loop, client: Client, partitioned: Path, connect: Callable[[str], NbdClient]
) -> None:
    loop("-P", "-f", partitioned)
    nbd = connect("loop0p1")
    assert read(nbd) == b"1" * 512
    write_partitions(partitioned, {1: (32, 64)})
    said = loop.fails("-c", "loop0")
    assert said.startswith("blkloom: loop0: failed to reread partitions: Device or resource busy\n")
    assert len(tables(client)) == 4
    assert tables(client)["loop0p1"] == "0 64 linear blkloom:loop0 64"
    nbd.disconnect()
    while info(client, "loop0p1").connections:
        pass
    loop("-c", "loop0")
    assert tables(client) == {"loop0p1": "0 64 linear blkloom:loop0 32"}


def test_what_is_wrong_with_a_partition_table_is_told_and_the_device_stays(
    loop: Loop, client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(mbr((0, 0x83, 64, 64), (0, 0x83, 9999, 1), (0, 0x83, 2000, 100)).ljust(MIB, b"\0"))
    done = loop.run("-P", "-f", "--show", path)
    assert (done.returncode, done.stdout) == (0, "loop0\n")
    assert done.stderr.splitlines() == [
        "blkloom: loop0: partition 2: start 9999 is beyond the end of the device; left out",
        "blkloom: loop0: partition 3: size 100 extends beyond the end of the device; truncated",
    ]
    assert sorted(tables(client)) == ["loop0p1", "loop0p3"]


def test_a_name_without_a_digit_at_its_end_needs_no_p(loop: Loop, client: Client, partitioned: Path) -> None:
    loop("-P", "disk", partitioned)
    assert sorted(tables(client)) == ["disk1", "disk2", "disk3", "disk5"]


# help


def test_help_names_every_option(loop: Loop) -> None:
    from blkloom.cli.loop_options import LOSETUPS, OURS

    told = loop("--help")
    assert {name for name in (*LOSETUPS, *OURS) if f"--{name}" not in told} <= {"verbose", "version"}
    assert loop("-h") == told
    assert loop("--version").startswith("blkloom loop from blkloom ")
