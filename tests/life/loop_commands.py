"""`blkloom loop` for tests: the commands, and queries about its devices."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from blkloom.control.client import Client


@dataclass(frozen=True)
class Loop:
    """`blkloom loop ...` as a process. attach: devices are attached as well, where it may."""

    command: str
    run_dir: Path
    attach: bool = False

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Whatever comes of it."""
        return subprocess.run(
            [self.command, "loop", *([] if self.attach else ["--no-attach"]), *map(str, words)],
            env={**os.environ, "BLKLOOM_RUN_DIR": str(self.run_dir), "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=60,
            check=False,
        )

    def __call__(self, *words: str | Path) -> str:
        """What it prints; it succeeds and complains of nothing."""
        done = self.run(*words)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def fails(self, *words: str | Path) -> str:
        """What it says; it fails as losetup does and prints nothing."""
        done = self.run(*words)
        assert (done.returncode, done.stdout) == (1, "")
        return done.stderr


def cells(line: str) -> list[str]:
    return line.split()


def names(client: Client) -> list[str]:
    return sorted(device.name for device in client.info())


def until_gone(client: Client, *gone: str) -> None:
    """Waits for devices to go by themselves."""
    while {device.name for device in client.info()} & set(gone):
        pass
