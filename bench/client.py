"""Benchmark clients: run against a server, and return their own statistics.

Source: fio(1); engine/core/examples/nbd_load.rs, vhost_user_load.rs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from jobs import Client, Job, JobError, Outcome, fio_arguments, fio_outcome, load_arguments, load_outcome

_PROGRAMS: Final = Path(__file__).parents[1] / "engine/target/release/examples"
_PATIENCE: Final = 120
"""Seconds beyond those that were asked for."""


def run(job: Job, client: Client, where: Sequence[str], *, size: int, scratch: Path, seconds: float | None) -> Outcome:
    """Run the job on `size` bytes and return its results. where: fio's options for the engine and the data. seconds:
    duration; None: once over all bytes. Raises JobError, OSError, subprocess.TimeoutExpired.
    """
    output, log = scratch / "fio.json", scratch / "fio-jobs"
    for stale in (output, *_logs(log)):
        stale.unlink(missing_ok=True)
    ours = client != "fio"
    command = (
        load_arguments(str(_PROGRAMS), client, job, where, size=size, seconds=seconds)
        if ours
        else fio_arguments(job, where, size=size, output=str(output), log=str(log), seconds=seconds)
    )
    done = subprocess.run(
        command, cwd=scratch, capture_output=True, text=True, timeout=(seconds or 60) + _PATIENCE, check=False
    )
    said = " ".join((done.stderr + done.stdout).split())
    if done.returncode if ours else not output.exists():
        raise JobError(f"{client} ended with {done.returncode} and no result: {said[-400:]}")
    if ours:
        outcome = load_outcome(done.stdout)
    else:
        outcome = fio_outcome(output.read_text(), [path.read_text() for path in _logs(log)])
    if not outcome.operations:
        raise JobError(f"{client} did nothing: {said[-400:]}")
    return replace(outcome, errors=max(outcome.errors, int(done.returncode != 0)))


def _logs(log: Path) -> list[Path]:
    """Texts of the logs that fio's jobs write: `NAME_clat.NUMBER.log`."""
    return list(log.parent.glob(f"{log.name}_*.log"))
