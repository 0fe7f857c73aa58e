"""Processes that are killed at kill points while a node is made or removed, and what may be left then."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from blkloom.attach import loop_device
from blkloom.control.client import Client
from blkloom.control.states import NodeState
from blkloom.errors import BlkloomError, UsageError, WorkerGone
from conformance.file_systems import MiB, run
from kill_points import KillPoints

from .attached import a_life_with_nodes, make_disk
from .conftest import LONGEST_END, Life, info, until

FEWEST_STEPS = 3
SUPERVISOR, ATTACH, DETACH = "blkloom.supervisor", "blkloom.attach.tasks attach", "blkloom.attach.tasks detach"


def killed_at(
    life: Life, points: KillPoints, change: Callable[[Client], None], role: str, step: int, victims: str
) -> str:
    """Makes a change at the device `disk` while the victims are killed at a step of a process with this role; the next
    supervisor begins if there is none. Returns the step, "" if there is none of that number.
    """
    with life.client() as client:
        worker = until(client, "disk", lambda found: found.worker > 0).worker
        pids = {"itself": 0, "worker": worker, "supervisor": life.process.pid}
        points.arm(role, step, *(pids[victim] for victim in victims.split()))
        failed: Exception | None = None
        try:
            change(client)
        except (BlkloomError, OSError) as error:
            failed = error
        reached = points.disarm()
        if failed is not None and not reached:
            raise failed
    if reached and ("supervisor" in victims or (role == SUPERVISOR and "itself" in victims)):
        life.process.wait(LONGEST_END)
        life.start()
    return reached


class Deaths:
    """A supervisor with one device, and kill points."""

    def __init__(self, life: Life, points: KillPoints, control: Path) -> None:
        """control: where the file system that lists FUSE connections is mounted."""
        self.life = life
        self.points = points
        self.control = control
        self.connections = self._connections()

    def killed(self, verb: str, via: str, role: str, step: int, victims: str) -> str:
        """Calls the verb while the victims are killed at a step; the next supervisor begins if there is none. Returns
        the step, "" if there is none of that number.
        """
        with self.life.client() as client:
            _until_a_worker_answers(client)
            if verb == "detach":
                client.attach("disk", via=via)

        def change(client: Client) -> None:
            if verb == "attach":
                client.attach("disk", via=via)
            else:
                client.detach("disk")

        return killed_at(self.life, self.points, change, role, step, victims)

    def client_killed(self, command: Sequence[str | Path], role: str, step: int) -> str:
        """Runs a command, which is killed at a step of a process with this role. Returns the step; "" if there is none
        of that number.
        """
        environment = os.environ | {"BLKLOOM_RUN_DIR": str(self.life.run_dir)}
        words: list[str | Path] = ["sh", "-c", 'read line; exec "$@"', "sh", *command]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment) as process:
            self.points.arm(role, step, process.pid)
            process.communicate(b"\n", LONGEST_END)
        reached = self.points.disarm()
        assert reached or process.returncode == 0
        with self.life.client() as client:
            while client.version()["devices"] != len(client.info()):  # one is being made
                pass
        return reached

    def check_nothing_stale(self) -> None:
        """The device has a node that works, or none; and there is nothing else, before and after it is detached."""
        with self.life.client() as client:
            node = _settled(client)
            client.reap()
            self._check(node)
            if node is not None:
                with suppress(UsageError):  # the supervisor was about to remove it
                    client.detach("disk")
                client.reap()
                self._check(None)
            deadline = time.monotonic() + LONGEST_END
            while (exports := _exports(client)) != [("auto", False)]:  # a file has gone before its export is removed
                assert time.monotonic() < deadline, f"exports: {exports}"

    def _check(self, node: NodeState | None) -> None:
        deadline = time.monotonic() + LONGEST_END
        while left := self._left(node):
            assert time.monotonic() < deadline, f"left: {left}"

    def _left(self, node: NodeState | None) -> list[str]:
        """What there is that belongs to no node."""
        run_dir = self.life.run_dir
        kernel = set() if node is None or node.via == "fuse" else {os.path.basename(node.path)}
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(run_dir) in line]
        found = [f"mount {line}" for line in mounts[node is not None :]]
        found += [f"loop device {name}" for name in _loop_devices(run_dir) - kernel]
        found += [f"record {name}" for name in set(os.listdir(run_dir / "kernel")) - kernel]
        links = {"disk"} if node is not None else set()
        found += [f"link {name}" for name in set(_names(run_dir / "nodes")) - links]
        if node is None:
            found += [f"file {name}" for folder in ("fuse", "mounts") for name in os.listdir(run_dir / folder)]
        found += [f"FUSE connection {name}" for name in self._connections() - self.connections - _mounted_numbers()]
        for pid in self.life.processes():
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                if b"blkloom.attach.tasks" in words or state == "D":
                    found.append(f"process {pid} ({state}): {words}")
        return found

    def _connections(self) -> set[str]:
        """Minor numbers of all FUSE connections of this machine."""
        return set(os.listdir(self.control))


def _until_a_worker_answers(client: Client) -> None:
    """The former one was perhaps killed just now."""
    deadline = time.monotonic() + LONGEST_END
    while True:
        try:
            client.status("disk")
        except WorkerGone:
            assert time.monotonic() < deadline
        else:
            return


def _settled(client: Client) -> NodeState | None:
    """The node, as soon as it works; None as soon as there is none."""
    deadline = time.monotonic() + LONGEST_END
    while (node := info(client, "disk").node) is not None:
        with suppress(OSError):
            if node.path and os.path.realpath(node.link) == os.path.realpath(node.path):
                with open(node.path, "rb", buffering=0) as file:
                    if file.read(512) == bytes(512):  # nothing, while the node is made again
                        return node
        assert time.monotonic() < deadline, f"the node does not work: {node}"
    return None


def _exports(client: Client) -> list[tuple[str, bool]]:
    """The id of each export, and whether it is read-only."""
    return [(export.id, export.read_only) for export in info(client, "disk").exports]


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.exists() else []


def _loop_devices(run_dir: Path) -> set[str]:
    """Those on files of the run directory."""
    found = set()
    for path in Path("/sys/block").glob("loop*"):
        state = loop_device.state_of(int(path.name.removeprefix("loop")))
        if state is not None and str(run_dir) in state.backing:
            found.add(path.name)
    return found


def _mounted_numbers() -> set[str]:
    """Minor numbers of all mounted file systems without a block device, in every mount namespace."""
    found, namespaces = set(), set()
    for pid in ["self", *filter(str.isdigit, os.listdir("/proc"))]:
        with suppress(OSError):
            if (namespace := os.readlink(f"/proc/{pid}/ns/mnt")) not in namespaces:
                lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
                found |= {line.split()[2].partition(":")[2] for line in lines}
                namespaces.add(namespace)
    return found


@contextmanager
def fuse_control(folder: Path) -> Iterator[Path]:
    """The file system that lists FUSE connections, mounted there."""
    folder.mkdir()
    run("mount", "-t", "fusectl", "none", str(folder))
    try:
        yield folder
    finally:
        run("umount", str(folder))


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deaths]:
    folder = tmp_path_factory.mktemp("deaths")
    points = KillPoints(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in points.environment.items():
            patch.setenv(name, value)
        with a_life_with_nodes() as life, fuse_control(folder / "connections") as control:
            with life.client() as client:
                make_disk(client, folder, 4 * MiB)
            yield Deaths(life, points, control)
