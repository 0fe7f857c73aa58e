"""QEMU's tools as the tests use them, to make, write, check and read images. Their results are the reference.

Source: qemu-img(1), qemu-io(1).
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_MEASURED: Final = 10
"""Times QEMU may measure its speed."""


class QemuError(Exception):
    """A tool of QEMU's refused; the text is its own."""


@dataclass(frozen=True)
class Checked:
    """What `qemu-img check` counted."""

    corruptions: int
    leaks: int
    errors: int
    said: str

    @property
    def whole(self) -> bool:
        """Nothing wrong, not even leaks."""
        return not (self.corruptions or self.leaks or self.errors)


def run(program: str, *arguments: str | Path, accept: tuple[int, ...] = (0,), cwd: Path | None = None) -> str:
    """Its standard output. Raises QemuError."""
    command = [program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=cwd, check=False)
    if done.returncode not in accept:
        raise QemuError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def qemu_img(*arguments: str | Path, accept: tuple[int, ...] = (0,), cwd: Path | None = None) -> str:
    return run("qemu-img", *arguments, accept=accept, cwd=cwd)


def create_encrypted(path: Path, size: int) -> None:
    """A LUKS image. QEMU measures how fast it derives keys, and now and then cannot: then it is asked again."""
    words = ["--object", "secret,id=s,data=123456", "-o", "encrypt.format=luks,encrypt.key-secret=s"]
    for attempt in range(_MEASURED):
        try:
            qemu_img("create", "-q", "-f", "qcow2", *words, "-o", "encrypt.iter-time=10", path, str(size))
        except QemuError as error:
            if "Unable to get accurate CPU usage" not in str(error) or attempt + 1 == _MEASURED:
                raise
        else:
            return


def qemu_io(path: str | Path, *commands: str) -> None:
    """Raises QemuError also where a command failed, which qemu-io may tell by words only."""
    words = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", "-f", "qcow2", path, *words)
    if "failed" in said or "error" in said.lower():
        raise QemuError(f"qemu-io {path} {commands}: {said}")


def check(path: Path, *, repair: str = "") -> Checked:
    """`qemu-img check`, or a repair (leaks, all) and what it found before it."""
    words = ["check", "--output=json", *(["-r", repair] if repair else []), "-f", "qcow2", str(path)]
    done = subprocess.run(["qemu-img", *words], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if not done.stdout.startswith("{"):
        raise QemuError(f"qemu-img {' '.join(words)}: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    return Checked(
        found.get("corruptions", 0), found.get("leaks", 0), found.get("check-errors", 0), done.stderr + done.stdout
    )


def content(path: Path, *, snapshot: str = "") -> bytes:
    """What a guest reads of the whole image, or of an internal snapshot."""
    out = path.with_name(path.name + ".content")
    words = ["-l", snapshot] if snapshot else []
    try:
        qemu_img("convert", "-f", "qcow2", *words, "-O", "raw", path, out)
        return out.read_bytes()
    finally:
        out.unlink(missing_ok=True)
