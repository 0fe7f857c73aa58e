"""`make bench`: measures blkloom and its peers, stores the results, and writes the report.

    bench/run.py                    all rows, 5 rounds, less than 50 minutes; results go to bench/results
    bench/run.py --quick            2 short rounds, to see that it works
    bench/run.py --only 'direct'    some rows
    bench/run.py --before COMMAND   an older build of blkloom in the same rounds; takes a third longer
    bench/run.py --report           write docs/performance.md and its appendix from bench/results

Progress goes to standard error, the names of the written files to standard output. Exit codes: 0 measured (the report
says which goals were met), 1 some row of blkloom could not be measured, 2 wrong usage.
"""

from __future__ import annotations

import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import counting
import mail_results
from appendix import appendix
from ground import Ground
from jobs import Client
from machine import facts, versions
from measuring import Effort, Workload, measure
from plot import svg
from reporting import page
from results import Missing, Run, compare, load, save
from rows import workloads

_HERE: Final = Path(__file__).resolve().parent
_RESULTS: Final = _HERE / "results"
_PAGE: Final = _HERE.parent / "docs" / "performance.md"
_SIZE: Final = 256 << 20
FULL: Final = Effort(rounds=5, seconds=0.4, warm_up=0.15)
QUICK: Final = Effort(rounds=2, seconds=0.3, warm_up=0.1)

_SESSION_SECONDS: Final = 0.45
"""To start a contender, fill it if it is memory, and end it."""
_CLIENT_SECONDS: Final[dict[Client, float]] = {
    **dict.fromkeys(get_args(Client), 0.05),
    "fio": 0.3,
    "": 0.0,
}
"""To start a client and end it."""


def minutes(chosen: list[Workload], effort: Effort) -> float:
    """Estimated duration of the measurements, without the preparation of files and disks."""
    seconds = 0.0
    for workload in chosen:
        for contender in workload.contenders:
            seconds += _SESSION_SECONDS + max(effort.warm_up, workload.warm_up)
            first, *_ = contender.clients
            seconds += sum(workload.seconds(effort, c, first) + _CLIENT_SECONDS[c] for c in contender.clients)
    return seconds * effort.rounds / 60


@click.command()
@click.option("--quick", is_flag=True, help="Two short rounds; figures are not for quoting.")
@click.option("--only", metavar="REGEX", help="Only rows whose name matches (see --list).")
@click.option("--list", "listing", is_flag=True, help="Print the rows and who takes part, and stop.")
@click.option("--again", is_flag=True, help="With --only: put these rows into OUT/latest.json.")
@click.option("--rounds", type=click.IntRange(1), help=f"Rounds; {FULL.rounds} unless --quick.")
@click.option("--seconds", type=click.FloatRange(0.1), help=f"Of each measurement; {FULL.seconds:g} unless --quick.")
@click.option("--out", type=click.Path(path_type=Path), default=_RESULTS, help="Folder for the results.")
@click.option("--report", is_flag=True, help="Measure nothing; write docs/performance.md from OUT/latest.json.")
@click.option("--blkloom", "command", help="The blkloom command to measure; the one of this Python unless given.")
@click.option("--before", metavar="COMMAND", help="The blkloom command of an older build, measured in the same rounds.")
@click.option("--tmpfs-dir", type=click.Path(path_type=Path), default=Path("/dev/shm"), show_default=True)
@click.option("--disk-dir", type=click.Path(path_type=Path), default=Path("/var/tmp"), show_default=True)
def main(
    quick: bool,
    only: str | None,
    again: bool,
    listing: bool,
    rounds: int | None,
    seconds: float | None,
    out: Path,
    report: bool,
    command: str | None,
    before: str | None,
    tmpfs_dir: Path,
    disk_dir: Path,
) -> None:
    """Measure blkloom against qemu-nbd, nbdkit, qemu-storage-daemon, /dev/loop, fio and os.preadv."""
    command = command or str(Path(sys.executable).with_name("blkloom"))
    chosen = [workload for workload in workloads(command, before) if not only or re.search(only, workload.name)]
    if not chosen:
        raise click.UsageError(f"--only {only!r} matches no row; --list shows them")
    if listing:
        return _list(chosen)
    if report:
        return _report(out)
    if again and not only:
        raise click.UsageError("--again needs --only")
    _require_fio()
    effort = QUICK if quick else FULL
    effort = Effort(rounds or effort.rounds, seconds or effort.seconds, effort.warm_up)
    whole = effort.rounds >= FULL.rounds and effort.seconds >= FULL.seconds
    if again and not whole:
        raise click.UsageError("--again wants as many rounds and seconds as a whole run has")
    complete = whole and not only
    _prepare_process()
    when = datetime.now(UTC)
    machine, known = facts(), versions(command, before)
    stamp = f"{when:%Y%m%dT%H%M%S}"
    lacking = [Missing("system calls and context switches", lack)] if (lack := counting.lack()) else []
    run = begun = Run(f"{when:%Y-%m-%d}", False, effort.rounds, effort.seconds, machine, known, lacking, [])
    out.mkdir(parents=True, exist_ok=True)
    with Ground(size=_SIZE, tmpfs=tmpfs_dir, disk=disk_dir) as ground:
        for run in _measure(begun, chosen, ground, effort):
            save(run, out / f"{stamp}.json")  # what is measured is kept, whatever comes later
    _keep(replace(run, complete=complete), out, stamp)
    if again:
        latest = _latest(out)
        save(latest.with_rows_of(run), out / "latest.json")
    sys.exit(int(any(c.subject is None for result in run.workloads for c in compare(result))))


def _measure(run: Run, chosen: list[Workload], ground: Ground, effort: Effort) -> Iterator[Run]:
    """Measure the workloads; yields the run after each one."""
    console = Console(stderr=True, highlight=False)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(len(workload.contenders) for workload in chosen) * effort.rounds)
        for workload in chosen:
            result, lacking = measure(
                workload, ground, effort, report=lambda what: progress.update(task, description=what, advance=1)
            )
            run = replace(run, workloads=[*run.workloads, result], missing=[*run.missing, *lacking])
            yield run
            for comparison in compare(result):
                line = f"{comparison}: {comparison.reached}, goal {comparison.wanted}: {comparison.verdict}"
                console.print(line, markup=False, soft_wrap=True)
            for lack in lacking:
                console.print(f"missing: {lack.what}: {lack.why}", markup=False, soft_wrap=True)


def _keep(run: Run, out: Path, stamp: str) -> None:
    """Store the results, their page, appendix and picture; a complete run also becomes latest.json."""
    written = [out / f"{stamp}.json"]
    save(run, written[0])
    written += _write(run, out / f"{stamp}.md")
    if run.complete:
        written.append(out / "latest.json")
        save(run, written[-1])
    for path in written:
        click.echo(path)


def _report(out: Path) -> None:
    places = mail_results.load(out / "mails.json")
    for path in _write(_latest(out), _PAGE, mail_results.section(places) if places else ""):
        click.echo(path)


def _latest(out: Path) -> Run:
    try:
        return load(out / "latest.json")
    except FileNotFoundError as error:
        raise click.ClickException(f"{error.filename} does not exist; a complete run makes it") from error


def _write(run: Run, path: Path, attached: str = "") -> list[Path]:
    """Write the page of a run to `path`, and its appendix and picture beside it. attached: a further section."""
    beside, picture = path.with_name(f"{path.stem}-appendix.md"), path.with_suffix(".svg")
    path.write_text(page(run, plot=picture.name, appendix=beside.name, attached=attached))
    beside.write_text(appendix(run, page=path.name))
    picture.write_text(svg(run))
    return [path, beside, picture]


def _list(chosen: list[Workload]) -> None:
    for workload in chosen:
        click.echo(f"{workload.name}: {workload.title}")
        for contender in workload.contenders:
            lack = contender.missing()
            name = f"{contender.family} {contender.setting}".strip()
            click.echo(f"    {name}" + (f"  [missing: {lack}]" if lack else ""))


def _require_fio() -> None:
    """Raise an error if fio is not installed."""
    if not shutil.which("fio"):
        raise click.ClickException("fio is not installed (Debian: apt install fio)")
    if subprocess.run(["fio", "--enghelp=nbd"], capture_output=True, check=False).returncode:
        raise click.ClickException("this fio has no nbd engine; install one built with libnbd (Debian's is)")


def _prepare_process() -> None:
    """Raise the limit of open files for 1,000 idle connections, here and in child processes; make SIGTERM unwind."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    signal.signal(signal.SIGTERM, _stop)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
