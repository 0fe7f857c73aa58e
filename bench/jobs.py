"""Jobs of the load generators: their parameters and their results.

Pure: builds command lines and parses output; it starts nothing. Every contender of a workload gets the same job; only
the options that name the data differ. Source: fio(1), and engine/core/examples/nbd_load.rs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

Pattern = Literal["randrw", "randread", "randwrite", "write"]
Client = Literal["nbd_load", "vhost_user_load", "vhost_user_load --poll", "fio", ""]
"""The load generator. `nbd_load` sends together all that it can; fio sends and receives request by request.
`vhost_user_load` is the driver of a disk over vhost-user, which sleeps until the server raises an event, or polls. ""
is a program that does its I/O itself, without one."""

_LOG_MILLISECONDS: Final = 20
"""How often a job of fio writes a line of its log."""


class JobError(Exception):
    """The load generator failed, or its output has no results; the text is for users."""


@dataclass(frozen=True)
class Job:
    """Parameters of a job. pattern: in fio's terms. block: bytes per request. depth: requests in flight per connection.
    connections: each is a separate fio thread; nbd_load has one thread for all. batch: requests per call, for the
    in-process contenders, which have neither depth nor connections. flush: after every write (each), or once at the
    end, as a part of the measured time (end).
    """

    pattern: Pattern
    block: int
    depth: int = 1
    connections: int = 1
    batch: int = 1
    flush: Literal["", "each", "end"] = ""


@dataclass(frozen=True)
class Outcome:
    """Results of a job. seconds: the measured time. p50_us, p99_us: latency of reads and writes. busy: share of the
    time that the client's threads spent on a CPU; at 1.0 the client is the bottleneck.
    """

    operations: int
    seconds: float
    errors: int
    p50_us: float
    p99_us: float
    busy: float = 0.0


def fio_arguments(
    job: Job, where: Sequence[str], *, size: int, output: str, log: str, seconds: float | None
) -> list[str]:
    """Command line of fio. where: options for the engine and the data. seconds: duration; None: once over `size` bytes,
    all connections together. output: file for the JSON. log: prefix of the logs of several jobs; their timestamps say
    when each job ran.

    norandommap turns off fio's map of used blocks, which would slow down the client and not the server. The sequence of
    offsets is fio's default, and so the same in every run.
    """
    until = [f"--io_size={size // job.connections}"]
    if seconds is not None:
        until = ["--time_based", f"--runtime={round(seconds * 1000)}ms"]
    # A job writes the line of this log itself when a request has ended; those of others come from a thread that looks
    # four times a second at first.
    logs = [f"--write_lat_log={log}", "--disable_slat=1", "--disable_lat=1"]
    logs += [f"--log_avg_msec={_LOG_MILLISECONDS}", "--log_unix_epoch=1"]
    return [
        "fio",
        "--name=bench",
        *where,
        f"--rw={job.pattern}",
        f"--bs={job.block}",
        f"--iodepth={job.depth}",
        f"--numjobs={job.connections}",
        f"--size={size}",
        *until,
        *{"": [], "each": ["--fsync=1"], "end": ["--end_fsync=1"]}[job.flush],
        *(logs if job.connections > 1 else []),
        "--norandommap",
        "--thread",
        "--group_reporting",
        "--eta=never",
        "--output-format=json",
        f"--output={output}",
    ]


def load_arguments(
    programs: str, client: Client, job: Job, where: Sequence[str], *, size: int, seconds: float | None
) -> list[str]:
    """Command line of one of our load generators for the same job; it prints JSON. programs: their directory. where:
    of vhost_user_load, the path of the socket; of nbd_load, fio's options, whose URI names socket and export.
    """
    program, *options = client.split()
    if program == "nbd_load":
        (uri,) = [urlsplit(word.removeprefix("--uri=")) for word in where if word.startswith("--uri=")]
        (socket,) = parse_qs(uri.query)["socket"]
        where = [socket, unquote(uri.path.removeprefix("/"))]
    pattern = job.pattern + {"": "", "each": "-flush", "end": "-end-flush"}[job.flush]
    numbers = (job.block, job.depth, job.connections, size, seconds or 0)
    return [f"{programs}/{program}", *options, *where, pattern, *(f"{number}" for number in numbers)]


def load_outcome(text: str) -> Outcome:
    """Parse the output of one of our load generators. Raises JobError."""
    try:
        return msgspec.json.decode(text, type=Outcome)
    except msgspec.DecodeError as error:
        raise JobError(f"the load generator's output makes no sense ({error}): {text[:200]!r}") from error


def fio_outcome(text: str, logs: Sequence[str] = ()) -> Outcome:
    """Parse fio's JSON (with --group_reporting: one job). logs: texts of the logs, if there are several jobs. Raises
    JobError.
    """
    try:
        (job,) = json.loads(text[text.index("{") :])["jobs"]
        sides = [side for side in (job["read"], job["write"]) if side["total_ios"]]
        longest = max((side["runtime"] for side in sides), default=0) / 1000
        return Outcome(
            operations=sum(side["total_ios"] for side in sides),
            seconds=wall_seconds(logs, longest) if logs else longest,
            errors=int(bool(job["error"])) + int(job.get("total_err", 0)),
            p50_us=_percentile(sides, "50.000000"),
            p99_us=_percentile(sides, "99.000000"),
            busy=(job["usr_cpu"] + job["sys_cpu"]) / 100,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(f"fio's output makes no sense ({error!r}): {text[:200]!r}") from error


def wall_seconds(logs: Iterable[str], longest: float) -> float:
    """The time from the start of the first job to the end of the last one. logs: of fio, with lines `milliseconds,
    figure, ...`; the delay from the start to the first line is the same in every job. longest: the longest run time of
    a job, in seconds.

    fio divides all I/Os by the longest run time of one job. If there are more jobs than CPUs, many jobs start late and
    run partly one after the other, and that quotient is higher than the rate of the machine at any time. Raises
    ValueError.
    """
    starts = [int(log.split(",", 1)[0]) for log in logs if log.strip()]
    if not starts:
        raise ValueError("the jobs wrote no line into their logs")
    return (max(starts) - min(starts)) / 1000 + longest


def _percentile(sides: list[dict[str, Any]], which: str) -> float:
    """Percentile in microseconds, weighted by the numbers of reads and writes (fio reports them separately)."""
    known = [
        (side["total_ios"], side["clat_ns"]["percentile"][which]) for side in sides if "percentile" in side["clat_ns"]
    ]
    total = sum(count for count, _ in known)
    return float(sum(count * value for count, value in known) / total / 1000) if total else 0.0
