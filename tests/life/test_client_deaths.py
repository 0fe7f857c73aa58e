"""Commands that are killed while they attach or detach, and programs that are killed while they use a node: what is
left is whole, listed and can be removed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.errors import DeviceBusy, DeviceExists
from conformance.file_systems import MiB, run
from long_runs import LONG

from .attached import Program, disk, life, loop_devices, said
from .conftest import LONGEST_END, Life, info
from .deaths import ATTACH, SUPERVISOR, Deaths, deaths

__all__ = ["deaths", "disk", "life"]
pytestmark = pytest.mark.timeout(300)

EACH = 1 if LONG else 7
"""Every how many steps a process is killed; `make survival`: at each."""
ITSELF = "itself"


COMMANDS = {
    "attach": ["attach", "disk", "--via", "loop"],
    "detach": ["detach", "disk"],
    "create": ["create", "new", "--table", "0 2048 ram", "--attach", "--via", "loop"],
    "loop": ["loop", "--name", "new", "-f", "{file}"],
}


@pytest.mark.parametrize(
    ("verb", "role"),
    [*((verb, role) for verb in COMMANDS for role in (ITSELF, SUPERVISOR)), ("attach", ATTACH), ("create", ATTACH)],
)
def test_nothing_stale_after_a_command_was_killed(
    blkloom: str, deaths: Deaths, tmp_path: Path, verb: str, role: str
) -> None:
    (tmp_path / "file").write_bytes(bytes(MiB))
    command = [blkloom, *(word.format(file=tmp_path / "file") for word in COMMANDS[verb])]
    role = f"blkloom {verb}" if role == ITSELF else role
    for step in count(1, EACH):
        if verb == "detach":
            with deaths.life.client() as client:
                client.attach("disk", via="loop")
        reached = deaths.client_killed(command, role, step)
        try:
            with deaths.life.client() as client:
                if verb == "attach":
                    with suppress(DeviceExists):  # the supervisor has completed it, or will not begin any more
                        client.attach("disk", via="loop")
                for found in client.info()[1:]:
                    client.remove(found.name)
            deaths.check_nothing_stale()
        except BaseException as error:
            error.add_note(f"after step {step}: {reached}")
            raise
        if not reached:
            assert step > 1
            break


def test_nothing_stale_after_a_server_of_nodes_was_killed(blkloom: str, deaths: Deaths) -> None:
    for step in count(1, EACH):
        private = Path(tempfile.mkdtemp(dir="/tmp"))  # a short path, for sockets
        try:
            ended = _server_killed(deaths, blkloom, private, step)
            said("env", deaths.life, f"TMPDIR={private}", blkloom, "reap")
            mounts = Path("/proc/self/mountinfo").read_text()
            there = [*private.iterdir(), *Path("/sys/block").glob("loop*/loop/backing_file")]
            left = [path for path in there if _text(path) != PROBE]
            assert [path for path in left if str(private) in (str(path) + _text(path))] == [], f"step {step}"
            assert str(private) not in mounts, f"step {step}"
        finally:
            shutil.rmtree(private)
        if ended:
            assert step > 1
            break


def _server_killed(deaths: Deaths, blkloom: str, private: Path, step: int) -> bool:
    """Starts a server, which is killed at a step. Returns whether it has served before that."""
    environment = os.environ | {"TMPDIR": str(private)}
    words = [blkloom, "serve", "--ram", "1M", "--attach"]
    deaths.points.arm("blkloom serve", step, 0)
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as server:
        assert server.stdout is not None
        serves = bool(server.stdout.readline())
        reached = deaths.points.disarm()
        server.kill()
    assert bool(reached) is not serves
    return serves


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


PROBE = "blat"
"""Text of a file that tempfile makes and removes at once, to find out whether it can write to a directory."""

USE = """
mount --make-rprivate /
case $2 in
    mounted) mount "$1" "$3" && exec 3> "$3/file";;
    opened) exec 3<> "$1";;
esac
echo ready
read line
"""


@contextmanager
def using(node: str, how: str, place: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in a mount namespace of its own, which has the node mounted at `place`, or opened, or neither."""
    place.mkdir(exist_ok=True)
    words: list[str | Path] = ["unshare", "--mount", "sh", "-ec", USE, "sh", node, how, place]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("via", "how"), [("loop", "mounted"), ("loop", "opened")])
def test_a_node_is_free_when_the_last_process_of_a_mount_namespace_was_killed(
    client: Client, disk: str, life: Life, program: Program, tmp_path: Path, via: str, how: str
) -> None:
    node = client.attach(disk, via=via).node
    if how == "mounted":
        run(program("mkfs.ext4", "e2fsprogs"), "-q", node.path)
    users = {"mounted": f"mounted at {tmp_path}/m for process {{0}}", "opened": r"\(process {0}\)"}
    with using(node.path, how, tmp_path / "m") as process:
        with pytest.raises(DeviceBusy, match=users[how].format(process.pid)):
            client.detach(disk)
        process.kill()
        process.wait()
    _detach(client, disk)
    assert info(client, disk).node is None
    assert (client.reap(), loop_devices(life), os.listdir(life.run_dir / "mounts")) == ([], [], [])
    client.attach(disk, via=via)
    client.detach(disk)


@pytest.mark.parametrize("via", ["loop", "fuse"])
def test_a_copy_of_the_mounts_in_another_namespace_is_no_user(
    client: Client, disk: str, life: Life, tmp_path: Path, via: str
) -> None:
    node = client.attach(disk, via=via).node
    with using(node.path, "neither", tmp_path / "m"):
        client.detach(disk)
        assert (client.reap(), loop_devices(life), os.listdir(life.run_dir / "mounts")) == ([], [], [])
        client.attach(disk, via=via)
        run("dd", f"if={node.link}", "of=/dev/null", "count=1", "status=none")
        client.detach(disk)


def _detach(client: Client, device: str) -> None:
    """As soon as the kernel has ended the namespace, which no event tells."""
    deadline = time.monotonic() + LONGEST_END
    while True:
        try:
            return client.detach(device)
        except DeviceBusy:
            if time.monotonic() > deadline:
                raise
