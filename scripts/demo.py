"""`make demo`: blkloom serves a woven disk and a disk of memory, and NBD clients of others use them.

Everything happens in a new directory that is removed at the end. Exits 0 when every comparison held;
1 with what did not; 2 when a program that takes part is missing.
"""

from __future__ import annotations

import hashlib
import json
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
TIMEOUT = 60.0


class DemoError(Exception):
    """A step that did not come out as promised."""


@dataclass(frozen=True)
class Teller:
    """Says what happens, step by step."""

    console: Console

    def step(self, text: str) -> None:
        """A headline."""
        self.console.print(f"\n[bold cyan]»[/] [bold]{escape(text)}[/]")

    def show(self, text: str) -> None:
        """Something that was run or printed, as it is."""
        for line in text.splitlines():
            self.console.print(f"    [dim]{escape(line)}[/]", soft_wrap=True)

    def held(self, text: str) -> None:
        """Something that was checked and is so."""
        self.console.print(f"    [green]✔[/] {escape(text)}", soft_wrap=True)


def blkloom_command() -> str:
    """The command of this environment."""
    return str(Path(sys.executable).with_name("blkloom"))


@contextmanager
def serving(teller: Teller, arguments: Sequence[str], *, exports: int) -> Iterator[list[str]]:
    """`blkloom serve` until the block ends, then stopped as a service manager would. Yields the URIs."""
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
    """Shows and runs a program of others; returns what it printed."""
    words = [str(word) for word in command]
    teller.show(f"$ {' '.join(words)}")
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    if done.returncode != 0:
        raise DemoError(f"{words[0]} ended with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def sha256(data: bytes) -> str:
    """The digest, as far as a person compares."""
    return hashlib.sha256(data).hexdigest()[:16]


def same(teller: Teller, what: str, found: bytes, expected: bytes) -> None:
    """Says that bytes are those expected, or raises DemoError saying where they first differ."""
    if found == expected:
        teller.held(f"{what} ({len(found) // MiB} MiB, sha256 {sha256(found)}…)")
        return
    shorter = min(len(found), len(expected))
    at = next((i for i in range(shorter) if found[i] != expected[i]), shorter)
    raise DemoError(f"{what}: NOT so, first difference at byte {at}")


def write_and_read_back(teller: Teller, uri: str, name: str, size: int, directory: Path, seed: int) -> bytes:
    """Fills an export with random bytes through nbdcopy and compares what nbdcopy reads back."""
    written, read = directory / f"{name}.written", directory / f"{name}.read"
    data = random.Random(seed).randbytes(size)
    written.write_bytes(data)
    run(teller, "nbdcopy", "--flush", written, uri)
    run(teller, "nbdcopy", uri, read)
    same(teller, f"what comes back from {name!r} is what was written", read.read_bytes(), data)
    return data


def demo(teller: Teller, directory: Path) -> None:
    """All of it. Raises DemoError."""
    first, second = directory / "first.img", directory / "second.img"
    teller.step("Two files: one to be used whole, the other for its middle only")
    first.write_bytes(bytes(FIRST))
    around = random.Random(0).randbytes(SECOND)
    second.write_bytes(around)
    teller.show(f"{first}   {FIRST // MiB} MiB of zeros")
    teller.show(f"{second}  {SECOND // MiB} MiB of random bytes")

    teller.step("A table, as dmsetup reads it, weaves them into one disk; memory makes another")
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


def main() -> int:
    """Runs the demo; returns the exit status."""
    console = Console(highlight=False)
    if absent := [client for client in CLIENTS if shutil.which(client) is None]:
        console.print(f"{' and '.join(absent)} missing: install libnbd's tools (Debian package libnbd-bin)")
        return 2
    with tempfile.TemporaryDirectory(prefix="blkloom-demo-") as directory:
        try:
            demo(Teller(console), Path(directory))
        except DemoError as error:
            console.print(f"\n[bold red]✘ {escape(str(error))}[/]")
            return 1
    console.print("\n[bold green]All of it held.[/] Now yours:  .venv/bin/blkloom serve --ram 1G\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
