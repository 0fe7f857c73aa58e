"""Cells and tables of the performance page as Markdown. Pure functions from figures to text."""

from __future__ import annotations

from statistics import median
from typing import Final

from results import Contest, Run, WorkloadResult

DISTURBED: Final = 0.05
"""A row is marked if other processes used, or the hypervisor stole, more than this share of the machine's CPU time."""
NONE: Final = "-"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def short(value: float, workload: WorkloadResult) -> str:
    """A figure with three digits (`186k`, `4.6k`, `744`), or a time."""
    if workload.unit == "s":
        return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
    if value < 1000:
        return f"{value:.0f}"
    return f"{value / 1000:.0f}k" if value >= 100_000 else f"{value / 1000:.3g}k"


def figure(contest: Contest | None, workload: WorkloadResult) -> str:
    """The median of the rounds, and the figures of the lowest and the highest round."""
    if contest is None or not contest.samples:
        return "not measured"
    middle, low, high = (number(v, workload) for v in (contest.figure, min(contest.values), max(contest.values)))
    return f"{middle} ({low} to {high})"


def number(value: float, workload: WorkloadResult) -> str:
    return f"{value:,.0f}" if workload.unit == "IOPS" else f"{value * 1e3:,.2f} ms"


def cost(contest: Contest | None, workload: WorkloadResult) -> str:
    """CPU time of the server per I/O, in microseconds; of the client if there is no server."""
    if contest is None or workload.unit != "IOPS":
        return NONE
    if (microseconds := contest.cpu_per_million) is not None:
        return f"{microseconds:.2f}"
    return f"{contest.client_cpu_per_million:.2f} (client)"


def rate(value: float | None) -> str:
    """System calls or context switches per I/O."""
    return NONE if value is None else f"{value:.2f}"


def name(contest: Contest) -> str:
    """Name of the contender, with its setting and its client."""
    words = [contest.family, contest.setting, f"with {contest.client}" if contest.client else ""]
    return " ".join(word for word in words if word)


def disturbance(workload: WorkloadResult, run: Run) -> float:
    """Share of the CPU time that other processes used or the hypervisor stole: the highest of the contenders' medians.

    One disturbed round does not change a median.
    """
    cpus = int(run.machine["cpus"])
    measured = [contest.samples for contest in workload.contests if contest.samples and workload.unit == "IOPS"]
    shares = [median((s.other_cpu + s.stolen) / (s.seconds * cpus) for s in samples) for samples in measured]
    return max(shares, default=0.0)
