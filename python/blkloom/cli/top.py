"""`blkloom top`: shows the activity of devices, live.

A sample is read from the supervisor in every interval. `blkloom.metrics` computes rates from the last two samples, and
`top_frame` draws them. If the supervisor disappears (an upgrade, a restart), the display says so and tries to reconnect
in every interval. If it cannot be reached at the start, that is an error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

import click
from rich.console import Console, Group
from rich.live import Live

from blkloom.cli.completing import complete_devices
from blkloom.cli.session import Session
from blkloom.cli.stats import take_sample
from blkloom.cli.terminal import HUNG_UP, RESIZED, SUSPENDED, Terminal, stop_until_continued
from blkloom.cli.top_frame import SPARK, TOTAL, Scene, Shape, draw, natural_width, plain
from blkloom.cli.top_view import QUIT_KEYS, View
from blkloom.errors import BlkloomError, UsageError
from blkloom.metrics.history import History
from blkloom.metrics.ordering import Order, ordered
from blkloom.metrics.rates import rows_between, total_of
from blkloom.metrics.sampling import Sample
from blkloom.printing import described

if TYPE_CHECKING:
    from blkloom.control.client import Client


@click.command()
@click.argument("devices", nargs=-1, metavar="[DEVICE]...", shell_complete=complete_devices)
@click.option("-b", "--batch", is_flag=True, help="Print frames one after the other; one frame without -n.")
@click.option("--once", is_flag=True, help="Print one frame: the same as -b -n 1.")
@click.option("-n", "--iterations", type=click.IntRange(1), metavar="N", help="End after this many frames.")
@click.option(
    "-d",
    "--interval",
    type=click.FloatRange(0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="What rates are taken over.",
)
@click.option(
    "-s",
    "--sort",
    type=click.Choice([order.value for order in Order]),
    default=Order.IOPS.value,
    show_default=True,
    help="Sort order of the devices.",
)
@click.option("--reverse", is_flag=True, help="Sort the other way round.")
@click.pass_context
def top(
    context: click.Context,
    devices: tuple[str, ...],
    batch: bool,
    once: bool,
    iterations: int | None,
    interval: float,
    sort: str,
    reverse: bool,
) -> None:
    """Watch the activity of devices: requests and bytes per second, latencies, queues.

    \b
    blkloom top
    blkloom top -d 5 -s latency disk other
    blkloom top --once | grep disk

    \b
    i b l n      sort by IOPS, bandwidth, latency or name; once more: the other way
    r            the other way
    j k, arrows  scroll
    q            quit

    Latencies are those of the last interval. DEPTH counts requests in flight and requests that wait for a
    suspended device. Without a terminal it prints one frame and ends, as with --once.
    """
    if once and (iterations or 1) != 1:
        raise UsageError(f"--once and -n {iterations} exclude each other")
    session = Session(context)
    named = frozenset(session.info(session.named(text)).minor for text in devices)
    watcher = Watcher(session.client, named, interval, View(Order(sort), reverse), session.show)
    console = Console(highlight=False)
    if once or batch or not console.is_terminal:
        _print(watcher, console, 1 if once else iterations or 1)
        return
    keys = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None

    def reconnect() -> Client:
        from blkloom.cli.connecting import connect

        return context.with_resource(connect(session.run_dir, start=False))  # the user or the system has stopped it

    try:
        while not _watch(watcher, console, keys, iterations, reconnect):
            stop_until_continued()
    except KeyboardInterrupt:
        pass  # the usual way to quit


class Watcher:
    """State of the display: the last two samples, the history, and the view. One thread."""

    def __init__(
        self,
        client: Client,
        named: frozenset[int],
        interval: float,
        view: View,
        show: Callable[[str], str] = str,
    ) -> None:
        """named: minor numbers of the devices to show; empty: all."""
        self.client = client
        self.interval = interval
        self.view = view
        self.pictures = 0
        self.problem = ""
        self._named = named
        self._show = show
        self._before: Sample | None = None
        self._now: Sample | None = None
        self._past = History(SPARK)
        self._taken = datetime.now()

    @property
    def due(self) -> float:
        """Time of the next sample, on the monotonic clock."""
        return time.monotonic() if self._now is None else self._now.seconds + self.interval

    def take(self) -> None:
        """Takes a sample. Raises the errors of the client; the last samples then stay."""
        sample = take_sample(self.client)
        if self._named:
            kept = {minor: device for minor, device in sample.devices.items() if minor in self._named}
            sample = Sample(sample.seconds, kept, sample.run_dir, sample.version, sample.workers)
        self._before, self._now = self._now, sample
        self._taken = datetime.now()
        self.problem = ""
        rows = rows_between(self._before, sample)
        total = total_of(rows)
        iops = {row.info.minor: row.rates.iops if row.rates else None for row in rows}
        self._past.add({**iops, TOTAL: total.rates.iops if total.rates else None})

    def scene(self) -> Scene:
        """The scene to draw now. There must be at least one sample."""
        assert self._now is not None, "take() comes first"
        rows = rows_between(self._before, self._now)
        return Scene(
            self._now,
            ordered(rows, self.view.order, reverse=self.view.reverse),
            total_of(rows),
            {minor: self._past[minor] for minor in (*self._now.devices, TOTAL)},
            view=self.view,
            interval=self.interval,
            clock=self._taken.strftime("%H:%M:%S"),
            problem=self.problem,
            show=self._show,
        )

    def press(self, key: str, page: int) -> None:
        """Changes the view as the key says."""
        rows = len(self._now.devices) if self._now else 0
        self.view = self.view.after(key, rows=rows, page=page)


def _print(watcher: Watcher, console: Console, pictures: int) -> None:
    """Prints one frame for each interval, in full width because there is no terminal."""
    watcher.take()
    for number in range(pictures):
        time.sleep(max(0.0, watcher.due - time.monotonic()))
        watcher.take()
        scene = watcher.scene()
        width = console.width if console.is_terminal else natural_width(scene)
        lines = draw(scene, Shape(width, ascii_only=_ascii_only(console)))
        if number:
            click.echo()
        if console.is_terminal:
            console.print(*lines, sep="\n", no_wrap=True, overflow="crop")
        else:
            click.echo(plain(lines))


def _watch(
    watcher: Watcher, console: Console, keys: int | None, iterations: int | None, reconnect: Callable[[], Client]
) -> bool:
    """Full-screen mode until the user quits (returns True) or presses ^Z."""
    if watcher.pictures == 0:
        watcher.take()
    with (
        Terminal(keys) as terminal,
        Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live,
    ):
        _show(watcher, console, live)
        watcher.pictures += 1
        next_at = watcher.due
        while iterations is None or watcher.pictures < iterations:
            events = terminal.wait(next_at - time.monotonic())
            if SUSPENDED in events:
                return False
            for event in events:
                if event in QUIT_KEYS or event == HUNG_UP:
                    return True
                if event != RESIZED:
                    watcher.press(event, _shape(console).page or 1)
            if time.monotonic() >= next_at:
                _take(watcher, reconnect)
                watcher.pictures += 1
                next_at = max(watcher.due, time.monotonic() + watcher.interval / 2)
            _show(watcher, console, live)
    return True


def _take(watcher: Watcher, reconnect: Callable[[], Client]) -> None:
    try:
        if watcher.problem:
            watcher.client = reconnect()
        watcher.take()
    except (BlkloomError, OSError) as error:
        watcher.problem = f"old numbers: {described(error)}"


def _show(watcher: Watcher, console: Console, live: Live) -> None:
    live.update(Group(*draw(watcher.scene(), _shape(console))), refresh=True)


def _shape(console: Console) -> Shape:
    return Shape(console.width, console.height, _ascii_only(console))


def _ascii_only(console: Console) -> bool:
    return console.options.ascii_only
