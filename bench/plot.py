"""The picture of the performance page as SVG: one bar for each goal with a headline; its length is the ratio to the
peer.

Pure function from a Run to text. The scale is logarithmic, and a bar begins at 1x. The line through a bar is the range
of the ratios of the rounds; the black tick is the goal. The label is above its bar and the ratio at the right of the
scale, with space for wider fonts, so that no renderer cuts or covers them. The colours differ for colour-blind readers,
and the verdict is also written beside each bar. The background is painted, so the picture is readable on dark pages.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from math import ceil, floor, log10
from typing import Final

from results import Comparison, Run, compare

MOST_BARS: Final = 12
LONGEST_LABEL: Final = 60
"""Characters: the width of the picture at 13 pixels, in any font."""
_LEFT, _BARS, _VERDICT, _ROW, _TOP = 24, 560, 300, 42, 76
_WIDTH: Final = _LEFT + _BARS + _VERDICT
_COLOURS: Final = {"met": "#0072b2", "at the floor": "#56b4e9", "missed": "#d55e00"}
_OTHER: Final = "#8c8c8c"

_Scale = Callable[[float], float]
"""From a ratio to a place across the picture."""


def svg(run: Run) -> str:
    """The picture of a run. Goals without a headline or a ratio are left out; the page has them."""
    rows = [c for workload in run.workloads for c in compare(workload) if c.ratio and c.goal.headline][:MOST_BARS]
    values = [v for c in rows for v in (c.ratio, c.round_low, c.round_high, c.goal.at_least) if v] + [0.9, 2.0]
    low, high = floor(log10(min(values)) * 4) / 4, ceil(log10(max(values)) * 4) / 4

    def x(value: float) -> float:
        return _LEFT + (log10(value) - low) / (high - low) * _BARS

    bottom = _TOP + _ROW * len(rows)
    height = bottom + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="DejaVu Sans, Arial, Helvetica, sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="28" font-size="17" font-weight="bold" fill="#000">blkloom against others: '
        "how many times as fast</text>",
        f'<text x="{_LEFT}" y="50" fill="#555">Medians of {run.rounds} rounds. Thin line: range over the rounds. '
        "Black tick: the goal.</text>",
    ]
    for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100):
        if low <= log10(tick) <= high:
            dark = "#666" if tick == 1 else "#ddd"
            parts.append(f'<line x1="{x(tick):.1f}" y1="{_TOP - 4}" x2="{x(tick):.1f}" y2="{bottom}" stroke="{dark}"/>')
            parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 20}" text-anchor="middle" fill="#555">{tick:g}x</text>')
    for index, comparison in enumerate(rows):
        parts += _bar(comparison, _TOP + _ROW * index, x)
    return "\n".join([*parts, "</svg>", ""])


def _bar(c: Comparison, y: int, x: _Scale) -> list[str]:
    assert c.ratio is not None
    one, end, middle = x(1.0), x(c.ratio), y + 28
    parts = [
        f'<rect x="{_LEFT}" y="{y}" width="{len(c.goal.headline) * 7.2:.0f}" height="17" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="{y + 13}" fill="#000">{escape(c.goal.headline)}</text>',
        f'<rect x="{min(one, end):.1f}" y="{y + 20}" width="{max(abs(end - one), 1):.1f}" height="16" '
        f'fill="{_COLOURS.get(c.verdict, _OTHER)}"/>',
    ]
    if c.round_low and c.round_high:
        parts.append(
            f'<line x1="{x(c.round_low):.1f}" y1="{middle}" x2="{x(c.round_high):.1f}" y2="{middle}" '
            'stroke="#222" stroke-width="1.5"/>'
        )
    if c.goal.at_least:
        goal = x(c.goal.at_least)
        parts.append(
            f'<line x1="{goal:.1f}" y1="{y + 18}" x2="{goal:.1f}" y2="{y + 38}" stroke="#000" stroke-width="3"/>'
        )
    words = f"{c.ratio:.2f}x, {c.verdict}" + (f" (goal {c.goal.at_least:g}x)" if c.goal.at_least else "")
    parts.append(f'<text x="{_LEFT + _BARS + 14}" y="{middle + 5}" fill="#000">{escape(words)}</text>')
    return parts
