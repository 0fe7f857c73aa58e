"""`blkloom save` and `restore`: devices come back as they were, in the order of their stacking; what exists is not
changed; an error concerns one device and those above it.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from blkloom import Fault
from blkloom.control.client import Client
from certificates import pre_shared_keys
from conformance.nbd_client import WRITE, NbdClient

from .conftest import Life, until

pytestmark = pytest.mark.timeout(120)
Connect = Callable[[str], NbdClient]
CHUNK = 4096


class Commands:
    """The command, with a directory of device files."""

    def __init__(self, blkloom: str, life: Life, folder: Path) -> None:
        self._blkloom, self._life = blkloom, life
        self.folder = folder / "devices.d"

    def __call__(self, verb: str, *words: str) -> tuple[int, list[str], str]:
        """Exit status, lines of output, error messages."""
        command = [self._blkloom, verb, "--directory", str(self.folder), *words]
        environment = os.environ | {"BLKLOOM_RUN_DIR": str(self._life.run_dir)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd="/")
        return done.returncode, done.stdout.splitlines(), done.stderr

    def succeed(self, verb: str, *words: str) -> list[str]:
        """Lines of output."""
        status, out, err = self(verb, *words)
        assert (status, err) == (0, "")
        return out

    def files(self) -> dict[str, str]:
        """Text of the files, by name."""
        return {path.name: path.read_text() for path in self.folder.iterdir()}


@pytest.fixture
def commands(blkloom: str, life: Life, tmp_path: Path) -> Commands:
    return Commands(blkloom, life, tmp_path)


def remove_all(client: Client) -> None:
    assert client.remove_all() == []


def tables(client: Client) -> dict[str, str]:
    return {info.name: client.table(info.name) for info in client.info()}


def make_stack(client: Client, folder: Path) -> None:
    """Devices of all kinds, named so that the order of their names is not that of their stacking."""
    for name in ("disk.img", "other.img"):
        (folder / name).write_bytes(bytes(1 << 20))
    client.create("z low", table=f"0 2048 loop {folder}/disk.img 0 1 direct_io", uuid="Z", read_only=True)
    client.create("m", table="0 1024 linear blkloom:z\\ low 0\n1024 8 error", read_only=True)
    client.create("a", table=f"0 1024 linear {client.run_dir.devices}/m 0", read_only=True)
    client.create("o", table=f"0 2048 striped 1 8 {folder}/other.img 0", shared=True)
    client.create("memory", table="0 4096 ram", minor=77)


def test_devices_come_back_with_their_tables_options_and_exports(
    commands: Commands, client: Client, tmp_path: Path
) -> None:
    make_stack(client, tmp_path)
    client.export("o", unix=str(tmp_path / "o.sock"), name="other")
    client.export("o", host="127.0.0.1", read_only=True)
    before, tables_before = client.info(), tables(client)
    out = commands.succeed("save")
    assert f"{commands.folder}/memory.table: written, which does not have the bytes of its memory" in out
    assert commands.files()["memory.table"].startswith("# Its memory is not saved: it comes back empty.\n")
    remove_all(client)
    out = commands.succeed("restore")
    assert out.index("z low: made") < out.index("m: made") < out.index("a: made")
    assert "memory: made, empty: its memory was not saved" in out
    assert tables(client) == tables_before
    after = {info.name: info for info in client.info()}
    for info in before:
        found = after[info.name]
        assert (found.uuid, found.read_only, found.shared, found.size) == (
            info.uuid, info.read_only, info.shared, info.size
        )  # fmt: skip
        assert {(e.name, e.unix, e.port, e.read_only) for e in found.exports} == {
            (e.name, e.unix, e.port, e.read_only) for e in info.exports
        }
    files = commands.files()
    assert all(line.endswith(": unchanged") for line in commands.succeed("save"))
    assert commands.files() == files


def write(client: Client, connect: Connect, device: str, chunk: int, byte: bytes) -> None:
    """Fills a chunk, by a client that has left afterwards."""
    nbd = connect(device)
    assert nbd.ask(WRITE, chunk * CHUNK, payload=byte * CHUNK).error == 0
    nbd.disconnect()
    until(client, device, lambda found: found.connections == 0)


def seen(client: Client, device: str) -> str:
    """The first byte of each of five chunks."""
    return client.read(device, 0, 5 * CHUNK)[::CHUNK].replace(b"\0", b".").decode()


def make_snapshots(client: Client, connect: Connect, folder: Path) -> dict[str, str]:
    """A disk with two snapshots, of which one has a snapshot and a fault; some of their names are before those of what
    they need. Returns what each contains.
    """
    (folder / "disk.img").write_bytes(bytes(1 << 20))
    client.create("disk", table=f"0 2048 loop {folder}/disk.img")
    write(client, connect, "disk", 0, b"a")
    client.snapshot("disk", "z", file=folder / "z.cow", chunk=CHUNK)
    write(client, connect, "disk", 1, b"b")
    client.snapshot("disk", "after", file=folder / "after.cow", chunk=CHUNK)
    write(client, connect, "disk", 0, b"A")
    client.snapshot("after", "again", file=folder / "again.cow", chunk=CHUNK)
    write(client, connect, "after", 2, b"c")
    client.fault("after", Fault.bad_blocks([(40, 8)]))
    return {name: seen(client, name) for name in ("disk", "z", "after", "again")}


def shapes(client: Client) -> dict[str, tuple[str, str, bool]]:
    return {info.name: (info.uuid, info.fault, info.autoclear) for info in client.info()}


def test_snapshots_layers_and_faults_come_back_as_they_were(
    commands: Commands, life: Life, client: Client, connect: Connect, tmp_path: Path
) -> None:
    contents = make_snapshots(client, connect, tmp_path)
    assert contents == {"disk": "Ab...", "z": "a....", "after": "abc..", "again": "ab..."}
    commands.succeed("save")
    before = tables(client), shapes(client)
    life.stop()
    life.start()
    client = Client(life.run_dir, start=False)
    out = commands.succeed("restore")
    assert out.index("disk: made") > max(out.index(f"{name}: made") for name in ("z", "after-real"))
    assert (tables(client), shapes(client)) == before
    assert {name: seen(client, name) for name in contents} == contents
    assert all(line.endswith(": there already") for line in commands.succeed("restore"))
    assert all(line.endswith(": unchanged") for line in commands.succeed("save"))

    write(client, connect, "disk", 3, b"d")
    assert {name: seen(client, name) for name in ("z", "again")} == {"z": "a....", "again": "ab..."}
    with pytest.raises(OSError, match="Input/output"):
        client.read("after", 40 * 512, 512)
    client.fault("after", None)
    assert client.read("after", 40 * 512, 512) == bytes(512)
    refused = connect("disk-real").ask(WRITE, 0, payload=b"x" * 512).error
    assert refused, "clients may only read a lower device"
    client.delete_snapshot("again")
    client.close()


def test_a_merge_goes_on_after_a_restore(commands: Commands, client: Client, connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    client.create("disk", table=f"0 2048 loop {tmp_path}/disk.img")
    client.snapshot("disk", "before", file=tmp_path / "before.cow", chunk=CHUNK)
    client.snapshot("disk", "other", file=tmp_path / "other.cow", chunk=CHUNK)
    write(client, connect, "before", 2, b"c")
    client.merge_snapshot("before")
    commands.succeed("save")
    assert "snapshot-merge" in commands.files()["disk.table"]
    remove_all(client)
    commands.succeed("restore")
    assert (seen(client, "disk"), seen(client, "other")) == ("..c..", ".....")
    client.finish_merge("disk")
    assert client.table("disk") == "0 2048 snapshot-origin blkloom:disk-real"
    assert (seen(client, "disk"), seen(client, "other")) == ("..c..", ".....")


def test_an_origin_is_not_written_to_without_its_snapshots(
    commands: Commands, client: Client, connect: Connect, tmp_path: Path
) -> None:
    contents = make_snapshots(client, connect, tmp_path)
    commands.succeed("save")
    remove_all(client)
    (tmp_path / "z.cow").rename(tmp_path / "moved")
    status, _, err = commands("restore")
    assert status == 1
    assert "blkloom: disk: device 'disk' would overwrite what its snapshot 'z' needs, which is not there" in err
    assert "see its error; to give the snapshot up, delete the file of 'z'" in err
    assert "disk" not in {info.name for info in client.info()}
    (tmp_path / "moved").rename(tmp_path / "z.cow")
    status, _, err = commands("restore", "disk-real", "disk")
    assert (status, "'z' needs, which is not there" in err, "restore both" in err) == (1, True, True)
    commands.succeed("restore")
    assert {name: seen(client, name) for name in contents} == contents
    client.remove("z", retry=True)
    write(client, connect, "disk", 0, b"?")
    status, _, err = commands("restore")
    assert status == 1
    assert "z: device 'disk' writes to the origin of 'z', which misses what was overwritten" in err
    (commands.folder / "z.table").unlink()
    commands.succeed("restore")


def test_a_snapshot_that_is_partly_in_memory_is_not_saved(commands: Commands, client: Client, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    client.create("disk", table=f"0 2048 loop {tmp_path}/disk.img")
    client.snapshot("disk", "before")
    client.create("memory", table="0 2048 ram")
    client.snapshot("memory", "of-memory", file=tmp_path / "cow")
    (tmp_path / "n.cow").write_bytes(bytes(1 << 20))
    client.create("transient", table=f"0 2048 snapshot blkloom:disk-real {tmp_path}/n.cow N 8")
    status, _, err = commands("save")
    assert status == 1
    assert set(commands.files()) == {f"{name}.table" for name in ("disk", "disk-real", "memory", "memory-real")}
    assert "before: not saved: the snapshot 'before' is only in memory: blkloom:before-cow" in err
    assert "before-cow: not saved: device 'before-cow' is the store of 'before' in memory" in err
    assert "of-memory: not saved: the origin of the snapshot 'of-memory' is only in memory" in err
    assert "transient: not saved: the snapshot 'transient' has the kind N: its exceptions are only in memory" in err


def test_a_second_restore_changes_nothing(commands: Commands, client: Client, tmp_path: Path) -> None:
    make_stack(client, tmp_path)
    commands.succeed("save")
    before = client.info()
    assert commands.succeed("restore") == [f"{name}: there already" for name in ("memory", "o", "z low", "m", "a")]
    assert client.info() == before


def test_what_is_missing_is_added(commands: Commands, client: Client, tmp_path: Path) -> None:
    make_stack(client, tmp_path)
    path = str(tmp_path / "o.sock")
    client.export("o", unix=path)
    commands.succeed("save", "o")
    client.unexport("o", path)
    assert commands.succeed("restore") == [f"o: exported at {path}"]
    assert path in [export.unix for export in client.info("o")[0].exports]


def test_a_device_that_differs_is_reported_and_not_changed(commands: Commands, client: Client) -> None:
    client.create("a", table="0 8 zero")
    client.create("b", table="0 8 zero")
    commands.succeed("save")
    remove_all(client)
    client.create("a", table="0 16 zero", uuid="other")
    client.create("b", table="0 8 zero")
    status, out, err = commands("restore")
    assert (status, out) == (1, ["b: there already"])
    assert "a: device 'a' exists and differs from its file in: table, uuid" in err
    assert client.table("a") == "0 16 zero"


@pytest.mark.parametrize(
    "more",
    [
        {"read_only": True},
        {"options": {"access": {"addresses": ["127.0.0.0/8"]}}},
        {"options": {"tls": {"mode": "require", "psk": "KEYS"}}},
    ],
    ids=["read-only", "rules", "TLS"],
)
def test_an_export_that_lets_clients_do_more_than_its_file_says_is_reported(
    commands: Commands, client: Client, tmp_path: Path, more: dict[str, Any]
) -> None:
    keys = pre_shared_keys(tmp_path / "keys.psk", "alice")
    more = msgspec.json.decode(msgspec.json.encode(more).replace(b"KEYS", str(keys).encode()))
    client.create("a", table="0 8 zero")
    made = client.export("a", host="127.0.0.1", **more)
    commands.succeed("save")
    assert commands.succeed("restore") == ["a: there already"]
    client.unexport("a", made.id)
    again = client.export("a", host="127.0.0.1", port=made.port)
    status, out, err = commands("restore")
    assert (status, out) == (1, [])
    assert f"differs from its file in: export 127.0.0.1:{again.port}: TLS, or who may use it" in err


def test_an_error_concerns_one_device_and_those_above_it(commands: Commands, client: Client, tmp_path: Path) -> None:
    commands.folder.mkdir()
    for name, text in {
        "good": "0 8 zero",
        "gone": f"0 8 loop {tmp_path}/gone.img",
        "above": "0 8 linear blkloom:gone 0",
        "bad": "0 8 zeroes",
        "relative": "0 8 loop disk.img",
        "x": "0 8 linear blkloom:y 0",
        "y": "0 8 linear blkloom:x 0",
    }.items():
        (commands.folder / f"{name}.table").write_text(f"{text}\n")
    status, out, err = commands("restore")
    assert (status, out) == (1, ["good: made"])
    assert [info.name for info in client.info()] == ["good"]
    assert f"blkloom: gone: {tmp_path}/gone.img: " in err
    assert "blkloom: above: device 'above' needs 'gone', which could not be made" in err
    assert f"blkloom: bad: {commands.folder}/bad.table:1:5: unknown target type: 'zeroes'" in err
    assert "blkloom: relative: " in err
    assert "'disk.img' is relative" in err
    assert "blkloom: x: needs itself: 'x' needs 'y' needs 'x'" in err


def test_a_relative_path_is_saved_as_an_absolute_one(
    commands: Commands, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk.img").write_bytes(bytes(4096))
    client.create("a", table="0 4 loop disk.img\n4 4 linear disk.img 4")
    commands.succeed("save")
    path = tmp_path / "disk.img"
    assert commands.files()["a.table"] == f"0 4 loop {path}\n4 4 linear {path} 4\n"


def test_what_cannot_be_made_again_is_not_saved(commands: Commands, client: Client, tmp_path: Path) -> None:
    for name in ("deleted", "replaced"):
        (tmp_path / name).write_bytes(bytes(4096))
        client.create(name, table=f"0 8 loop {tmp_path}/{name}")
        (tmp_path / name).unlink()
    (tmp_path / "replaced").write_bytes(bytes(4096))
    client.create("empty")
    client.create("good", table="0 8 zero")
    status, out, err = commands("save")
    assert (status, out) == (1, [f"{commands.folder}/good.table: written"])
    assert "blkloom: empty: not saved: device 'empty' has no table" in err
    assert "blkloom: deleted: not saved: " in err
    assert "blkloom: replaced: not saved: " in err
    assert "leads to another file now" in err
    assert list(commands.files()) == ["good.table"]


def test_hostile_files_do_not_prevent_the_others(commands: Commands, client: Client, tmp_path: Path) -> None:
    commands.folder.mkdir()
    (commands.folder / "good.table").write_text("0 8 zero\n")
    (commands.folder / "link.table").symlink_to("/etc/passwd")
    (commands.folder / "bytes.table").write_bytes(b"\xff\xfe 8 zero\n")
    (commands.folder / "escape\x1b[2J.table").write_bytes(b"attach \x1b[2J\n")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(commands.folder / "socket.table"))
    status, out, err = commands("restore")
    assert (status, out) == (1, ["good: made"])
    assert "\x1b" not in err
    for name in ("link", "bytes", "socket", "escape\\x1b[2J"):
        assert f"blkloom: {name}: " in err


def test_without_a_directory_there_is_nothing_to_do(blkloom: str, life: Life, tmp_path: Path) -> None:
    """As at the first boot: `restore` without --directory."""
    environment = os.environ | {"BLKLOOM_RUN_DIR": str(life.run_dir), "XDG_CONFIG_HOME": str(tmp_path)}
    if os.geteuid() == 0 and Path("/etc/blkloom").exists():
        pytest.skip("this machine has devices at boot")
    done = subprocess.run([blkloom, "restore"], capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
