"""`make demo`: blkloom serves a disk made from two files and a disk in memory, and other NBD clients use them. Then it
attaches a device as a node (root: with a file system on it), whose worker is killed.

All files are in a new directory that is removed at the end. Exit status: 0 if every comparison succeeded, 1 with the
failed one, 2 if a program is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape

MiB = 1 << 20
FIRST = 8 * MiB
PIECE_AT, PIECE = 2 * MiB, 4 * MiB
"""Where in the second file the piece begins, and how long it is (bytes)."""
SECOND = 8 * MiB
MEMORY = 64 * MiB
CLIENTS = ("nbdinfo", "nbdcopy")
DISK = 64 * MiB
FILE_SYSTEM = ("mkfs.ext4", "mount", "umount", "blockdev", "e2fsck", "resize2fs")
"""Programs for a file system on a node."""
TIMEOUT = 60.0


class DemoError(Exception):
    """A step of the demo failed."""


@dataclass(frozen=True)
class Teller:
    """Prints the steps of the demo."""

    console: Console

    def step(self, text: str) -> None:
        """Print a headline."""
        self.console.print(f"\n[bold cyan]»[/] [bold]{escape(text)}[/]")

    def show(self, text: str) -> None:
        """Print a command or its output."""
        for line in text.splitlines():
            self.console.print(f"    [dim]{escape(line)}[/]", soft_wrap=True)

    def held(self, text: str) -> None:
        """Print the result of a successful check."""
        self.console.print(f"    [green]✔[/] {escape(text)}", soft_wrap=True)


def blkloom_command() -> str:
    """The `blkloom` command of this environment."""
    return str(Path(sys.executable).with_name("blkloom"))


@contextmanager
def serving(teller: Teller, arguments: Sequence[str], *, exports: int) -> Iterator[list[str]]:
    """Run `blkloom serve` for the block, then stop it as a service manager does. Yields the URIs."""
    command = [blkloom_command(), "serve", *arguments]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            uris = [process.stdout.readline().strip() for _ in range(exports)]
            if not all(uris):
                raise DemoError(f"blkloom serve ended with status {process.wait()} before it was ready")
            yield uris
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(TIMEOUT)
    if status != 0:
        raise DemoError(f"blkloom serve ended with status {status}")
    teller.held("the server finished what was in flight, flushed, and ended with status 0")


def run(teller: Teller, *command: str | Path) -> str:
    """Print and run a foreign program; return its output."""
    words = [str(word) for word in command]
    teller.show(f"$ {' '.join(words)}")
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    if done.returncode != 0:
        raise DemoError(f"{words[0]} ended with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def sha256(data: bytes) -> str:
    """The first digits of the digest."""
    return hashlib.sha256(data).hexdigest()[:16]


def same(teller: Teller, what: str, found: bytes, expected: bytes) -> None:
    """Check that bytes are the expected ones; raises DemoError with the first difference."""
    if found == expected:
        teller.held(f"{what} ({len(found) // MiB} MiB, sha256 {sha256(found)}…)")
        return
    shorter = min(len(found), len(expected))
    at = next((i for i in range(shorter) if found[i] != expected[i]), shorter)
    raise DemoError(f"{what}: NOT so, first difference at byte {at}")


def write_and_read_back(teller: Teller, uri: str, name: str, size: int, directory: Path, seed: int) -> bytes:
    """Fill an export with random bytes through nbdcopy, and compare them with the bytes that nbdcopy reads back."""
    written, read = directory / f"{name}.written", directory / f"{name}.read"
    data = random.Random(seed).randbytes(size)
    written.write_bytes(data)
    run(teller, "nbdcopy", "--flush", written, uri)
    run(teller, "nbdcopy", uri, read)
    same(teller, f"what comes back from {name!r} is what was written", read.read_bytes(), data)
    return data


def demo(teller: Teller, directory: Path) -> None:
    """Run all steps. Raises DemoError."""
    first, second = directory / "first.img", directory / "second.img"
    teller.step("Two files: one to be used whole, the other for its middle only")
    first.write_bytes(bytes(FIRST))
    around = random.Random(0).randbytes(SECOND)
    second.write_bytes(around)
    teller.show(f"{first}   {FIRST // MiB} MiB of zeros")
    teller.show(f"{second}  {SECOND // MiB} MiB of random bytes")

    teller.step("A table, as dmsetup reads it, combines them into one disk; another disk is in memory")
    table = f"0 {FIRST // 512} loop {first}\n{FIRST // 512} {PIECE // 512} loop {second} {PIECE_AT}"
    teller.show(f"woven:\n{table}\nmemory:\n0 {MEMORY // 512} ram")
    arguments = ["--device", f"woven={table}", "--device", f"memory=0 {MEMORY // 512} ram"]
    arguments += ["--socket", str(directory / "nbd.sock")]

    teller.step("blkloom serve brings both to any NBD client")
    with serving(teller, arguments, exports=2) as uris:
        by_name = {urlsplit(uri).path.lstrip("/"): uri for uri in uris}
        for uri in uris:
            teller.console.print(f"    [bold yellow]{escape(uri)}[/]", soft_wrap=True)

        teller.step("libnbd's nbdinfo sees them")
        # Without --no-content nbdinfo 1.14 prints bytes it never wrote where the program `file` is missing.
        for name, size in (("woven", FIRST + PIECE), ("memory", MEMORY)):
            found = json.loads(run(teller, "nbdinfo", "--no-content", "--json", by_name[name]))["exports"][0]
            if found["export-size"] != size:
                raise DemoError(f"nbdinfo says {found['export-size']} bytes for {name!r}, not {size}")
            teller.held(f"{name!r}: {size // MiB} MiB, contexts {', '.join(found.get('contexts', []))}")

        teller.step("libnbd's nbdcopy writes, flushes and reads back")
        woven = write_and_read_back(teller, by_name["woven"], "woven", FIRST + PIECE, directory, seed=1)
        write_and_read_back(teller, by_name["memory"], "memory", MEMORY, directory, seed=2)

        teller.step("SIGTERM")

    teller.step("Without the server: the right bytes are at the right places")
    same(teller, "first.img holds the first segment", first.read_bytes(), woven[:FIRST])
    held = second.read_bytes()
    end = PIECE_AT + PIECE
    same(teller, f"second.img holds the second from {PIECE_AT // MiB} MiB on", held[PIECE_AT:end], woven[FIRST:])
    same(teller, "what is around it was not touched", held[:PIECE_AT] + held[end:], around[:PIECE_AT] + around[end:])


@dataclass(frozen=True)
class Devices:
    """`blkloom` with a supervisor of the demo's own."""

    teller: Teller
    run_dir: Path

    def __call__(self, *words: str | Path) -> str:
        """Shows and runs a verb; returns what it printed."""
        self.teller.show(f"$ blkloom {' '.join(map(str, words))}")
        command = [blkloom_command(), "--run-dir", self.run_dir, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
        if done.returncode != 0:
            raise DemoError(f"blkloom {words[0]} ended with status {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    def kill_worker(self, name: str) -> None:
        """SIGKILL; another worker takes over."""
        worker = int(self("info", "-c", "--noheadings", "-o", "worker", name))
        self.teller.show(f"$ kill -9 {worker}    # the process that serves '{name}'")
        os.kill(worker, signal.SIGKILL)


def attached(teller: Teller, directory: Path) -> None:
    """A device as a node, which outlives its worker and grows. As root with a file system, else as a file. Raises
    DemoError.
    """
    blkloom = Devices(teller, directory / "run")
    image = directory / "disk.img"
    with image.open("wb") as file:
        file.truncate(DISK)
    blkloom("create", "disk", "--table", f"0 {DISK // 512} loop {image}")
    try:
        teller.step("A device as a node, which programs open")
        node = blkloom("attach", "disk")
        teller.held(f"the node is {node}")
        data = random.Random(3).randbytes(8 * MiB)
        if Path(node).is_block_device() and all(map(shutil.which, FILE_SYSTEM)):
            mounted(teller, blkloom, node, directory, data)
        else:
            teller.step("Its worker is killed while the file is in use")
            with open(node, "r+b", buffering=0) as opened:
                opened.write(data[: 4 * MiB])
                blkloom.kill_worker("disk")
                opened.write(data[4 * MiB :])
                os.fsync(opened.fileno())
                opened.seek(0)
                same(teller, "what was written before and after is there", opened.read(len(data)), data)
        blkloom("detach", "disk")
    finally:
        blkloom("stop", "--force")


def mounted(teller: Teller, blkloom: Devices, node: str, directory: Path, data: bytes) -> None:
    """A file system on the node, mounted while its worker is killed and the device grows. Raises DemoError."""
    place = directory / "mnt"
    place.mkdir()
    run(teller, "mkfs.ext4", "-q", node)
    run(teller, "mount", node, place)
    try:
        teller.step("A file system is mounted from it; its worker is killed")
        (place / "before").write_bytes(data)
        blkloom.kill_worker("disk")
        (place / "after").write_bytes(data)
        os.sync()
        same(teller, "the file from before is there", (place / "before").read_bytes(), data)
        teller.step("The device grows while it is mounted")
        with (directory / "disk.img").open("r+b") as file:
            file.truncate(2 * DISK)
        blkloom("load", "disk", "--table", f"0 {2 * DISK // 512} loop {directory}/disk.img")
        blkloom("resume", "disk")
        size = int(run(teller, "blockdev", "--getsize64", node))
        if size != 2 * DISK:
            raise DemoError(f"the node has {size} bytes, not {2 * DISK}")
        teller.held(f"the node has {size // MiB} MiB")
    finally:
        run(teller, "umount", place)
    run(teller, "e2fsck", "-f", "-p", node)
    run(teller, "resize2fs", node)
    run(teller, "mount", "-o", "ro", node, place)
    try:
        for name in ("before", "after"):
            same(teller, f"'{name}' is as it was written", (place / name).read_bytes(), data)
    finally:
        run(teller, "umount", place)


def main() -> int:
    """Run the demo; return the exit status."""
    console = Console(highlight=False)
    if absent := [client for client in CLIENTS if shutil.which(client) is None]:
        console.print(f"{' and '.join(absent)} missing: install libnbd's tools (Debian package libnbd-bin)")
        return 2
    with tempfile.TemporaryDirectory(prefix="blkloom-demo-") as directory:
        try:
            demo(Teller(console), Path(directory))
            if os.access("/dev/fuse", os.R_OK | os.W_OK):
                attached(Teller(console), Path(directory))
            else:
                console.print("\n/dev/fuse cannot be used here: no node is shown (blkloom doctor says more)")
        except DemoError as error:
            console.print(f"\n[bold red]✘ {escape(str(error))}[/]")
            return 1
    console.print("\n[bold green]All of it held.[/] Now yours:  .venv/bin/blkloom serve --ram 1G\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
