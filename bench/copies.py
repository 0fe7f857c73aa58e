"""Measures `blkloom copy` beside nbdcopy and qemu-img convert.

    bench/copies.py --directory /dev/shm --directory /var/tmp
    bench/copies.py --directory /dev/shm --size 1G --rounds 5 --only 'raw to raw'

Each round runs every command once, on the same source, to a new target that is flushed at the end; qemu-img writes out
of order with 16 requests. A ratio above 1 says that blkloom needs less time (the medians of the rounds). Seconds of
processors are those of the command with its servers. The pages of the source stay in the page cache. nbdcopy copies to
images through qemu-nbd. Results are stored in bench/results/copies.json. Exit codes: 0 measured, 1 a command has
failed, 2 wrong usage.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

import click
from blkloom.units import parse_size

from machine import versions

_RESULTS: Final = Path(__file__).resolve().parent / "results" / "copies.json"
_BLOCK: Final = 1 << 20
_QEMU: Final = "qemu-img convert -W -m 16 -t writeback"
_OURS: Final = "blkloom copy"

Commands = dict[str, str]

_NBD_IN: Final = "nbdcopy --flush {source} -- [ qemu-nbd -f qcow2 t.qcow2 ]"
_NBD_OUT: Final = "nbdcopy --flush -- [ qemu-nbd -r -f qcow2 {source} ] o.img"


def _commands(source: str, formats: tuple[str, str], nbd: str) -> Commands:
    first, second = formats
    target = "o.img" if second == "raw" else "o.qcow2"
    return {
        _OURS: f"{{blkloom}} copy -q {source} {target}",
        "nbdcopy": nbd.format(source=source),
        "qemu-img": f"{_QEMU} -f {first} -O {second} {source} {target}",
    }


ROWS: Final[dict[str, Commands]] = {
    "raw to raw, full": _commands("full.img", ("raw", "raw"), "nbdcopy --flush {source} o.img"),
    "raw to raw, a quarter is data": _commands("sparse.img", ("raw", "raw"), "nbdcopy --flush {source} o.img"),
    "raw to qcow2, full": _commands("full.img", ("raw", "qcow2"), _NBD_IN),
    "raw to qcow2, a quarter is data": _commands("sparse.img", ("raw", "qcow2"), _NBD_IN),
    "qcow2 to raw, full": _commands("full.qcow2", ("qcow2", "raw"), _NBD_OUT),
}


class Cell(NamedTuple):
    """Seconds of one command in each round: on the clock, and of processors."""

    clock: list[float]
    processor: list[float]


def _make_sources(size: int) -> None:
    """full.img: random data. sparse.img: of each 16 MiB, 4 have data. full.qcow2: the image of full.img."""
    with open("full.img", "wb") as full, open("sparse.img", "wb") as sparse:
        sparse.truncate(size)
        for at in range(0, size, _BLOCK):
            data = os.urandom(_BLOCK)
            full.write(data)
            if at // _BLOCK % 16 < 4:
                os.pwrite(sparse.fileno(), data, at)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "full.img", "full.qcow2"], check=True)
    os.sync()


def _measure(command: str, blkloom: str, size: int, cell: Cell) -> None:
    for name in ("o.img", "o.qcow2", "t.qcow2"):
        Path(name).unlink(missing_ok=True)
    if "t.qcow2" in command:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "t.qcow2", str(size)], check=True)
    os.sync()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.monotonic()
    done = subprocess.run(command.format(blkloom=blkloom).split(), capture_output=True, text=True, check=False)
    cell.clock.append(time.monotonic() - begun)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cell.processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    if done.returncode:
        sys.exit(f"{command}: status {done.returncode}: {done.stderr}")


def _file_system(folder: str) -> str:
    return subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True).stdout.strip()


@click.command()
@click.option("--directory", "directories", multiple=True, default=["/dev/shm"], help="Where to copy, one or more.")
@click.option("--size", default="4G", help="Of the disk.")
@click.option("--rounds", default=5, help="How often each command runs.")
@click.option("--only", default="", help="Rows whose name has this regular expression.")
@click.option("--store/--no-store", default=True, help="Keep the results.")
def main(directories: tuple[str, ...], size: str, rounds: int, only: str, store: bool) -> None:
    """Measures copies in each directory, and prints medians and ratios."""
    blkloom = str(Path(sys.executable).with_name("blkloom"))
    length = int(parse_size(size)) // (16 * _BLOCK) * 16 * _BLOCK
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for directory in directories:
        folder = tempfile.mkdtemp(prefix="blkloom-copies-", dir=directory)
        try:
            os.chdir(folder)
            where = _file_system(folder)
            _make_sources(length)
            for row, commands in ROWS.items():
                if not re.search(only, row):
                    continue
                cells = {name: Cell([], []) for name in commands}
                for _ in range(rounds):
                    for name, command in commands.items():
                        _measure(command, blkloom, length, cells[name])
                ours = cells[_OURS]
                click.echo(f"{where}: {row}")
                for name, cell in cells.items():
                    clock, processor = median(cell.clock), median(cell.processor)
                    ratios = f"{clock / median(ours.clock):5.2f} {processor / median(ours.processor):5.2f}"
                    click.echo(f"  {name:14} {clock:7.2f} s, processors {processor:6.2f} s, ratios {ratios}")
                found[f"{where}: {row}"] = {name: cell._asdict() for name, cell in cells.items()}
        finally:
            os.chdir("/")
            shutil.rmtree(folder)
    if store:
        text = {"date": datetime.now(UTC).isoformat(), "size": length, "versions": versions(blkloom), "rows": found}
        _RESULTS.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
