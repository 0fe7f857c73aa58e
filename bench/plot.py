"""The picture: one bar a goal, its length the ratio to the peer on a logarithmic scale, as SVG.

Pure: a Run in, text out. The line through a bar is the range of the ratios round by round; the
black tick is the goal. Colours keep apart for the colour-blind and do not stand alone: the verdict
is written beside each bar. The background is painted, so the picture reads on dark pages too.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from math import ceil, floor, log10
from typing import Final

from results import Comparison, Run, compare

_LABEL, _BARS, _VERDICT, _ROW, _TOP = 470, 520, 190, 30, 70
_COLOURS: Final = {"met": "#0072b2", "missed": "#d55e00", "reported": "#8c8c8c"}

_Scale = Callable[[float], float]
"""From a ratio to a place across the picture."""


def svg(run: Run) -> str:
    """The picture of a run; goals without a ratio are left out, the report names them."""
    rows = [c for workload in run.workloads if workload.unit == "IOPS" for c in compare(workload) if c.ratio]
    values = [v for c in rows for v in (c.ratio, c.round_low, c.round_high, c.goal.at_least) if v] + [0.9, 2.0]
    low, high = floor(log10(min(values)) * 4) / 4, ceil(log10(max(values)) * 4) / 4

    def x(value: float) -> float:
        return _LABEL + (log10(value) - low) / (high - low) * _BARS

    width, bottom = _LABEL + _BARS + _VERDICT, _TOP + _ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom + 40}" '
        f'viewBox="0 0 {width} {bottom + 40}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{bottom + 40}" fill="#ffffff"/>',
        '<text x="16" y="28" font-size="17" font-weight="bold">blkloom as a ratio of its peers (more is better)</text>',
        f'<text x="16" y="48" fill="#555">medians of {run.rounds} rounds; thin line: range over the rounds; '
        "black tick: the goal; logarithmic scale</text>",
    ]
    for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100):
        if low <= log10(tick) <= high:
            dark = "#666" if tick == 1 else "#ddd"
            parts.append(f'<line x1="{x(tick):.1f}" y1="{_TOP - 6}" x2="{x(tick):.1f}" y2="{bottom}" stroke="{dark}"/>')
            parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle" fill="#555">{tick:g}x</text>')
    for number, comparison in enumerate(rows):
        parts += _bar(comparison, _TOP + _ROW * number, x(1.0), x)
    return "\n".join([*parts, "</svg>", ""])


def _bar(c: Comparison, y: int, one: float, x: _Scale) -> list[str]:
    assert c.ratio is not None
    end, middle = x(c.ratio), y + _ROW / 2 - 3
    title = str(c).replace("`", "")
    parts = [
        f'<text x="{_LABEL - 10}" y="{middle + 4}" text-anchor="end" font-size="{12 if len(title) < 68 else 10}">'
        f"{escape(title)}</text>",
        f'<rect x="{min(one, end):.1f}" y="{y + 3}" width="{max(abs(end - one), 1):.1f}" height="{_ROW - 12}" '
        f'fill="{_COLOURS.get(c.verdict, "#8c8c8c")}"/>',
    ]
    if c.round_low and c.round_high:
        parts.append(
            f'<line x1="{x(c.round_low):.1f}" y1="{middle}" x2="{x(c.round_high):.1f}" y2="{middle}" '
            'stroke="#222" stroke-width="1.5"/>'
        )
    if c.goal.at_least:
        goal = x(c.goal.at_least)
        parts.append(
            f'<line x1="{goal:.1f}" y1="{y}" x2="{goal:.1f}" y2="{y + _ROW - 6}" stroke="#000" stroke-width="3"/>'
        )
    words = f"{c.ratio:.2f}x, " + (f"{c.verdict} (goal {c.goal.at_least:g}x)" if c.goal.at_least else c.verdict)
    parts.append(f'<text x="{_LABEL + _BARS + 12}" y="{middle + 4}">{escape(words)}</text>')
    return parts
