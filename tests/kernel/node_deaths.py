"""Program: processes of blkloom are killed while nodes of kernel drivers are made, served and removed.

    python node_deaths.py [--thorough]

Runs as root in a guest, in the run directory BLKLOOM_RUN_DIR with a supervisor of its own. First, `save` and `restore`
make two nodes again. Then supervisor and workers are killed together, and the next supervisor goes on with both. Then
they are killed at kill points (kill_points.py) of attach and detach, and while the ublk driver starts a block device.
After each death, one node that works is left, or none, at the latest after `reap`. No thread of the guest stays in an
uninterruptible sleep. At last the supervisor stops while a device is attached. Prints a line for each part;
fails with a traceback.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Final, NamedTuple

from blkloom.control.client import Client
from blkloom.control.states import DeviceInfo, NodeState
from blkloom.errors import BlkloomError, UsageError, WorkerGone
from kill_points import KillPoints

NAME, OTHER, SLOW = "disk", "other", "slow"
SIZE: Final = 4 << 20
DELAY: Final = 1500
"""Milliseconds for a read of the slow device."""
RUN: Final = Path(os.environ["BLKLOOM_RUN_DIR"])
WORK: Final = RUN.parent
LONGEST: Final = 100.0
"""Seconds until a node works again, and until the kernel and ended processes have let go of what they had."""
PAUSE: Final = 0.1
"""Between two looks: in an emulated machine, the other processes need the processor, too."""
SUPERVISOR, WORKER = "blkloom.supervisor", "fork of blkloom.worker"
BLOCK_DEVICES: Final = {"ublk": "ublkb*", "nbd": "nbd*/backend"}
"""Of each way, in /sys/block."""
FEWEST_STEPS: Final = 2


class Death(NamedTuple):
    """role: of the process whose steps are counted."""

    via: str
    verb: str
    role: str
    step: int
    victims: str

    def __str__(self) -> str:
        return f"{self.via} {self.verb}, step {self.step} of {self.role}, killed: {self.victims}"


USUAL: Final = [
    Death("ublk", "attach", WORKER, 1, "itself"),
    Death("ublk", "attach", SUPERVISOR, 5, "worker itself"),
    Death("ublk", "detach", SUPERVISOR, 3, "worker"),
    Death("nbd", "attach", WORKER, 1, "itself"),
    Death("nbd", "attach", SUPERVISOR, 6, "worker"),
    Death("nbd", "detach", SUPERVISOR, 4, "itself"),
]
CHOICES: Final = {
    SUPERVISOR: ["itself", "worker itself", "worker"],
    WORKER: ["itself", "supervisor", "supervisor itself"],
}
"""Victims, by role."""


class Deaths:
    """A supervisor with devices, and kill points."""

    def __init__(self) -> None:
        folder = WORK / "kill-points"
        folder.mkdir()
        self.points = KillPoints(folder)
        self.supervisor = supervised(self.points)
        with client() as one:
            for name in (NAME, OTHER):
                one.create(name, table=f"0 {SIZE // 512} loop {image(name)}")

    def restored(self) -> None:
        """`save`, the devices removed, and `restore`: the nodes have the same options."""
        with client() as one:
            one.attach(NAME, via="ublk", partitions=True, read_only=True, options={"on_failure": "fail"})
            one.attach(OTHER, via="nbd", shared=True, options={"timeout": 7, "connections": 1})
            before = [saved_of(one, name) for name in (NAME, OTHER)]
            blkloom("save", "--directory", str(WORK / "saved"))
            for name in (NAME, OTHER):
                one.remove(name)
            check(left([]))
            blkloom("restore", "--directory", str(WORK / "saved"))
            after = [saved_of(one, name) for name in (NAME, OTHER)]
            if after != before:
                raise AssertionError(f"before: {before}\nafter: {after}")
            if not Path("/dev/ublkb0p1").is_block_device():
                raise AssertionError("the partition of the ublk device is missing")
            for one_node in before:
                print(one_node, flush=True)

    def all_killed(self) -> None:
        """Supervisor and workers are killed; the next supervisor goes on with the nodes; then they are detached."""
        with client() as one:
            nodes = [info(one, name).node for name in (NAME, OTHER)]
            for pid in (self.supervisor.pid, *(info(one, name).worker for name in (NAME, OTHER))):
                os.kill(pid, signal.SIGKILL)
        self.next_supervisor()
        with client() as one:
            for name, node in zip((NAME, OTHER), nodes, strict=True):
                found = settled(one, name)
                if node is None or found is None or found.path != node.path:
                    raise AssertionError(f"before: {node}\nafter: {found}")
            one.reap()
            wait_for(lambda: left(nodes))
            for name in (NAME, OTHER):
                one.detach(name)
            wait_for(lambda: left([]))
            one.remove(OTHER)

    def at_step(self, death: Death) -> str:
        """Calls the verb while the victims are killed at a step. Returns the step; "" if there is no such step."""
        with client() as one:
            until_a_worker_answers(one)
            if death.verb == "detach":
                one.attach(NAME, via=death.via)
            pids = {"itself": 0, "worker": info(one, NAME).worker, "supervisor": self.supervisor.pid}
            failed: Exception | None = None
            self.points.arm(death.role, death.step, *(pids[victim] for victim in death.victims.split()))
            try:
                if death.verb == "attach":
                    one.attach(NAME, via=death.via)
                else:
                    one.detach(NAME)
            except (BlkloomError, OSError) as error:
                failed = error
            reached = self.points.disarm()
            if failed is not None and not reached:
                raise failed
        if reached and ("supervisor" in death.victims or (death.role == SUPERVISOR and "itself" in death.victims)):
            self.next_supervisor()
        return reached

    def while_started(self, victims: str) -> None:
        """Attaches a slow device by ublk, and kills the victims when its block device appears: in START_DEV, if the
        kernel reads a partition table there.
        """
        with client() as one:
            one.create(SLOW, table=f"0 {SIZE // 512} delay {image(SLOW)} 0 {DELAY}")
            pids = {"worker": info(one, SLOW).worker, "supervisor": self.supervisor.pid}
            attaching = threading.Thread(target=attach_or_fail, args=(SLOW, "ublk"))
            attaching.start()
            wait_for(lambda: [] if block_devices("ublk") else ["no block device"])
            for victim in victims.split():
                os.kill(pids[victim], signal.SIGKILL)
            attaching.join(2 * LONGEST)
            if attaching.is_alive():
                raise AssertionError("attach hangs")
        if "supervisor" in victims:
            self.next_supervisor()

    def check_nothing_stale(self, name: str = NAME) -> str:
        """The device has a node that works, or none; and there is nothing else, before and after it is detached."""
        with client() as one:
            node = settled(one, name)
            one.reap()
            wait_for(lambda: left([node]))
            if node is not None:
                with suppress(UsageError):  # the supervisor was about to remove it
                    one.detach(name)
                one.reap()
                wait_for(lambda: left([]))
            exports = [export.id for export in info(one, name).exports]
            if exports != ["auto"]:
                raise AssertionError(f"exports are left: {exports}")
        return "no node" if node is None else "a node"

    def next_supervisor(self) -> None:
        """The former one was killed."""
        self.supervisor.wait(LONGEST)
        self.supervisor = supervised(self.points)

    def stop(self, via: str) -> None:
        """Ends the supervisor while a device is attached and its worker was just killed."""
        with client() as one:
            one.attach(NAME, via=via)
            os.kill(info(one, NAME).worker, signal.SIGKILL)
        self.supervisor.terminate()
        if (status := self.supervisor.wait(LONGEST)) != 0:
            raise AssertionError(f"the supervisor has ended with status {status}")
        wait_for(lambda: left([]))


def client() -> Client:
    """To the supervisor that runs."""
    return Client(RUN, start=False)


def blkloom(*words: str) -> None:
    """Runs the command, which must succeed."""
    subprocess.run(["blkloom", *words], check=True, stdout=subprocess.DEVNULL)


def image(name: str) -> Path:
    """The file of a device, with an MBR of one partition."""
    path = WORK / f"{name}.img"
    entry = bytes(4) + b"\x83" + bytes(3) + (64).to_bytes(4, "little") + (64).to_bytes(4, "little")
    path.write_bytes((bytes(446) + entry).ljust(510, b"\0") + b"\x55\xaa")
    os.truncate(path, SIZE)
    return path


def supervised(points: KillPoints) -> subprocess.Popen[bytes]:
    """A supervisor that accepts clients, and replaces workers however often they die."""
    ready, told = os.pipe()
    path = os.pathsep.join(filter(None, [points.environment["PYTHONPATH"], os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "blkloom.supervisor", "--max-deaths=1000", f"--ready-fd={told}"]
    environment = os.environ | points.environment | {"PYTHONPATH": path}
    supervisor = subprocess.Popen(command, pass_fds=[told], env=environment)
    os.close(told)
    if not os.read(ready, 1):
        raise AssertionError("the supervisor has not started")
    os.close(ready)
    return supervisor


def info(one: Client, name: str) -> DeviceInfo:
    """Of a device."""
    (found,) = one.info(name)
    return found


def saved_of(one: Client, name: str) -> dict[str, Any]:
    """What `save` writes of a node."""
    found = info(one, name)
    assert found.node is not None
    node = found.node
    (export,) = [export for export in found.exports if export.id == node.export]
    options = {key: export.details[key] for key in ("on_failure", "timeout", "connections") if key in export.details}
    flags = {"read_only": node.read_only, "partscan": node.partitions, "shared": not node.exclusive}
    return {"via": node.via, **flags, **options}


def attach_or_fail(name: str, via: str) -> None:
    """Returns when the supervisor has answered, or has died."""
    with client() as one, suppress(BlkloomError, OSError):
        one.attach(name, via=via)


def until_a_worker_answers(one: Client) -> None:
    """The former one was perhaps killed just now."""

    def silent() -> list[str]:
        try:
            one.status(NAME)
        except WorkerGone as error:
            return [str(error)]
        return []

    wait_for(silent)


def settled(one: Client, name: str) -> NodeState | None:
    """The node, as soon as it works; None as soon as there is none."""
    first = image_of(name)
    deadline = time.monotonic() + LONGEST
    while (node := info(one, name).node) is not None:
        with suppress(OSError):
            if node.path and os.path.realpath(node.link) == os.path.realpath(node.path):
                with open(node.path, "rb", buffering=0) as file:
                    if file.read(len(first)) == first:  # nothing, while the node is made again
                        return node
        if time.monotonic() >= deadline:
            raise AssertionError(f"the node does not work: {node}")
        time.sleep(PAUSE)
    return None


def image_of(name: str) -> bytes:
    """The first sector of a device."""
    with (WORK / f"{name}.img").open("rb") as file:
        return file.read(512)


def block_devices(via: str) -> set[str]:
    """Names of those of a way."""
    return {path.relative_to("/sys/block").parts[0] for path in Path("/sys/block").glob(BLOCK_DEVICES[via])}


def left(nodes: Iterable[NodeState | None]) -> list[str]:
    """What there is that belongs to none of these nodes."""
    there = [node for node in nodes if node is not None]
    mine = {os.path.basename(node.path) for node in there}
    found = [f"block device {name}" for via in BLOCK_DEVICES for name in block_devices(via) - mine]
    queues = {path.name.replace("ublkc", "ublkb") for path in Path("/sys/class/ublk-char").glob("ublkc*")}
    found += [f"ublk device of {name}" for name in queues - mine]
    links = {os.path.basename(node.link) for node in there}
    folder = RUN / "nodes"
    found += [f"link {name}" for name in (set(os.listdir(folder)) if folder.exists() else set()) - links]
    return found + list(asleep())


def asleep() -> Iterator[str]:
    """Threads of the kernel and of processes that are in an uninterruptible sleep; tasks of the supervisor."""
    for path in Path("/proc").glob("[0-9]*/task/[0-9]*"):
        with suppress(OSError):
            status = (path / "stat").read_text()
            words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            state = status.rpartition(")")[2].split()[0]
            if state == "D" or "blkloom.attach.tasks" in words:
                where = (path / "wchan").read_text()
                yield f"thread {path.name} {status.partition(')')[0].partition('(')[2]} ({state}, {where}): {words}"


def check(found: Iterable[str]) -> None:
    """Raises AssertionError if anything was found."""
    if found := list(found):
        raise AssertionError(f"left: {found}")


def wait_for(failing: Callable[[], Iterable[str]]) -> None:
    """Until it finds nothing any more."""
    deadline = time.monotonic() + LONGEST
    while found := list(failing()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"after {LONGEST:g} s: {found}")
        time.sleep(PAUSE)


@contextmanager
def part(name: str) -> Iterator[list[str]]:
    """Prints the name of a part that has ended, with the texts that it adds to the list; notes it where one fails."""
    texts: list[str] = []
    began = time.monotonic()
    try:
        yield texts
    except BaseException as error:
        error.add_note(f"in: {name}, {', '.join(texts)}")
        raise
    print(f"{name}: {', '.join([*texts, f'{time.monotonic() - began:.1f} s'])}", flush=True)


def try_death(life: Deaths, death: Death) -> bool:
    """Whether there is a step of that number."""
    with part(str(death)) as texts:
        reached = life.at_step(death)
        texts.append(reached.partition("(")[0] or "no such step")
        texts.append(life.check_nothing_stale())
    return bool(reached)


def try_all_steps(life: Deaths) -> None:
    """Of both ways and verbs, with all victims."""
    for via in BLOCK_DEVICES:
        for verb in ("attach", "detach"):
            for role, choices in CHOICES.items():
                for victims in choices:
                    last = next(step for step in count(1) if not try_death(life, Death(via, verb, role, step, victims)))
                    if last <= (FEWEST_STEPS if role == SUPERVISOR else 0):
                        raise AssertionError(f"{via} {verb}: {role} has only {last - 1} steps")


def main() -> None:
    """Runs as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--thorough", action="store_true", help="at every step, in all orders of deaths")
    options = parser.parse_args()
    life = Deaths()
    with part("restored"):
        life.restored()
    with part("all killed"):
        life.all_killed()
    if options.thorough:
        try_all_steps(life)
    else:
        for death in USUAL:
            if not try_death(life, death):
                raise AssertionError(f"there is no such step: {death}")
    for victims in ["worker", "supervisor worker"][: 2 if options.thorough else 1]:
        with part(f"START_DEV, killed: {victims}") as texts:
            life.while_started(victims)
            texts.append(life.check_nothing_stale(SLOW))
            with client() as one:
                one.remove(SLOW)
    for via in BLOCK_DEVICES if options.thorough else ["nbd"]:
        with part(f"stop, attached by {via}"):
            life.stop(via)
        life = life if via == "nbd" else again(life)


def again(life: Deaths) -> Deaths:
    """The next supervisor of a life that has ended, with the device."""
    life.supervisor = supervised(life.points)
    with client() as one:
        one.create(NAME, table=f"0 {SIZE // 512} loop {image(NAME)}")
    return life


if __name__ == "__main__":
    main()
