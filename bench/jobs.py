"""Jobs: what the load generator is asked to do, and what it said it did.

Pure: builds command lines and reads JSON; nothing is started here. Every contender of a workload gets
the same job; only the words that say where the data is differ. Source: fio(1), and
engine/core/examples/nbd_load.rs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import msgspec

Pattern = Literal["randrw", "randread", "randwrite", "write"]


class JobError(Exception):
    """The load generator failed or did not say what it did; the text is for a person."""


@dataclass(frozen=True)
class Job:
    """pattern: as fio calls it. block: bytes a request. depth: requests in flight a connection.
    connections: each is a fio thread's own; nbd_load has one thread for all. batch: requests a call, for the
    in-process contenders, which have neither depth nor connections. client: fio sends and receives request by
    request; `nbd_load` all that it can together. flushed: a flush at the end is part of it.
    """

    pattern: Pattern
    block: int
    depth: int = 1
    connections: int = 1
    batch: int = 1
    client: Literal["fio", "nbd_load"] = "fio"
    flushed: bool = False


@dataclass(frozen=True)
class Outcome:
    """What was done. seconds: the time that was measured. p50_us and p99_us: latency over reads and writes.
    busy: the share of that time its threads spent on a CPU, 1.0 when the client is the limit.
    """

    operations: int
    seconds: float
    errors: int
    p50_us: float
    p99_us: float
    busy: float = 0.0


def fio_arguments(job: Job, where: Sequence[str], *, size: int, output: str, seconds: float | None) -> list[str]:
    """The command line. where: the words that name the engine and the data. seconds: how long;
    None goes once over `size` bytes, all connections together. The JSON goes to the file `output`.

    norandommap keeps fio from remembering what it touched, which would slow the client and not
    the server; the sequence of offsets is fio's default and so the same in every run.
    """
    until = [f"--io_size={size // job.connections}"]
    if seconds is not None:
        until = ["--time_based", f"--runtime={round(seconds * 1000)}ms"]
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
        *(["--end_fsync=1"] if job.flushed else []),
        "--norandommap",
        "--thread",
        "--group_reporting",
        "--eta=never",
        "--output-format=json",
        f"--output={output}",
    ]


def nbd_load_arguments(program: str, job: Job, where: Sequence[str], *, size: int, seconds: float | None) -> list[str]:
    """The same job for nbd_load. where: fio's words; their URI tells the socket. Its JSON comes on its output."""
    if job.flushed:
        raise JobError(f"nbd_load does not flush at the end; the job is {job}")
    (uri,) = [urlsplit(word.removeprefix("--uri=")) for word in where if word.startswith("--uri=")]
    if uri.path != "/":
        raise JobError(f"nbd_load asks for the default export; the job is for {uri.path}")
    (socket,) = parse_qs(uri.query)["socket"]
    numbers = (job.block, job.depth, job.connections, size, seconds or 0)
    return [program, socket, job.pattern, *(f"{number}" for number in numbers)]


def nbd_load_outcome(text: str) -> Outcome:
    """Read what nbd_load said. Raises JobError."""
    try:
        return msgspec.json.decode(text, type=Outcome)
    except msgspec.DecodeError as error:
        raise JobError(f"nbd_load's output makes no sense ({error}): {text[:200]!r}") from error


def fio_outcome(text: str) -> Outcome:
    """Read fio's JSON (with --group_reporting: one job) as an Outcome. Raises JobError."""
    try:
        (job,) = json.loads(text[text.index("{") :])["jobs"]
        sides = [side for side in (job["read"], job["write"]) if side["total_ios"]]
        return Outcome(
            operations=sum(side["total_ios"] for side in sides),
            seconds=max((side["runtime"] for side in sides), default=0) / 1000,
            errors=int(bool(job["error"])) + int(job.get("total_err", 0)),
            p50_us=_percentile(sides, "50.000000"),
            p99_us=_percentile(sides, "99.000000"),
            busy=(job["usr_cpu"] + job["sys_cpu"]) / 100,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(f"fio's output makes no sense ({error!r}): {text[:200]!r}") from error


def _percentile(sides: list[dict[str, Any]], which: str) -> float:
    """Microseconds; reads and writes weighted by how many there were (fio keeps them apart)."""
    known = [
        (side["total_ios"], side["clat_ns"]["percentile"][which]) for side in sides if "percentile" in side["clat_ns"]
    ]
    total = sum(count for count, _ in known)
    return float(sum(count * value for count, value in known) / total / 1000) if total else 0.0
