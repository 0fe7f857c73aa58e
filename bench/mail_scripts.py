"""Runs the mails' test scripts (`bench/mails`) on this machine and in virtual machines, and stores the results.

    bench/mail_scripts.py host                       FUSE file + kernel loop device, against the loop driver
    bench/mail_scripts.py guest 6.12 7.3             in virtual machines: instructions per I/O
    bench/mail_scripts.py guest 7.3 --via ublk --only goals
    bench/run.py --report                            writes docs/performance.md, also from these results

Results are merged into bench/results/mails.json: they replace earlier ones of the same script in the same place.
The virtual machines are those of tests/kernel (`make test-tools`), with one processor and counted instructions. Needs
root on the host, and the programs that the scripts name. Exit codes: 0 measured, 1 some script failed, 2 wrong usage.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
from blkloom.attach import registry

from jobs import JobError, fio_outcome
from machine import versions
from mail_results import Place, Row, added, load, save

_HERE: Final = Path(__file__).resolve().parent
_SCRIPTS: Final = _HERE / "mails"
_RESULTS: Final = _HERE / "results" / "mails.json"
_ROOT: Final = _HERE.parent
_MIB: Final = 1 << 20

Settings = dict[str, dict[str, str]]

HOST: Final[Settings] = {
    "goals": {"SIZE": f"{256 * _MIB}", "RUNTIME": "500ms", "WAYS": "losetup blkloom qcow2 zero", "ROUNDS": "5"},
    "snapshot": {"SIZE": f"{256 * _MIB}", "RUNTIME": "500ms", "WAYS": "blkloom"},
    "2018": {"SIZE": f"{512 * _MIB}", "JOBS": "99", "RUNTIME": "2", "ALSO": "zero"},
    "2025": {"SIZE": f"{512 * _MIB}", "DATA": f"{256 * _MIB}", "JOBS": "12", "RUNTIME": "2"},
    "2015": {"SIZE": f"{1024 * _MIB}", "DATA": "150M", "JOBS": "4", "RUNTIME": "2"},
    "2020": {"SIZE": f"{512 * _MIB}", "JOBS": "2", "RUNTIME": "2", "BS": "4K 64K 1M"},
}
"""Environment of each script on a machine with two processors."""
GUEST: Final[Settings] = {
    "goals": {
        "SIZE": f"{32 * _MIB}",
        "RUNTIME": "150ms",
        "WAYS": "losetup dm-linear blkloom qcow2 zero qemu-nbd qemu-nbd-qcow2",
    },
    "snapshot": {"SIZE": f"{16 * _MIB}", "RUNTIME": "150ms"},
    "2018": {"SIZE": f"{32 * _MIB}", "JOBS": "8", "RUNTIME": "150ms", "ALSO": "zero dm-linear qemu-nbd"},
    "2020": {"SIZE": f"{16 * _MIB}", "JOBS": "2", "RUNTIME": "150ms", "BS": "4K"},
    "2015": {"SIZE": f"{64 * _MIB}", "DATA": "2M", "JOBS": "4", "RUNTIME": "150ms"},
    "2025": {"SIZE": f"{112 * _MIB}", "DATA": f"{16 * _MIB}", "JOBS": "12", "RUNTIME": "150ms", "DISK": "/dev/ram0"},
}
"""The same where an emulated processor executes a hundred million instructions per second."""
_MODULES: Final = ("ublk_drv", "loop", "nbd", "dm_mod", "dm_snapshot", "fuse", "ext4", "xfs")
_DISK_KIB: Final = 192 << 10
"""Size of the RAM disk with the outer file system of `2025`."""
_BOOT_SECONDS: Final = 400.0

_IN_GUEST: Final = """
export BLKLOOM_RUN_DIR=/run/blkloom-mails
mkdir -p /run/lock /run/files
mount -t tmpfs -o size=80% files /run/files
modprobe -d {kernel} brd rd_nr=1 rd_size={disk}
script() {{
    mkdir results/$1
    env DIR=/run/files RESULTS="$PWD/results/$1" "${{@:2}}" bash {scripts}/$1.sh > results/$1/output 2>&1 ||
        touch results/$1/failed
    touch results/$1/done
}}
mkdir results
uname -r > results/kernel
{runs}
blkloom stop --force
"""


@click.group()
def main() -> None:
    """Run the mails' test scripts."""


_ONLY = click.option("--only", metavar="REGEX", default="", help="Only scripts whose name matches.")
_OUT = click.option("--out", type=click.Path(path_type=Path), default=_RESULTS, help="File of the results.")


@main.command()
@_ONLY
@_OUT
@click.option("--via", default="loop", show_default=True, help="How blkloom's devices are attached.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
def host(only: str, out: Path, via: str, rounds: int) -> None:
    """On this machine."""
    settings, busy = _chosen(HOST, only), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="blkloom-mails-", dir="/dev/shm") as work:
        directory = Path(work)
        environment = {
            **os.environ,
            "BLKLOOM_RUN_DIR": str(directory / "run"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "VIA": via,
        }
        failed: dict[str, str] = {}
        rows: dict[str, list[Row]] = {script: [] for script in settings}
        try:
            for _ in range(rounds):
                for script in [script for script in settings if script not in failed]:
                    results = directory / script
                    results.mkdir()
                    used = {**environment, **settings[script], "DIR": str(directory), "RESULTS": str(results)}
                    done = subprocess.run(
                        [_SCRIPTS / f"{script}.sh"], env=used, capture_output=True, text=True, check=False
                    )
                    if done.returncode:
                        failed[script] = _last(done.stdout + done.stderr)
                    rows[script] = _together(rows[script], _read(script, results))
                    shutil.rmtree(results)
        finally:
            subprocess.run(["blkloom", "stop", "--force"], env=environment, capture_output=True, check=False)
    place = _place("host", platform.release(), via, rounds, (settings, rows, failed))
    _keep(replace(place, load=busy), out)


@main.command()
@click.argument("series", nargs=-1, required=True)
@_ONLY
@_OUT
@click.option("--via", "ways", multiple=True, help="How blkloom's devices are attached; each way unless given.")
@click.option("--minutes", type=click.IntRange(1), default=60, show_default=True, help="For each virtual machine.")
def guest(series: tuple[str, ...], only: str, out: Path, ways: tuple[str, ...], minutes: int) -> None:
    """In virtual machines with these series of Linux; figures are instructions per I/O."""
    for one in series:
        for via in ways or _ways():
            _guest(one, via, _chosen(GUEST, only), out, minutes)


def _guest(series: str, via: str, settings: Settings, out: Path, minutes: int) -> None:
    sys.path.append(str(_ROOT / "tests" / "kernel"))
    from guest import Guest, GuestError

    with tempfile.TemporaryDirectory(prefix="blkloom-mails-") as work:
        directory = Path(work)
        machine = Guest(
            virtme_run=Path(sys.executable).with_name("virtme-run"),
            kernels=_ROOT / ".cache" / "kernel",
            directory=directory,
            series=series,
            counts=True,
            boot=_BOOT_SECONDS,
        )
        runs = [
            shlex.join(["script", script, *(f"{name}={value}" for name, value in used.items()), f"VIA={via}"])
            for script, used in settings.items()
        ]
        script = _IN_GUEST.format(
            kernel=shlex.quote(str(machine.kernel)),
            scripts=shlex.quote(str(_SCRIPTS)),
            disk=_DISK_KIB,
            runs="\n".join(runs),
        )
        try:
            machine.run(script, modules=_MODULES, timeout=minutes * 60)
        except GuestError as error:
            # What has been measured before has results.
            click.echo(f"Linux {series}, {via}: {error}", err=True)
        _keep(_guest_place(directory / "results", series, via, settings), out)


def _guest_place(results: Path, series: str, via: str, settings: Settings) -> Place:
    """What a virtual machine has stored. A script that has not ended has the rows that it has measured."""
    failed = {}
    for script in settings:
        if not (results / script / "done").exists():
            failed[script] = "not ended in time"
        elif (results / script / "failed").exists():
            failed[script] = _last((results / script / "output").read_text())
    rows = {script: _read(script, results / script) for script in settings}
    kernel = (results / "kernel").read_text().strip()
    return _place(f"virtual machine, Linux {series}", kernel, via, 1, (settings, rows, failed), counts=True)


def _ways() -> list[str]:
    """The ways to attach that make block devices."""
    return [name for name in registry.names() if registry.way(name).is_block_device]


def _chosen(settings: Settings, only: str) -> Settings:
    if chosen := {script: used for script, used in settings.items() if re.search(only, script)}:
        return chosen
    raise click.UsageError(f"--only {only!r} matches no script; there are {', '.join(settings)}")


def _last(output: str) -> str:
    """What a failed script has said at its end."""
    return " ".join(output.split())[-200:]


def _read(script: str, results: Path) -> list[Row]:
    """The rows that a script has stored in a directory, in the order of its runs; one that was measured several times
    has several figures. Raises JobError.
    """
    rows: dict[tuple[str, str], Row] = {}
    for number in sorted(int(path.stem) for path in results.glob("*.name")):
        test, _, contender = (results / f"{number}.name").read_text().strip().rpartition(": ")
        logs = [path.read_text() for path in results.glob(f"{number}_*.log")]
        outcome = fio_outcome((results / f"{number}.json").read_text(), logs)
        if outcome.errors or not outcome.operations:
            raise JobError(f"{script}: {test}: {contender}: {outcome.operations} I/Os, {outcome.errors} errors")
        before, after = (_counters(results / f"{number}.{which}") for which in ("before", "after"))
        row = rows.setdefault((test, contender), Row(script, test, contender, []))
        row.rates.append(outcome.operations / outcome.seconds)
        row.switches.append((after["ctxt"] - before["ctxt"]) / outcome.operations)
        row.cached.append((after["Buffers"] + after["Cached"]) / 1024)
    return list(rows.values())


def _counters(path: Path) -> dict[str, int]:
    """Lines `name value ...` and `name: value ...`."""
    words = [line.replace(":", "").split() for line in path.read_text().splitlines()]
    return {name: int(value) for name, value, *_ in words}


def _together(rows: list[Row], more: list[Row]) -> list[Row]:
    """The rows with the figures of another round."""
    if not rows:
        return more
    return [
        Row(a.script, a.test, a.contender, a.rates + b.rates, a.switches + b.switches, a.cached + b.cached)
        for a, b in zip(rows, more, strict=False)
    ]


def _place(
    name: str,
    kernel: str,
    via: str,
    rounds: int,
    measured: tuple[Settings, dict[str, list[Row]], dict[str, str]],
    *,
    counts: bool = False,
) -> Place:
    settings, rows, failed = measured
    commit = versions(str(Path(sys.executable).with_name("blkloom")))["commit"]
    found = [row for script in settings for row in rows[script]]
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    return Place(name, kernel, via, counts, today, commit, rounds, settings, found, failed)


def _keep(place: Place, out: Path) -> None:
    """Store the results, and print them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    save(added(load(out), place), out)
    for row in place.rows:
        figure = f"{1e9 / row.rate:,.0f} instructions" if place.counts else f"{row.rate:,.0f} I/Os/s"
        click.echo(f"{place.name}, {place.via}: {row.script}: {row.test}: {row.contender}: {figure}")
    for script, why in place.failed.items():
        click.echo(f"{place.name}, {place.via}: {script} failed: {why}", err=True)
    if place.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
