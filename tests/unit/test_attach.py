"""The parts of attaching that need no kernel driver: names, records, the choice of a way, tasks in their process."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import Callable
from pathlib import Path

import pytest

from blkloom.attach import fuse, registry
from blkloom.attach.hosting import hosts_of, numbers_of
from blkloom.attach.links import make_link, remove_link, stale_links
from blkloom.attach.loop_device import LoopState, state_of
from blkloom.attach.machine import findings
from blkloom.attach.process import in_process
from blkloom.attach.records import records, remove_record, write_record
from blkloom.control.rundir import RunDir
from blkloom.control.states import ExportState, NodeState
from blkloom.errors import AttachError, CannotAttach, UsageError


def test_a_record_says_name_and_sequence(tmp_path: Path) -> None:
    write_record(str(tmp_path), "loop3", "disk", 0)
    write_record(str(tmp_path), "loop3", "disk", 7)
    write_record(str(tmp_path), "loop12", "other", 8)
    assert (tmp_path / "loop3").read_text() == "BLKLOOM_NAME=disk\nBLKLOOM_DISKSEQ=7\n"
    assert sorted(records(str(tmp_path), "loop")) == [("loop12", 8), ("loop3", 7)]
    for _ in range(2):
        remove_record(str(tmp_path), "loop3")
    assert list(records(str(tmp_path), "loop")) == [("loop12", 8)]


def test_a_damaged_record_has_no_sequence(tmp_path: Path) -> None:
    (tmp_path / "loop3").write_text("BLKLOOM_DISKSEQ=x\nnonsense")
    assert list(records(str(tmp_path), "loop")) == [("loop3", 0)]


def test_a_link_is_made_changed_and_removed_if_it_leads_there(tmp_path: Path) -> None:
    link = str(tmp_path / "nodes" / "disk")
    make_link(link, "/dev/loop1")
    make_link(link, "/dev/loop2")
    assert os.readlink(link) == "/dev/loop2"
    remove_link(link, "/dev/loop1")
    assert os.path.islink(link)
    remove_link(link, "/dev/loop2")
    remove_link(link, "/dev/loop2")
    assert os.listdir(tmp_path / "nodes") == []


def test_a_relative_link_is_known(tmp_path: Path) -> None:
    """As udev makes it."""
    (tmp_path / "disk").symlink_to("../loop1")
    remove_link(str(tmp_path / "disk"), str(tmp_path.parent / "loop1"))
    assert os.listdir(tmp_path) == []


def test_what_is_no_link_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").write_text("mine")
    with pytest.raises(AttachError, match="is no link") as raised:
        make_link(str(tmp_path / "disk"), "/dev/loop1")
    assert raised.value.errno == errno.EEXIST


def test_stale_links_are_those_of_no_node(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert list(stale_links(run_dir, ())) == []
    for name in ("a", "b"):
        make_link(str(run_dir.link(name)), "/dev/loop1")
    assert list(stale_links(run_dir, {str(run_dir.link("a"))})) == [str(run_dir.link("b"))]


def test_the_names_of_roots_own_devices_are_in_dev(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert RunDir(Path("/run/blkloom")).link("my disk") == Path("/dev/blkloom/my\\x20disk")
    assert RunDir(Path("/run/other")).link("disk") == Path("/run/other/nodes/disk")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert RunDir(Path("/run/blkloom")).link("disk") == Path("/run/blkloom/nodes/disk")


class _Way:
    def __init__(self, name: str, why: str, *, is_block_device: bool) -> None:
        self.name, self._why, self.is_block_device = name, why, is_block_device

    def lacks(self) -> str:
        return self._why


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`ways(best=why, ...)`: the ways there are, and what they lack; those that begin with b are block devices."""

    def there_are(**lacking: str) -> None:
        made = {name: _Way(name, why, is_block_device=name[0] == "b") for name, why in lacking.items()}
        monkeypatch.setattr(registry, "names", lambda: tuple(made))
        monkeypatch.setattr(registry, "way", made.__getitem__)

    return there_are


def test_the_best_way_that_lacks_nothing_is_chosen_and_the_others_explained(ways: Callable[..., None]) -> None:
    ways(best="no driver", better="not root", file="")
    way, passed_over = registry.choose(registry.AUTO)
    assert (way.name, passed_over) == ("file", {"best": "no driver", "better": "not root"})
    ways(best="", file="")
    assert registry.choose(registry.AUTO)[0].name == "best"
    assert registry.choose("file")[0].name == "file"


@pytest.mark.parametrize("name", [registry.AUTO, "best"])
def test_where_no_way_works_the_error_says_why(ways: Callable[..., None], name: str) -> None:
    ways(best="no driver", file="")
    with pytest.raises(CannotAttach, match="best: no driver") as raised:
        registry.choose(name, block_device=True)
    assert "file" not in raised.value.what
    assert "blkloom doctor" in raised.value.cure


def test_an_unknown_way_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError) as raised:
        registry.way("scsi")
    assert raised.value.cure == f"there are: {', '.join([registry.AUTO, *registry.names()])}"


def test_a_machine_without_fuse_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fuse, "DEVICE", str(tmp_path / "fuse"))
    assert "No such file or directory (modprobe fuse" in fuse.lacks_fuse()
    assert "modprobe fuse" in registry.way("fuse").lacks()


def test_the_state_of_a_loop_device_is_read_from_sysfs(tmp_path: Path) -> None:
    assert state_of(3, sysfs=str(tmp_path)) is None
    folder = tmp_path / "loop3"
    (folder / "loop").mkdir(parents=True)
    (folder / "loop" / "backing_file").write_text("/a file\n")
    assert state_of(3, sysfs=str(tmp_path)) == LoopState("/a file", 0)
    (folder / "diskseq").write_text("12\n")
    assert state_of(3, sysfs=str(tmp_path)) == LoopState("/a file", 12)


def test_a_task_runs_in_a_process_and_its_error_is_raised_here(tmp_path: Path) -> None:
    write_record(str(tmp_path), "loop9999", "disk", 1)
    detach = {"number": 9999, "sequence": 1, "lazy": False, "link": "", "records": str(tmp_path)}
    assert asyncio.run(in_process("detach", **detach)) is None
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError) as raised:
        asyncio.run(
            in_process("refresh", number=9999, file=str(tmp_path / "file"), read_only=False, block_size=512, link="")
        )
    assert raised.value.filename == str(tmp_path / "file")


def test_a_task_without_an_answer_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AttachError, match="the process for nonsense ended with status 1"):
        asyncio.run(in_process("nonsense", file="/f"))
    assert "KeyError" in capfd.readouterr().err


def test_a_task_that_takes_too_long_is_killed_and_its_process_handed_on() -> None:
    async def late() -> Process:
        told: list[Process] = []
        with pytest.raises(AttachError, match="takes longer than 0 s") as raised:
            await in_process("thaw", seconds=0, late=told.append, devices=[], link="")
        assert raised.value.errno == errno.ETIMEDOUT
        (process,) = told
        await process.wait()
        return process

    assert asyncio.run(late()).returncode


def test_a_file_lies_on_its_file_system(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        status = os.fstat(file.fileno())
        found = hosts_of(file.fileno())
    number = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    assert number in found or os.major(status.st_dev) == 0  # btrfs shows another number to stat(2)
    assert found


def test_a_file_without_a_mount_lies_on_nothing_else() -> None:
    memory = os.memfd_create("memory")
    try:
        assert hosts_of(memory) == set()
    finally:
        os.close(memory)


def test_a_device_is_known_by_its_files_and_its_node() -> None:
    exports = [
        ExportState(id="auto", name="a"),
        ExportState(id="e1", name="a", kind="fuse", details={"owner": [0, 0, 0o600], "number": "0:53"}),
    ]
    assert numbers_of(None, exports) == {"0:53"}
    assert numbers_of(NodeState(via="loop", export="e1", path="/dev/no such device"), exports) == {"0:53"}


def test_the_doctor_has_a_line_for_each_way_and_a_cure_for_what_is_missing() -> None:
    found = list(findings())
    lines = [finding.topic for finding in found if finding.topic.startswith("attach")]
    assert lines == [f"attach --via {name}" for name in registry.names()]
    assert {finding.state for finding in found} <= {"yes", "no", "limited"}
    assert all(finding.cure for finding in found if finding.state != "yes" and "attach" not in finding.topic)


def test_an_ordinary_user_attaches_files_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert registry.way("loop").lacks() == "only root may attach loop devices"
    monkeypatch.setattr("shutil.which", lambda _name: None)
    monkeypatch.setattr(fuse, "DEVICE", "/dev/null")
    monkeypatch.setattr(fuse, "_FUSE", os.stat("/dev/null").st_rdev)
    assert registry.way("fuse").lacks() == "fusermount3 is not installed (Debian: apt install fuse3)"


def test_the_process_of_a_task_says_that_it_has_started_before_it_begins() -> None:
    """The time limit of the task begins then."""
    words = [sys.executable, "-m", "blkloom.attach.tasks", "thaw"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        answer, _ = process.communicate(json.dumps({"devices": [], "link": ""}))
    assert "result" in json.loads(answer)


def test_a_process_of_a_task_that_does_not_start_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep infinity\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr("blkloom.attach.process._START_SECONDS", 0.0)

    async def late() -> AttachError:
        told: list[Process] = []
        with pytest.raises(AttachError, match="the process for thaw has not started in 0 s") as raised:
            await in_process("thaw", late=told.append, devices=[], link="/dev/blkloom/disk")
        (process,) = told
        assert await process.wait() < 0
        return raised.value

    error = asyncio.run(late())
    assert (error.path, error.errno) == ("/dev/blkloom/disk", errno.ETIMEDOUT)
