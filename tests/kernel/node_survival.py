"""Program: a file system on a node, while its worker is killed and replaced, tables are swapped and the device grows.

    python node_survival.py --via ublk --system ext4 --kills 50 --upgrades 20 --swaps 20 --grow

Runs as root, in a guest or on the host, in the run directory BLKLOOM_RUN_DIR with a supervisor of its own. Threads
write files in rounds, sync them and read them back past the page cache. In the end the file system is unmounted and
checked, and has these files. Prints a line for each part that is done; fails with a traceback.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from blkloom.control.client import Client
from blkloom.control.states import DeviceInfo

MiB: Final = 1 << 20
NAME: Final = "disk"
MAKE: Final = {
    "ext4": (64 * MiB, ("mkfs.ext4", "-q", "-F")),
    "xfs": (320 * MiB, ("mkfs.xfs", "-q", "-f")),
    "btrfs": (128 * MiB, ("mkfs.btrfs", "-q", "-f")),
}
"""Bytes of the device, and the command."""
CHECK: Final = {
    "ext4": ("e2fsck", "-f", "-n"),
    "xfs": ("xfs_repair", "-n"),
    "btrfs": ("btrfs", "check", "--readonly"),
}
GROW: Final[dict[str, Callable[[str, str], tuple[str, ...]]]] = {
    "ext4": lambda node, _place: ("resize2fs", node),
    "xfs": lambda _node, place: ("xfs_growfs", place),
    "btrfs": lambda _node, place: ("btrfs", "filesystem", "resize", "max", place),
}
WRITERS: Final = 2
FILES: Final = 10
"""Most files of a writer."""
LARGEST: Final = 256 << 10
"""Bytes of a file."""
POOL: Final = random.Random(0).randbytes(4 * LARGEST)
"""Files are parts of this: in an emulated machine, random bytes for each file would take longer than its I/O."""
ATTACH: Final[dict[str, dict[str, int]]] = {"nbd": {"timeout": 6}}
"""Options of a way: after a death, the kernel's NBD client sends requests again when their time is over."""
PAUSE: Final = 0.03
"""Seconds between rounds: in an emulated machine, the other processes need the processor, too."""
ROUND_SECONDS: Final = 300.0
"""A round that takes longer hangs."""


class Load:
    """Threads that write files, sync them, read them back past the page cache, and delete some; until `finish`."""

    def __init__(self, folder: Path) -> None:
        self._stop = threading.Event()
        self._rounds = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._sums: list[dict[str, str]] = [{} for _ in range(WRITERS)]
        folders = [folder / f"writer{number}" for number in range(WRITERS)]
        self._threads = [
            threading.Thread(target=self._run, args=(place, sums, number))
            for number, (place, sums) in enumerate(zip(folders, self._sums, strict=True))
        ]
        for place in folders:
            place.mkdir()
        for thread in self._threads:
            thread.start()

    def _run(self, folder: Path, sums: dict[str, str], number: int) -> None:
        choices = random.Random(number)
        try:
            while not self._stop.wait(PAUSE):
                _write_and_read(folder, sums, choices)
                with self._changed:
                    self._rounds += 1
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def wait_for_rounds(self, more: int = 3) -> None:
        """Until the writers have done that many more together."""
        with self._changed:
            goal = self._rounds + more
            if not self._changed.wait_for(lambda: self._error or self._rounds >= goal, ROUND_SECONDS):
                raise TimeoutError(f"no round has ended for {ROUND_SECONDS:g} s")
            if self._error:
                raise self._error

    def finish(self) -> dict[str, str]:
        """Ends it. The sums of all files by path in the folder."""
        self._stop.set()
        for thread in self._threads:
            thread.join(ROUND_SECONDS)
            if thread.is_alive():
                raise TimeoutError(f"a writer has not ended for {ROUND_SECONDS:g} s")
        if self._error:
            raise self._error
        return {f"writer{number}/{name}": one for number, sums in enumerate(self._sums) for name, one in sums.items()}


def _write_and_read(folder: Path, sums: dict[str, str], choices: random.Random) -> None:
    name = str(choices.randrange(2 * FILES))
    start = choices.randrange(len(POOL) - LARGEST)
    data = POOL[start : start + choices.randrange(1, LARGEST)]
    with (folder / name).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    sums[name] = hashlib.sha256(data).hexdigest()
    read = choices.choice(sorted(sums))
    if hashlib.sha256((folder / read).read_bytes()).hexdigest() != sums[read]:
        raise AssertionError(f"{folder / read} does not contain what was written")
    if len(sums) > FILES:
        gone = choices.choice(sorted(sums))
        (folder / gone).unlink()
        del sums[gone]


def run(*command: str) -> str:
    """Runs a command that must succeed; returns what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: status {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def info(client: Client) -> DeviceInfo:
    """Of the device."""
    (found,) = client.info(NAME)
    return found


@contextmanager
def supervised() -> Iterator[None]:
    """A supervisor that replaces workers however often they die."""
    ready, told = os.pipe()
    command = [sys.executable, "-m", "blkloom.supervisor", "--max-deaths=1000000", f"--ready-fd={told}"]
    with subprocess.Popen(command, pass_fds=[told]) as supervisor:
        os.close(told)
        if not os.read(ready, 1):
            raise AssertionError("the supervisor has not started")
        os.close(ready)
        try:
            yield
        finally:
            supervisor.terminate()


class Survival:
    """One file system on a node, under load."""

    def __init__(self, client: Client, options: argparse.Namespace) -> None:
        self._client = client
        self._options = options
        self._file = Path(options.folder, "disk.img")
        self._place = str(Path(options.folder, "mounted"))
        self._size, self._make = MAKE[options.system]

    def run(self) -> None:
        """All parts."""
        options = self._options
        self._file.unlink(missing_ok=True)
        with self._file.open("wb") as file:
            file.truncate(self._size)
        self._client.create(NAME, table=self._table())
        node = self._client.attach(NAME, via=options.via, options=ATTACH.get(options.via)).node.path
        run(*self._make, node)
        Path(self._place).mkdir(exist_ok=True)
        run("mount", "-t", options.system, node, self._place)
        load = Load(Path(self._place))
        try:
            for what in (self._kill, self._upgrade, self._swap):
                what(load)
            if options.grow:
                self._grow(load, node)
        finally:
            sums = load.finish()
        self._trim(node)
        run("umount", self._place)
        run(*CHECK[options.system], node)
        run("mount", "-t", options.system, "-o", "ro", node, self._place)
        self._compare(sums)
        run("umount", self._place)
        self._client.detach(NAME)
        self._client.remove(NAME)
        self._say(files=len(sums))

    def _table(self) -> str:
        return f"0 {self._size // 512} loop {self._file} {self._options.loop_options}".rstrip()

    def _kill(self, load: Load) -> None:
        longest = 0.0
        for _ in range(self._options.kills):
            load.wait_for_rounds()
            before = info(self._client)
            started = time.monotonic()
            os.kill(before.worker, signal.SIGKILL)
            self._client.wait(NAME, before.event)
            while (found := info(self._client)).worker in (0, before.worker):
                if found.state == "FAILED":
                    raise AssertionError(f"the device has failed: {found}")
                self._client.wait(NAME, found.event)
            load.wait_for_rounds(1)
            longest = max(longest, time.monotonic() - started)
        restarts = info(self._client).restarts
        if restarts != self._options.kills:
            raise AssertionError(f"{self._options.kills} kills, and {restarts} restarts")
        self._say(kills=restarts, longest=round(longest, 1))

    def _upgrade(self, load: Load) -> None:
        for _ in range(self._options.upgrades):
            before = info(self._client).worker
            self._client.upgrade()
            if info(self._client).worker == before:
                raise AssertionError("the upgrade has not replaced the worker")
            load.wait_for_rounds()
        self._say(upgrades=self._options.upgrades)

    def _swap(self, load: Load) -> None:
        for _ in range(self._options.swaps):
            self._client.load(NAME, self._table())
            self._client.resume(NAME)
            load.wait_for_rounds()
            self._client.suspend(NAME, timeout=ROUND_SECONDS)
            self._client.resume(NAME)
            load.wait_for_rounds()
        self._say(swaps=self._options.swaps)

    def _grow(self, load: Load, node: str) -> None:
        before = os.statvfs(self._place).f_blocks
        self._size *= 2
        os.truncate(self._file, self._size)
        self._client.load(NAME, self._table())
        self._client.resume(NAME)
        while int(run("blockdev", "--getsize64", node)) != self._size:  # the worker tells the kernel after the resume
            load.wait_for_rounds(1)
        run(*GROW[self._options.system](node, self._place))
        after = os.statvfs(self._place).f_blocks
        if after < before * 1.5:
            raise AssertionError(f"of {before} blocks, the file system has grown to {after}")
        load.wait_for_rounds()
        self._say(grown=self._size)

    def _trim(self, node: str) -> None:
        junk = Path(self._place, "junk")
        junk.write_bytes(os.urandom(16 * MiB))
        run("sync", "--file-system", self._place)
        full = self._file.stat().st_blocks * 512
        junk.unlink()
        run("umount", self._place)  # XFS frees the blocks of a deleted file in the background; an unmount ends that
        run("mount", "-t", self._options.system, node, self._place)
        run("fstrim", self._place)
        trimmed = self._file.stat().st_blocks * 512
        if full - trimmed < 12 * MiB:
            raise AssertionError(f"fstrim has freed {full - trimmed} bytes of {full}")
        self._say(trimmed=full - trimmed)

    def _compare(self, sums: dict[str, str]) -> None:
        place = Path(self._place)
        found = {
            str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in place.glob("writer*/*")
        }
        if found != sums:
            differing = sorted(name for name in found.keys() | sums.keys() if found.get(name) != sums.get(name))
            raise AssertionError(f"files differ: {', '.join(differing)}")

    def _say(self, **what: float) -> None:
        print(json.dumps({"via": self._options.via, "system": self._options.system, **what}), flush=True)


def main() -> None:
    """Runs as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--via", default="auto")
    parser.add_argument("--system", choices=sorted(MAKE), default="ext4")
    parser.add_argument("--folder", default="/run", help="for the file of the device, and to mount in")
    parser.add_argument("--loop-options", default="", help="of the loop target: '0 1 direct_io'")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--upgrades", type=int, default=0)
    parser.add_argument("--swaps", type=int, default=0)
    parser.add_argument("--grow", action="store_true")
    options = parser.parse_args()
    with supervised(), Client(start=False) as client:
        Survival(client, options).run()


if __name__ == "__main__":
    main()
