"""`blkloom stats`: prints counters and latencies, as text, JSON or for Prometheus."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from blkloom.cli.completing import complete_devices
from blkloom.cli.session import Session
from blkloom.errors import UsageError

if TYPE_CHECKING:
    from blkloom.control.client import Client
    from blkloom.metrics.sampling import Sample


@click.command()
@click.argument("devices", nargs=-1, metavar="[DEVICE]...", shell_complete=complete_devices)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: latencies in nanoseconds, all buckets.")
@click.option("--prometheus", is_flag=True, help="Print the text format of Prometheus.")
@click.option("--exports", is_flag=True, help="Also print each export (always there in the other two forms).")
@click.option("--histogram", is_flag=True, help="Print latency histograms as bars.")
@click.option(
    "--interval",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Print the changes in this many seconds, with rates, not the totals since the start.",
)
@click.option(
    "--count",
    type=click.IntRange(0),
    metavar="N",
    help="With --interval: number of intervals; 0: until interrupted.  [default: 1]",
)
@click.pass_context
def stats(
    context: click.Context,
    devices: tuple[str, ...],
    as_json: bool,
    prometheus: bool,
    exports: bool,
    histogram: bool,
    interval: float | None,
    count: int | None,
) -> None:
    """Print the requests, bytes, errors and latencies of devices.

    \b
    blkloom stats disk
    blkloom stats --interval 5
    blkloom stats --histogram disk
    blkloom stats --prometheus > /var/lib/node_exporter/blkloom.prom

    A worker counts from 0 when it starts. A request counts for the device that the client used.
    """
    if as_json and prometheus:
        raise UsageError("--json and --prometheus exclude each other")
    if prometheus and interval is not None:
        raise UsageError("--prometheus has counters since the beginning", cure="the scraper computes rates")
    if count is not None and interval is None:
        raise UsageError("--count needs --interval", cure="as in --interval 1 --count 10")
    session = Session(context)
    if prometheus:
        from blkloom.metrics.prometheus import exposition

        click.echo(exposition(_sample(session, devices)), nl=False)
        return
    if interval is None:
        _tell(session, _sample(session, devices), None, as_json, exports, histogram)
        return
    before = _sample(session, devices)
    left = 1 if count is None else count or -1
    while left:
        time.sleep(max(0.0, before.seconds + interval - time.monotonic()))
        now = _sample(session, devices)
        _tell(session, now, before, as_json, exports, histogram)
        before, left = now, left - 1


def take_sample(client: Client) -> Sample:
    """Counters of all devices now."""
    from blkloom.metrics.sampling import Sample

    version = client.version()
    infos = client.info()
    counters = client.stats()
    return Sample.of(infos, counters, version, time.monotonic())


def _sample(session: Session, devices: Sequence[str]) -> Sample:
    """Counters of the named devices, or of all. Raises VerbFailed for a device that does not exist."""
    from dataclasses import replace

    named = {session.info(session.named(text)).minor for text in devices}
    sample = take_sample(session.client)
    if not devices:
        return sample
    return replace(sample, devices={minor: device for minor, device in sample.devices.items() if minor in named})


def _tell(session: Session, now: Sample, before: Sample | None, as_json: bool, exports: bool, histogram: bool) -> None:
    from blkloom.metrics.report import as_dict, as_text

    if as_json:
        click.echo(json.dumps(as_dict(now, before), indent=None if before else 2))
    elif not now.devices:
        click.echo("No devices found")
    else:
        click.echo(as_text(now, before, exports=exports, histogram=histogram, show=session.show))
        if before:
            click.echo()
