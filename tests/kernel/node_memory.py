"""Program: writers make much more data dirty on an ext4 on a node than the machine has memory.

    python node_memory.py --via ublk --seconds 600 --folder /run/backing [--loop-options "0 1 direct_io"]

The kernel frees memory by writing to the node, whose worker must not wait for that memory. Runs as root, in the run
directory BLKLOOM_RUN_DIR. folder: on a disk, not in memory. Writers write files without a sync, also through shared
mappings, and read former ones back; one allocates and touches memory, and frees it. In the end the file system is
unmounted and checked, and the files have the data. Prints what was done as JSON; fails if no writer makes progress for
STALL_SECONDS.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import threading
import time
import zlib
from pathlib import Path
from typing import Final

from node_survival import MiB, run, supervised

from blkloom.control.client import Client

STALL_SECONDS: Final = 180.0
"""Without progress of any writer: the machine hangs."""
WRITERS: Final = 2
FILES: Final = 12
"""Of each writer."""
FILE_SIZE: Final = 16 * MiB
BLOCK: Final = MiB
POOL: Final = random.Random(0).randbytes(2 * BLOCK)


class Writer(threading.Thread):
    """Writes files of FILE_SIZE, and compares former ones; `sums` has their checksums by path."""

    def __init__(self, folder: Path, number: int) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self._choices = random.Random(number)
        self._number = number
        self.stop = threading.Event()
        self.sums: dict[Path, int] = {}
        self.written = 0
        self.progress = time.monotonic()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Until `stop`."""
        try:
            while not self.stop.is_set():
                path = self._folder / f"{self._number}-{self._choices.randrange(FILES)}"
                self._write(path, mapped=self._choices.random() < 0.3)
                if self._choices.random() < 0.3:
                    self._compare(self._choices.choice(sorted(self.sums)))
        except BaseException as error:
            self.error = error

    def _write(self, path: Path, *, mapped: bool) -> None:
        self.sums.pop(path, None)
        sum_ = 0
        with path.open("w+b") as file:
            file.truncate(FILE_SIZE)
            memory = mmap.mmap(file.fileno(), FILE_SIZE) if mapped else None
            for offset in range(0, FILE_SIZE, BLOCK):
                start = self._choices.randrange(BLOCK)
                data = POOL[start : start + BLOCK]
                if memory is not None:
                    memory[offset : offset + BLOCK] = data
                else:
                    file.write(data)
                sum_ = zlib.crc32(data, sum_)
                self.written += BLOCK
                self.progress = time.monotonic()
                if self.stop.is_set():
                    return
            if memory is not None:
                memory.close()
        self.sums[path] = sum_

    def _compare(self, path: Path) -> None:
        found = sum_of(path)
        self.progress = time.monotonic()
        if found != self.sums[path]:
            raise AssertionError(f"{path} does not contain what was written")


def sum_of(path: Path) -> int:
    """Checksum of a file."""
    sum_ = 0
    with path.open("rb") as file:
        while data := file.read(BLOCK):
            sum_ = zlib.crc32(data, sum_)
    return sum_


def press(writers: list[Writer], seconds: float, size: int) -> int:
    """Allocates, touches and frees memory while the writers write. Returns how often."""
    end, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        with mmap.mmap(-1, size) as memory:
            for offset in range(0, size, mmap.PAGESIZE):
                memory[offset] = 1
        rounds += 1
        for writer in writers:
            if writer.error:
                raise writer.error
            if time.monotonic() - writer.progress > STALL_SECONDS:
                raise TimeoutError(f"a writer has made no progress for {STALL_SECONDS:g} s")
    return rounds


def main() -> None:
    """Runs as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--via", default="auto")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--loop-options", default="")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--press", type=int, default=24, help="MiB that are allocated and freed")
    options = parser.parse_args()
    size = 512 * MiB
    file, place = Path(options.folder, "disk.img"), Path(options.folder, "mounted")
    with file.open("wb") as disk:
        disk.truncate(size)
    place.mkdir(exist_ok=True)
    with supervised(), Client(start=False) as client:
        client.create("disk", table=f"0 {size // 512} loop {file} {options.loop_options}".rstrip())
        node = client.attach("disk", via=options.via).node.path
        run("mkfs.ext4", "-q", "-F", node)
        run("mount", node, str(place))
        writers = [Writer(place, number) for number in range(WRITERS)]
        for writer in writers:
            writer.start()
        rounds = press(writers, options.seconds, options.press * MiB)
        for writer in writers:
            writer.stop.set()
            writer.join(STALL_SECONDS)
            if writer.is_alive():
                raise TimeoutError("a writer does not end")
            if writer.error:
                raise writer.error
        sums = {path: sum_ for writer in writers for path, sum_ in writer.sums.items()}
        run("umount", str(place))
        run("e2fsck", "-f", "-n", node)
        run("mount", "-o", "ro", node, str(place))
        differing = [path.name for path, sum_ in sums.items() if sum_of(path) != sum_]
        if differing:
            raise AssertionError(f"files differ: {', '.join(differing)}")
        run("umount", str(place))
        restarts = client.info("disk")[0].restarts
        # The process that detaches reads its modules over 9p, which allocates large contiguous buffers.
        for name, value in {"drop_caches": "3", "compact_memory": "1"}.items():
            Path("/proc/sys/vm", name).write_text(value)
        client.detach("disk")
    written = sum(writer.written for writer in writers)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    done = {"written": written, "memory": memory, "files": len(sums), "pressed": rounds, "restarts": restarts}
    print(json.dumps({"via": options.via, **done}), flush=True)


if __name__ == "__main__":
    main()
