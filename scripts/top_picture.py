"""Makes docs/top.svg: a frame of `blkloom top` with real devices under load.

`top_picture.py [FILE]`. A supervisor in a new directory gets devices of several kinds, and fio reads and writes them
over NBD. After some samples, the last frame of `blkloom top` is saved. One device is suspended with waiting requests,
and the worker of another is killed until the supervisor gives up, to show both states. Everything is removed at the
end. Needs fio with its nbd engine.
"""

from __future__ import annotations

import html
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME

from blkloom.cli.top import Watcher
from blkloom.cli.top_frame import AROUND, SPARK, Shape, draw, natural_width
from blkloom.cli.top_view import View
from blkloom.control.client import Client
from blkloom.errors import BlkloomError

PICTURE = Path(__file__).parent.parent / "docs" / "top.svg"
MiB = 1 << 20
SIZE = 256 * MiB
INTERVAL = 1.0
SAMPLES = SPARK + 2
SECONDS = 120
"""Run time of fio in seconds; it is stopped earlier."""
DEATHS = 10
"""More than the supervisor tries again."""

SECTORS = SIZE // 512
DEVICES = {
    "mail": f"0 {SECTORS} loop {{d}}/mail.img",
    "database": f"0 {SECTORS} striped 2 128 {{d}}/a.img 0 {{d}}/b.img 0",
    "cache": f"0 {SECTORS} ram",
    "root": f"0 {SECTORS // 2} loop {{d}}/root.img\n{SECTORS // 2} {SECTORS // 2} linear blkloom:cache 0",
    "home": f"0 {SECTORS // 4} linear blkloom:root {SECTORS // 4}",
    "sink": f"0 {SECTORS} zero",
    "staging": f"0 {SECTORS} ram",
    "archive": f"0 {SECTORS} loop {{d}}/archive.img",
}
"""Tables; {d} is the directory of the files."""
LOADS = {
    "mail": "--rw=randrw --bs=4k --iodepth=4 --rate_iops=1500,400 --rate_process=poisson",
    "database": "--rw=randrw --bs=16k --iodepth=16 --rate_iops=1200,500 --numjobs=2 --rate_process=poisson",
    "cache": "--rw=randread --bs=4k --iodepth=16 --rate_iops=9000 --thinktime=900ms --thinktime_iotime=2100ms",
    "root": "--rw=read --bs=256k --iodepth=4 --rate=90m --thinktime=700ms --thinktime_iotime=800ms",
    "home": "--rw=randwrite --bs=8k --iodepth=2 --rate_iops=400 --fsync=64",
    "sink": "--rw=write --bs=64k --iodepth=2 --thinktime=30ms --thinktime_blocks=4",
    "staging": "--rw=randwrite --bs=4k --iodepth=8 --rate_iops=2000",
}
"""Options of fio."""
SUSPENDED = "staging"
FAILED = "archive"

FONTS = "Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"


@contextmanager
def load(client: Client, device: str, options: str) -> Iterator[None]:
    """Run fio on the device for the block."""
    (info,) = client.info(device)
    uri = f"nbd+unix:///{device}?socket={info.exports[0].unix}"
    command = ["fio", f"--name={device}", "--ioengine=nbd", f"--uri={uri}", f"--size={info.size}", "--time_based"]
    command += ["--thread", f"--runtime={SECONDS}", "--output-format=terse", *options.split()]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield
        if process.poll() is not None:
            raise SystemExit(f"fio ended with status {process.returncode}: {' '.join(command)}")
    finally:
        process.kill()
        process.wait()


def fail(client: Client, device: str) -> None:
    """Kill the workers of the device until the supervisor starts no other one. Raises SystemExit."""
    for _ in range(DEATHS):
        before = client.info(device)[0]
        if before.state == "FAILED":
            return
        os.kill(before.worker, signal.SIGKILL)
        # Restarts back off; the state is what the supervisor says, not what we guess.
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            info = client.info(device)[0]
            if info.state == "FAILED" or (info.worker not in (0, before.worker) and client.stats(device)):
                break
            time.sleep(0.05)
    if client.info(device)[0].state != "FAILED":
        raise SystemExit(f"{device} did not fail after its worker died {DEATHS} times")


def saved(console: Console, title: str) -> str:
    """The printed frame as an SVG that needs no network and looks the same in every renderer."""
    svg = console.export_svg(title=title, theme=SVG_EXPORT_THEME)
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: (Fira Code|arial)[^;]*;", f"font-family: {FONTS};", svg)
    svg = re.sub(r"<text ([^>]*)>([^<]*)</text>", _without_spaces, svg)
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)


def _without_spaces(text: re.Match[str]) -> str:
    """A piece of text without leading spaces, because some viewers drop them."""
    words = html.unescape(text[2])
    kept = words.strip()
    if not kept:
        return ""
    attributes = dict(re.findall(r'([\w-]+)="([^"]*)"', text[1]))
    if "textLength" in attributes:
        width = float(attributes["textLength"]) / len(words)
        attributes["x"] = f"{float(attributes['x']) + words.index(kept[0]) * width:g}"
        attributes["textLength"] = f"{len(kept) * width:g}"
    escaped = html.escape(kept, quote=False).replace("\xa0", "&#160;")
    inside = " ".join(f'{name}="{value}"' for name, value in attributes.items())
    return f"<text {inside}>{escaped}</text>"


def main(picture: Path) -> None:
    """Make the picture. Raises SystemExit, BlkloomError, OSError."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blkloom-")))
        run_dir = directory / "run"
        client = stack.enter_context(Client(run_dir))
        stack.callback(client.stop)
        for file in ("mail", "a", "b", "root", "archive"):
            with open(directory / f"{file}.img", "wb") as image:
                os.posix_fallocate(image.fileno(), 0, SIZE)
        for name, table in DEVICES.items():
            client.create(name, table=table.format(d=directory))
        fail(client, FAILED)
        for name, options in LOADS.items():
            stack.enter_context(load(client, name, options))
        watcher = Watcher(client, frozenset(), INTERVAL, View())
        for number in range(SAMPLES):
            time.sleep(max(0.0, watcher.due - time.monotonic()))
            watcher.take()
            if number == 2:
                client.suspend(SUSPENDED)
        scene = watcher.scene()
        shape = Shape(natural_width(scene), len(scene.rows) + AROUND)
        with open(os.devnull, "w") as nowhere:
            console = Console(
                record=True, width=shape.width, file=nowhere, force_terminal=True, color_system="truecolor"
            )
            console.print(*draw(scene, shape), sep="\n", no_wrap=True)
        client.resume(SUSPENDED)
        picture.write_text(saved(console, "blkloom top"))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
    except BlkloomError as error:
        sys.exit(f"top_picture: {error}")
