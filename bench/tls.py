"""Measures NBD over TLS beside qemu-nbd and nbdkit, and beside a TLS server that has no data to move.

    bench/tls.py
    bench/tls.py --seconds 5 --rounds 5 --only 'read'

The client (`tls_load.py`, libnbd) is the same for all, and so are its pre-shared key and socket: TLS 1.3 over a Unix
socket. The server chooses the cipher: blkloom AES-128-GCM; qemu-nbd is measured with its own choice and with that one.
The null server is blkloom's own with the target `zero`: what it needs is encryption, the socket and the client. All
others have the data in memory. Each round measures every server once; results are medians. A ratio above 1 says that
blkloom answers more requests in a second, or needs less of the processors: seconds of the server for 1 GiB. Results are
stored in bench/results/tls.json. Exit codes: 0 measured, 1 a program has failed, 2 wrong usage.
"""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple
from urllib.parse import quote

import click

from machine import versions
from servers import Server, activated, announcing

_RESULTS: Final = Path(__file__).resolve().parent / "results" / "tls.json"
_CLIENT: Final = ["/usr/bin/python3", str(Path(__file__).with_name("tls_load.py"))]
_SIZE: Final = 512 << 20
_GIB: Final = 1 << 30
_OURS: Final = "blkloom ram"
_NULL: Final = "blkloom zero"
_PLAIN: Final = "blkloom ram, no TLS"
_USER: Final = "bench"
_DEPTH: Final = 16
_BLOCKS: Final = {"64K": 64 << 10, "4K": 4 << 10, "1M": 1 << 20}


class Row(NamedTuple):
    """One kind of request."""

    direction: str
    block: str

    @property
    def name(self) -> str:
        return f"{self.block} {self.direction}, qd {_DEPTH}"


class Cell(NamedTuple):
    """Results of one server in each round: MiB in a second; seconds of processors, its and the client's, for 1 GiB."""

    speed: list[float]
    server: list[float]
    client: list[float]


ROWS: Final = [Row(direction, block) for block in _BLOCKS for direction in ("read", "write")]


@contextmanager
def _servers(blkloom: str, folder: Path, stack: ExitStack) -> Iterator[dict[str, tuple[Server, str]]]:
    """All servers, with their URIs."""
    keys = folder / "keys.psk"
    keys.write_text(f"{_USER}:{secrets.token_hex(32)}\n")
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(_SIZE)
    tls = ["--tls=require", f"--tls-psk={keys}"]
    found: dict[str, tuple[Server, str]] = {}

    def socket(name: str) -> Path:
        return folder / f"{name}.sock"

    def uri(path: Path) -> str:
        return f"nbds+unix://{_USER}@/?socket={quote(str(path))}&tls-psk-file={quote(str(keys))}"

    for name, table, options in (
        (_OURS, f"0 {_SIZE // 512} ram", tls),
        (_NULL, f"0 {_SIZE // 512} zero", tls),
        (_PLAIN, f"0 {_SIZE // 512} ram", []),
    ):
        path = socket(f"b{len(found)}")
        command = [blkloom, "serve", "--table", table, "--socket", str(path), *options]
        server = stack.enter_context(announcing(command, ready="nbd", log=folder / "blkloom.log"))
        found[name] = (server, uri(path) if options else f"nbd+unix:///?socket={quote(str(path))}")
    path = socket("nbdkit")
    command = ["nbdkit", *tls, "-t", "4", "memory", str(_SIZE), "allocator=malloc"]
    found["nbdkit memory"] = (stack.enter_context(activated(command, path=path, log=folder / "nbdkit.log")), uri(path))
    for name, priority in (("qemu-nbd", ""), ("qemu-nbd AES-128-GCM", ",priority=NORMAL:-CIPHER-ALL:+AES-128-GCM")):
        path = socket(f"q{len(found)}")
        credentials = f"tls-creds-psk,id=t,dir={folder},endpoint=server{priority}"
        command = ["qemu-nbd", "-t", "-f", "raw", "-e", "4", "--object", credentials, "--tls-creds", "t", str(image)]
        found[name] = (stack.enter_context(activated(command, path=path, log=folder / "qemu.log")), uri(path))
    yield found


def _measure(row: Row, server: Server, uri: str, seconds: float, cell: Cell) -> None:
    block = _BLOCKS[row.block]
    before = server.cpu_seconds()
    command = [*_CLIENT, uri, row.direction, str(block), str(_DEPTH), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: status {done.returncode}: {done.stderr}")
    requests, took, busy = map(float, done.stdout.split())
    moved = requests * block
    cell.speed.append(moved / took / (1 << 20))
    cell.server.append((server.cpu_seconds() - before) / moved * _GIB)
    cell.client.append(busy / moved * _GIB)


@click.command()
@click.option("--seconds", default=3.0, help="Of each measurement.")
@click.option("--rounds", default=5, help="How often each server is measured.")
@click.option("--only", default="", help="Rows whose name has this regular expression.")
@click.option("--store/--no-store", default=True, help="Keep the results.")
def main(seconds: float, rounds: int, only: str, store: bool) -> None:
    """Measures all servers, and prints medians and ratios."""
    blkloom = str(Path(sys.executable).with_name("blkloom"))
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    with tempfile.TemporaryDirectory(prefix="blkloom-tls-", dir="/dev/shm") as folder, ExitStack() as stack:
        servers = stack.enter_context(_servers(blkloom, Path(folder), stack))
        for name in (_OURS, _PLAIN):  # memory that was never written is not there yet
            _measure(Row("write", "1M"), *servers[name], seconds, Cell([], [], []))
        for row in ROWS:
            if not re.search(only, row.name):
                continue
            cells = {name: Cell([], [], []) for name in servers}
            for _ in range(rounds):
                for name, (server, uri) in servers.items():
                    _measure(row, server, uri, seconds, cells[name])
            ours = cells[_OURS]
            click.echo(row.name)
            for name, cell in cells.items():
                speed, cost = median(cell.speed), median(cell.server)
                ratios = f"{median(ours.speed) / speed:5.2f} {cost / median(ours.server):5.2f}"
                processors = f"processors for 1 GiB: server {cost:5.2f} s, client {median(cell.client):5.2f} s"
                click.echo(f"  {name:20} {speed:7.0f} MiB/s, {processors}, ratios {ratios}")
            found[row.name] = {name: cell._asdict() for name, cell in cells.items()}
    if store:
        text = {"date": datetime.now(UTC).isoformat(), "versions": versions(blkloom), "rows": found}
        _RESULTS.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
