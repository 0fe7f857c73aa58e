"""Measures start-up: the time from the start of a command to its result.

Three tables: a server until it sends the greeting, `blkloom ls` until it ends, and the first `blkloom create` of a run
directory, which starts supervisor, zygote and worker. They are compared with qemu-nbd and nbdkit, and with the bare
interpreter, the floor of all figures of blkloom. A server gets its socket (`servers.activated`), so that the greeting
is an event. Rounds are interleaved.

    bench/startup.py [--rounds N] BLKLOOM...    the median and the range, in milliseconds

Bytecode must exist (`make setup` compiles it): without it, and with PYTHONDONTWRITEBYTECODE set, every start compiles
all modules that it imports.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

import click

from servers import activated

_SIZE: Final = 64 << 20
_CREATE: Final = ("create", "disk", "--table", "0 2048 zero")

Measured = Callable[[], float]
"""Does once what is measured; the seconds that it took."""


def greeting(folder: Path, command: list[str]) -> float:
    """Time from the start of a server to the first bytes that a client of its Unix socket receives. Raises
    ServerError.
    """
    begun = time.perf_counter()
    with activated(command, path=folder / "startup.sock", log=folder / "startup.log"):
        return time.perf_counter() - begun


def ended(command: list[str], environment: Mapping[str, str] | None = None) -> float:
    """Time from the start of a command to its end. Raises CalledProcessError."""
    begun = time.perf_counter()
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return time.perf_counter() - begun


@contextmanager
def own_run_dir(blkloom: str) -> Iterator[dict[str, str]]:
    """Environment for commands with a new run directory; its supervisor is stopped at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="blkloom-bench-") as run_dir:
        environment = os.environ | {"BLKLOOM_RUN_DIR": run_dir}
        try:
            yield environment
        finally:
            ended([blkloom, "stop"], environment)


def first_create(blkloom: str) -> float:
    """Time of `blkloom create` without a running supervisor."""
    with own_run_dir(blkloom) as environment:
        return ended([blkloom, *_CREATE], environment)


def listing(blkloom: str) -> float:
    """Time of `blkloom ls` of one device."""
    with own_run_dir(blkloom) as environment:
        ended([blkloom, *_CREATE], environment)
        return ended([blkloom, "ls"], environment)


def tables(folder: Path, blklooms: tuple[str, ...]) -> dict[str, dict[str, Measured]]:
    """The tables to measure: title and contenders. folder: for sockets and the served file."""
    file = folder / "startup.img"
    file.touch()
    os.truncate(file, _SIZE)
    python = str(Path(blklooms[0]).with_name("python"))
    floors = {
        "python -c pass": partial(ended, [python, "-c", "pass"]),
        "python -I -S -c pass": partial(ended, [python, "-I", "-S", "-c", "pass"]),
    }
    peers = {
        name: partial(greeting, folder, [*command, str(file)])
        for name, *command in (("qemu-nbd", "qemu-nbd", "-f", "raw"), ("nbdkit", "nbdkit", "-f", "file"))
        if shutil.which(command[0])
    }
    return {
        "serve, from start to greeting": {
            **{blkloom: partial(greeting, folder, [blkloom, "serve", str(file)]) for blkloom in blklooms},
            **peers,
            **floors,
        },
        "ls of one device": {**{blkloom: partial(listing, blkloom) for blkloom in blklooms}, **floors},
        "first create": {**{blkloom: partial(first_create, blkloom) for blkloom in blklooms}, **floors},
    }


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
@click.argument("blklooms", nargs=-1, required=True, metavar="BLKLOOM...")
def main(rounds: int, blklooms: tuple[str, ...]) -> None:
    """Measure the start-up of one or several `blkloom` commands."""
    with tempfile.TemporaryDirectory(prefix="blkloom-bench-") as folder:
        for title, contenders in tables(Path(folder), blklooms).items():
            taken: dict[str, list[float]] = {name: [] for name in contenders}
            for number in range(rounds + 1):
                for name, measured in contenders.items():
                    milliseconds = 1000 * measured()
                    if number:  # the first round warms caches up
                        taken[name].append(milliseconds)
            click.echo(title)
            for name, values in taken.items():
                click.echo(f"  {median(values):7.1f} ms  ({min(values):.1f} to {max(values):.1f})  {name}")


if __name__ == "__main__":
    main()
