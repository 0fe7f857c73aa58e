"""The fixtures of `blkloom.testing`, used by a separate pytest process: they work and leave nothing behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SECONDS = 120.0
"""In which a pytest must have run, and all have ended."""
WAITS = """
import os, signal, sys

def test_waits(blkloom_client, blkloom_uri):
    blkloom_client.create("disk", table="0 2048 ram")
    {before}
    os.write({ready}, os.fsencode(blkloom_client.run_dir.path))
    os.read({go}, 1)
    {then}
"""
"""A test that says where its run directory is, and waits for its process to be killed."""
KILL_SUPERVISOR = "os.kill(blkloom_client.version()['pid'], signal.SIGKILL)"
FORK = "os.fork() or signal.pause()"
FREEZE_SUPERVISOR = "os.kill(blkloom_client.version()['pid'], signal.SIGSTOP)"
MARK = "BLKLOOM_FIXTURES_TEST"


def pytest_command(test: Path) -> list[str]:
    """The real one, without the settings of this project."""
    return [
        *(sys.executable, "-m", "pytest", "-p", "blkloom.testing", "-p", "no:cacheprovider", "-q"),
        *("--rootdir", str(test.parent), str(test)),
    ]


def processes_with(mark: str) -> set[int]:
    """Those that have inherited the mark in their environment."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if f"{MARK}={mark}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.add(int(pid))
        except OSError:
            continue
    return found


def command_line(pid: int) -> bytes:
    """Of a process that has not ended."""
    return Path(f"/proc/{pid}/cmdline").read_bytes()


class Waiting:
    """A pytest whose test waits: its process, its run directory, and pidfds of every process but its own forks."""

    def __init__(self, process: subprocess.Popen[str], run_dir: Path, descriptors: dict[int, int], go: int) -> None:
        self.process = process
        self.run_dir = run_dir
        self._descriptors = descriptors
        self._go = go

    def go_on(self) -> str:
        """The test ends; what pytest wrote."""
        os.write(self._go, b"1")
        said, _ = self.process.communicate(timeout=SECONDS)
        return said

    def all_end(self) -> None:
        """Waits for each of the processes."""
        for pid, descriptor in self._descriptors.items():
            readable, _, _ = select.select([descriptor], [], [], SECONDS)
            assert readable, f"process {pid} is left: {command_line(pid)!r}"


@contextmanager
def waiting(tmp_path: Path, before: str = "pass", then: str = "pass") -> Iterator[Waiting]:
    """Runs WAITS. Whatever a failure leaves is killed."""
    mark = str(tmp_path)
    with ExitStack() as stack:
        ready, write_ready = os.pipe()
        read_go, go = os.pipe()
        for descriptor in (ready, go):
            stack.callback(os.close, descriptor)
        test = tmp_path / "test_waits.py"
        test.write_text(WAITS.format(before=before, then=then, ready=write_ready, go=read_go))
        process = stack.enter_context(
            subprocess.Popen(
                pytest_command(test),
                env=os.environ | {MARK: mark},
                pass_fds=[write_ready, read_go],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        for descriptor in (write_ready, read_go):
            os.close(descriptor)
        stack.callback(lambda: [os.kill(pid, signal.SIGKILL) for pid in processes_with(mark)])
        run_dir = os.read(ready, 4096)
        assert run_dir, process.communicate(timeout=SECONDS)[0]
        command = command_line(process.pid)
        forks = {pid for pid in processes_with(mark) - {process.pid} if command_line(pid) == command}
        descriptors = {pid: os.pidfd_open(pid) for pid in processes_with(mark) - forks}
        for descriptor in descriptors.values():
            stack.callback(os.close, descriptor)
        yield Waiting(process, Path(os.fsdecode(run_dir)), descriptors, go)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("before", ["pass", KILL_SUPERVISOR, FORK])
def test_a_killed_pytest_leaves_nothing(tmp_path: Path, number: signal.Signals, before: str) -> None:
    with waiting(tmp_path, before) as pytest_process:
        pytest_process.process.send_signal(number)
        pytest_process.all_end()
        assert not pytest_process.run_dir.parent.exists()


def has_socket(pid: int) -> bool:
    """Whether the process has a socket open."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(link).startswith("socket:"):
                return True
    return False


def test_a_supervisor_that_is_killed_while_it_is_asked_to_stop_leaves_nothing(tmp_path: Path) -> None:
    with waiting(tmp_path, FREEZE_SUPERVISOR) as pytest_process:
        supervisor = int((pytest_process.run_dir / "lock").read_text())
        (guard,) = (pid for pid in processes_with(str(tmp_path)) if b"own_supervisor" in command_line(pid))
        assert not has_socket(guard)
        pytest_process.process.kill()
        while not has_socket(guard):  # then it waits for an answer
            pass
        os.kill(supervisor, signal.SIGKILL)
        pytest_process.all_end()
        assert not pytest_process.run_dir.parent.exists()


@pytest.mark.parametrize(("then", "outcome"), [("pass", "1 passed"), ("assert not 'this test fails'", "1 failed")])
def test_a_test_that_ends_leaves_nothing(tmp_path: Path, then: str, outcome: str) -> None:
    with waiting(tmp_path, then=then) as pytest_process:
        assert outcome in pytest_process.go_on()
        pytest_process.all_end()
        assert not pytest_process.run_dir.parent.exists()


DISKS = """
import pytest

def test_fails(blkloom_power_cut, blkloom_seed):
    disk = blkloom_power_cut("64K")
    disk.device.pwrite(bytes(range(1, 9)) * 8192, 0)
    disk.restore()
    print("lost:", hash(disk.device.pread(disk.size, 0)), disk.seed == blkloom_seed)
    assert not "this test fails"
"""


def failed_disks(folder: Path, *options: str, **environment: str) -> tuple[str, str]:
    """What a test of DISKS has lost, and its seed as pytest prints it."""
    test = folder / "test_disks.py"
    test.write_text(DISKS)
    done = subprocess.run(
        [*pytest_command(test), *options],
        env=os.environ | {"PYTHONHASHSEED": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert "1 failed" in done.stdout, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    (seed,) = (line.rpartition(" ")[2] for line in lines if line.endswith(tuple("0123456789")) and "repeat" in line)
    (lost,) = (line for line in lines if line.startswith("lost:"))
    assert lost.endswith("True")
    return lost, seed


def test_a_failed_test_prints_the_seed_that_repeats_it(tmp_path: Path) -> None:
    lost, seed = failed_disks(tmp_path)
    assert failed_disks(tmp_path, "--blkloom-seed", seed) == (lost, seed)
    assert failed_disks(tmp_path, BLKLOOM_SEED=seed) == (lost, seed)
    assert failed_disks(tmp_path)[1] != seed


NAMED = """
import subprocess

import blkloom
import pytest

def copied(disk):
    with disk.served() as uri:
        return subprocess.run(["nbdcopy", "--flush", "data", uri], capture_output=True, text=True)

def test_named(blkloom_power_cut, blkloom_flaky_disk, blkloom_slow_disk, blkloom_full_disk, blkloom_client):
    cut = blkloom_power_cut("1M", client=blkloom_client, name="cut")
    flaky = blkloom_flaky_disk("1M", probability=1, client=blkloom_client, name="flaky", failing=False)
    slow = blkloom_slow_disk("1M", bps="1G", client=blkloom_client, name="slow")
    slow.set_delays(1)
    full = blkloom_full_disk("1M", space=4096, client=blkloom_client, name="full")
    assert [copied(disk).returncode for disk in (cut, flaky, slow)] == [0, 0, 0]
    assert "No space left" in copied(full).stderr
    flaky.start_failing()
    assert "Input/output error" in copied(flaky).stderr
    (state,) = cut.states()
    assert "Input/output error" in copied(cut).stderr
    with pytest.raises(blkloom.UsageError, match="is in a worker"):
        cut.device
    assert full.used == 0  # each write was larger
    blkloom_client.remove("slow", force=True)

def test_the_space_that_is_used_is_kept_in_an_upgrade(blkloom_client, blkloom_full_disk):
    full = blkloom_full_disk("1M", space="512K", client=blkloom_client)
    assert "No space left" in copied(full).stderr
    used = full.used
    assert 0 < used <= 512 << 10
    blkloom_client.upgrade()
    assert full.used == used
    full.set_space("1M")
    assert copied(full).returncode == 0

def test_a_state_has_what_was_flushed(blkloom_client, blkloom_power_cut):
    cut = blkloom_power_cut("1M", client=blkloom_client)
    copied(cut)
    for state in cut.states():
        assert state.path.read_bytes() == open("data", "rb").read()
    cut.restore()
    assert blkloom_client.read("disk", 0, 512) == open("data", "rb").read(512)
"""


def test_disks_may_be_devices_of_a_supervisor(tmp_path: Path, program: Callable[[str, str], str]) -> None:
    program("nbdcopy", "libnbd-bin")
    (tmp_path / "data").write_bytes(os.urandom(1 << 20))
    test = tmp_path / "test_named.py"
    test.write_text(NAMED)
    command = [*pytest_command(test), "-x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert "3 passed" in done.stdout, done.stdout + done.stderr


def test_the_documented_example_passes(tmp_path: Path, program: Callable[[str, str], str]) -> None:
    for name in ("nbdcopy", "nbdinfo"):
        program(name, "libnbd-bin")
    shown, other_scope = (DOCS / "python.md").read_text().partition("## In tests")[2].split("```python\n")[1:3]
    test = tmp_path / "test_example.py"
    test.write_text(
        "from collections.abc import Iterator\nimport blkloom, pytest\nfrom blkloom.testing import served\n"
        + shown.partition("```")[0]
        + other_scope.partition("```")[0]
        + "\ndef test_scope(image_uri: str) -> None:\n"
        "    subprocess.run(['nbdinfo', '--can', 'read', image_uri], check=True)\n"
    )
    done = subprocess.run(pytest_command(test), capture_output=True, text=True, check=False, timeout=SECONDS)
    assert "3 passed" in done.stdout, done.stdout + done.stderr
