"""File system whose storage fails on command, for example when cached writes are synced.

`FaultyFileSystem(folder)` mounts a FUSE file system on `folder/mount`, over the files in `folder/disk`. What a test
writes to a file below `mount` is in the kernel's page cache at first and reaches the file of the same name below `disk`
when it is synced: `disk` shows what "the device" has. One flat folder of regular files; root or not.

    with FaultyFileSystem(tmp_path / "faulty") as faulty:
        path = faulty.file("disk.img", size=1 << 20)     # below the mount
        faulty.fail("write", errno.EIO)                  # every WRITE request from now on
        ...                                              # write(2) succeeds, fdatasync(2) fails: once
        faulty.mend()                                    # the device works again; what was written is lost
        faulty.on_disk("disk.img").read_bytes()

"write" fails what the kernel writes back (and O_DIRECT writes), "fsync" the flush of the device behind it, "read" reads
that are not in the cache, "fallocate" punched holes and preallocation. `name` limits that to one file, `count` to so
many requests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import pytest

from blkloom.export.fuse.uring import ENABLE

What = Literal["read", "write", "fsync", "fallocate"]


def needs_fuse() -> None:
    """Skips where this user can mount no FUSE file system, or not unmount it again."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse is missing or may not be opened (the kernel's module fuse)")
    if os.geteuid() == 0:
        return
    if not shutil.which("fusermount3"):
        pytest.skip("fusermount3 is missing (Debian package fuse3)")
    if not os.path.exists("/etc/mtab"):
        pytest.skip("fusermount3 unmounts nothing where /etc/mtab is missing")


def needs_fuse_uring() -> None:
    """Skips where the kernel serves no FUSE over io_uring. Root switches it on."""
    needs_fuse()
    if not ENABLE.exists():
        pytest.skip(f"the kernel has no FUSE over io_uring ({ENABLE} is missing; Linux 6.14 with CONFIG_FUSE_IO_URING)")
    if ENABLE.read_text().strip() != "Y" and os.access(ENABLE, os.W_OK):
        ENABLE.write_text("Y")
    if ENABLE.read_text().strip() != "Y":
        pytest.skip(f"the kernel's FUSE over io_uring is switched off (as root: echo Y > {ENABLE})")


_SERVER = Path(__file__).with_name("faulty_fuse.py")
_END_TIMEOUT = 60.0


class FaultyFileSystem:
    """Mounted from `__enter__` to `__exit__`. Skips the test where FUSE cannot be had."""

    def __init__(self, folder: Path) -> None:
        self.mount = folder / "mount"
        self.disk = folder / "disk"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        needs_fuse()
        self.mount.mkdir(parents=True)
        self.disk.mkdir()
        command = [sys.executable, str(_SERVER), str(self.disk), str(self.mount)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        self._read_answer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._running as process:  # closes the pipes; without its input the server unmounts and ends
            assert process.stdin, "a pipe"
            process.stdin.close()
            try:
                process.wait(_END_TIMEOUT)
            finally:
                process.kill()

    def file(self, name: str, *, size: int = 0, contents: bytes = b"") -> Path:
        """A new file, `contents` and then zeros up to `size`; on the disk already. Its path below the mount."""
        path = self.mount / name
        with path.open("xb") as file:
            file.write(contents)
            file.truncate(max(size, len(contents)))
            os.fsync(file)
        return path

    def on_disk(self, name: str) -> Path:
        """The file that has what really was written; only to be read."""
        return self.disk / name

    def fail(self, what: What, number: int, *, name: str = "", count: int | None = None) -> None:
        """Requests of that kind fail with the errno `number`: those for the file `name`, or for any; the next `count`
        of them, or all until `mend`.
        """
        self._command({"fail": what, "errno": number, "name": name, "count": count})

    def hold(self, what: What, *, name: str = "") -> None:
        """Requests of that kind are taken and not answered until `mend`: not even a killed process that waits for one
        ends before. At the end of the file system they fail.
        """
        self._command({"fail": what, "errno": 0, "name": name, "count": None})

    def held(self) -> int:
        """How many requests wait."""
        answer = self._command({"held": True})
        assert isinstance(answer, int)
        return answer

    def mend(self) -> None:
        """Nothing fails any more, and what was held is answered."""
        self._command({"mend": True})

    def count(self, what: What) -> int:
        """How many requests of that kind came so far, failed ones too."""
        answer = self._command({"count": what})
        assert isinstance(answer, int)
        return answer

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process, "it is not mounted"
        return self._process

    def _command(self, words: dict[str, object]) -> object:
        stdin = self._running.stdin
        assert stdin, "a pipe"
        stdin.write(json.dumps(words).encode() + b"\n")
        stdin.flush()
        return self._read_answer()

    def _read_answer(self) -> object:
        process = self._running
        assert process.stdout, "a pipe"
        assert process.stderr, "a pipe"
        line = process.stdout.readline()
        assert line, f"the file system's server ended: {process.stderr.read().decode()}"
        return json.loads(line)
