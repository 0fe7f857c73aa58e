"""`blkloom save` and `restore`: devices come back as they were, in the order of their stacking; what exists is not
changed; an error concerns one device and those above it.
"""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from blkloom.control.client import Client

from .conftest import Life

pytestmark = pytest.mark.timeout(120)


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
