"""fio as a checker: it writes with checksums over several connections and reads everything back."""

from __future__ import annotations

import subprocess
from pathlib import Path
from urllib.parse import quote


class Verifying:
    """fio at work on an export; over when `finish` has seen it succeed."""

    def __init__(self, fio: str, socket: Path, *, jobs: int, size: int, loops: int, folder: Path) -> None:
        """size: bytes a job writes, each in a range of its own; loops: how often."""
        self._log = folder / f"fio-{socket.name}.log"
        command = [
            fio,
            "--name=witness",
            "--ioengine=nbd",
            f"--uri=nbd+unix:///?socket={quote(str(socket))}",
            "--thread",
            "--rw=randwrite",
            "--bs=4k-16k",
            "--iodepth=8",
            f"--numjobs={jobs}",
            f"--size={size}",
            f"--offset_increment={size}",
            f"--loops={loops}",
            "--verify=crc32c",
            "--verify_backlog=256",
            "--verify_fatal=1",
            "--fsync=64",
            "--group_reporting",
            f"--output={self._log}",
        ]
        self._process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL)

    def running(self) -> bool:
        """Whether it is still at it."""
        return self._process.poll() is None

    def finish(self, timeout: float = 240) -> None:
        """Waits for it; everything it wrote it must have read back."""
        try:
            status = self._process.wait(timeout)
        finally:
            self._process.kill()
        text = self._log.read_text()
        assert status == 0, text
        assert "err= 0" in text, text
        assert "verify:" not in text, text
