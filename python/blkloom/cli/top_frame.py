"""Draws one frame of `blkloom top`: turns rows into lines of styled text. No I/O.

If columns do not fit, the least important ones are left out; the name column gets the remaining width. For a failed
device, the reason is shown in place of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from blkloom.cli.top_view import View
from blkloom.control.states import DeviceInfo
from blkloom.metrics.history import ASCII_BARS, BARS, sparkline
from blkloom.metrics.ordering import Order
from blkloom.metrics.rates import Flow, Rates, Row, Total
from blkloom.metrics.sampling import Sample
from blkloom.metrics.short import short_count, short_size
from blkloom.stats import format_nanoseconds

SPARK: Final = 12
"""Width of the history graph of a device, in columns."""
TOTAL: Final = -1
"""Key of the history of all devices together; a device has its minor number as key."""
AROUND: Final = 6
"""Number of lines without a device: header, an empty line, two lines of titles, totals, keys."""
_NAME_LEAST: Final = 10
_NAME_MOST: Final = 32
_STATES: Final = {"ACTIVE": "green", "SUSPENDED": "yellow", "FAILED": "bold red"}
_READ: Final = "cyan"
_WRITE: Final = "magenta"
_ALARM: Final = "bold red"


@dataclass(frozen=True, slots=True)
class Shape:
    """Width and height of a frame. height None: all lines, without the line of keys."""

    width: int
    height: int | None = None
    ascii_only: bool = False

    @property
    def page(self) -> int | None:
        """Number of devices that fit."""
        return None if self.height is None else max(1, self.height - AROUND)


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of a frame. rows: in display order. past: history of IOPS by minor number, and of TOTAL. clock: the
    time of day. problem: why the numbers are old, or "". show: formats a name.
    """

    sample: Sample
    rows: Sequence[Row]
    total: Total
    past: Mapping[int, Sequence[float]]
    view: View = field(default_factory=View)
    interval: float = 1.0
    clock: str = ""
    problem: str = ""
    show: Callable[[str], str] = str


@dataclass(frozen=True, slots=True)
class _Column:
    """A column. importance: columns with the greatest number are left out first."""

    title: str
    width: int
    importance: int
    cell: Callable[[Row], str]
    group: str = ""
    style: str = ""
    left: bool = False
    order: Order | None = None
    of_total: bool = True


def draw(scene: Scene, shape: Shape) -> list[Text]:
    """Draws the lines of a frame: none is wider than the shape, and there are no more than its height."""
    rows, page = scene.rows, shape.page
    view = scene.view if page is None else scene.view.within(len(rows), page)
    shown = rows[view.first :][:page]
    columns, name_width = _fitting(scene, shape)
    lines = [_header(scene, shape), Text(), *_titles(columns, name_width, scene.view, shape)]
    lines += [_row(row, columns, name_width, scene, shape) for row in shown]
    if not rows:
        lines.append(Text(" No devices.", style="dim"))
    if page is not None:
        lines += [Text()] * (page - max(1, len(shown)))
    lines.append(_total(scene, columns, name_width, shape))
    if page is not None:
        lines.append(_keys(scene, view, len(shown), shape))
    for line in lines:
        line.no_wrap = True
        line.truncate(shape.width, overflow="crop")
    return lines[: shape.height]


def natural_width(scene: Scene) -> int:
    """Width of the whole table."""
    widths = [_name_width(scene), *(column.width for column in _columns({}, ascii_only=False))]
    return 2 + sum(widths) + len(widths) - 1


def _columns(past: Mapping[int, Sequence[float]], *, ascii_only: bool, nodes: bool = False) -> list[_Column]:
    """nodes: some devices are attached."""
    bars, none = (ASCII_BARS, "-") if ascii_only else (BARS, "·")

    def number(of: Callable[[Rates], float | None], shown: Callable[[float], str]) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            value = of(row.rates) if row.rates else None
            return none if value is None else shown(value)

        return cell

    def percentile(way: Callable[[Rates], Flow], percent: float) -> Callable[[Row], str]:
        return number(lambda rates: way(rates).percentile(percent), format_nanoseconds)

    def read(rates: Rates) -> Flow:
        return rates.read

    def write(rates: Rates) -> Flow:
        return rates.write

    iops, band, slow = Order.IOPS, Order.BANDWIDTH, Order.LATENCY
    return [
        _Column("STATE", 9, 2, lambda row: row.info.state, left=True, of_total=False),
        _Column("TARGETS", 13, 9, lambda row: ",".join(row.info.types), left=True, of_total=False),
        *([_Column("NODE", 9, 12, _node, left=True, of_total=False)] if nodes else []),
        _Column("SIZE", 8, 6, lambda row: short_size(row.info.size)),
        _Column("CLIENTS", 7, 7, lambda row: short_count(row.info.connections)),
        _Column("read", 7, 1, number(lambda r: r.read.iops, short_count), "IOPS", _READ, order=iops),
        _Column("write", 7, 1, number(lambda r: r.write.iops, short_count), "IOPS", _WRITE, order=iops),
        _Column("read/s", 8, 3, number(lambda r: r.read.bandwidth, short_size), "bandwidth", _READ, order=band),
        _Column("write/s", 8, 3, number(lambda r: r.write.bandwidth, short_size), "bandwidth", _WRITE, order=band),
        _Column("p50", 7, 8, percentile(read, 50), "read latency", _READ, order=slow),
        _Column("p99", 7, 4, percentile(read, 99), "read latency", _READ, order=slow),
        _Column("p50", 7, 8, percentile(write, 50), "write latency", _WRITE, order=slow),
        _Column("p99", 7, 4, percentile(write, 99), "write latency", _WRITE, order=slow),
        _Column("DEPTH", 5, 5, lambda row: none if row.in_flight is None else short_count(row.in_flight)),
        _Column("FAULTS/s", 8, 10, number(lambda r: r.faults, short_count)),
        _Column(
            "IOPS, past",
            SPARK,
            11,
            lambda row: sparkline(past.get(row.info.minor, ()), SPARK, bars=bars),
            style="green",
        ),
    ]


def _node(row: Row) -> str:
    if row.info.node is None:
        return ""
    path = row.info.node.path
    return path.removeprefix("/dev/") if path.startswith("/dev/") else row.info.node.via


def _name_width(scene: Scene) -> int:
    names = (cell_len(_one_line(scene.show(row.info.name))) for row in scene.rows)
    return min(_NAME_MOST, max(_NAME_LEAST, max(names, default=0)))


def _fitting(scene: Scene, shape: Shape) -> tuple[list[_Column], int]:
    """Columns that fit, and the width of the name column."""
    nodes = any(row.info.node for row in scene.rows)
    columns = _columns(scene.past, ascii_only=shape.ascii_only, nodes=nodes)
    name = _name_width(scene)
    least = min(name, 16)
    for unimportant in sorted({column.importance for column in columns}, reverse=True):
        if least + sum(column.width + 1 for column in columns) + 2 <= shape.width:
            break
        columns = [column for column in columns if column.importance != unimportant]
    return columns, max(_NAME_LEAST, min(name, shape.width - 2 - sum(column.width + 1 for column in columns)))


def _header(scene: Scene, shape: Shape) -> Text:
    sample = scene.sample
    parts = [
        ("blkloom top", "bold cyan"),
        (sample.run_dir, ""),
        (f"supervisor {sample.version}", ""),
        (_counted(len(sample.devices), "device"), ""),
        (_counted(sample.workers, "worker"), ""),
    ]
    if sample.failed:
        parts.append((f"{sample.failed} failed", _ALARM))
    if scene.problem:
        parts.append((scene.problem, _ALARM))
    line = Text(" ").append_text(Text("  ").join(Text(text, style=style) for text, style in parts))
    end = f"every {scene.interval:g} s  {scene.clock} "
    if line.cell_len + len(end) + 2 <= shape.width:
        line.append(end.rjust(shape.width - line.cell_len), style="dim")
    return line


def _titles(columns: Sequence[_Column], name_width: int, view: View, shape: Shape) -> list[Text]:
    down, up = ("v", "^") if shape.ascii_only else ("▼", "▲")
    # Numbers are sorted in descending order, names in ascending order, unless reversed.
    mark = up if view.reverse != (view.order is Order.NAME) else down
    groups = Text(" " * (name_width + 1))
    for (group, order), members in groupby(columns, lambda column: (column.group, column.order)):
        widths = [column.width for column in members]
        width = sum(widths) + len(widths) - 1
        title = f"{group} {mark}" if group and order is view.order else group
        groups.append(" ").append(_centred(title, width, shape), style="bold" if order is view.order else "dim")
    by_name = view.order is Order.NAME
    name = f"DEVICE {mark}" if by_name else "DEVICE"
    titles = Text(f" {name:<{name_width}}")
    for column in columns:
        titles.append(" ").append(_cut(column.title, column))
    titles.stylize("bold")
    titles.pad_right(max(0, shape.width - titles.cell_len))
    titles.stylize("reverse")
    return [groups, titles]


def _centred(title: str, width: int, shape: Shape) -> str:
    if not title or len(title) + 6 > width:  # no room for a line on both sides
        return title[:width].center(width)
    return f" {title} ".center(width, "-" if shape.ascii_only else "─")


def _row(row: Row, columns: Sequence[_Column], name_width: int, scene: Scene, shape: Shape) -> Text:
    state = row.info.state
    line = Text(" ").append(
        set_cell_size(_shortened(_one_line(scene.show(row.info.name)), name_width, shape), name_width),
        style=_ALARM if state == "FAILED" else "bold",
    )
    for column in columns:
        if state == "FAILED" and column.title != "STATE":
            room = shape.width - line.cell_len - 2
            line.append(" ").append(_shortened(_one_line(row.info.reason), max(1, room), shape), style="red")
            break
        text = column.cell(row)
        style = _STATES[state] if column.title == "STATE" else column.style
        line.append(" ").append(_cut(text, column), style="dim" if text.strip() in ("0", "0 B", "·", "-") else style)
    return line


def _total(scene: Scene, columns: Sequence[_Column], name_width: int, shape: Shape) -> Text:
    total = scene.total
    info = DeviceInfo(name="total", minor=TOTAL, size=total.size, connections=total.clients)
    row = Row(info, total.in_flight, total.rates)
    line = Text(f" {info.name:<{name_width}}"[: name_width + 1])
    for column in columns:
        line.append(" ").append(_cut(column.cell(row) if column.of_total else "", column), style=column.style)
    line.pad_right(max(0, shape.width - line.cell_len))
    line.stylize("bold")
    return line


def _keys(scene: Scene, view: View, shown: int, shape: Shape) -> Text:
    line = Text(" ")
    for key, what in (("i", "IOPS"), ("b", "bandwidth"), ("l", "latency"), ("n", "name"), ("r", "reverse")):
        line.append(key, style="bold cyan").append(f" {what}  ", style="dim")
    line.append("q", style="bold cyan").append(" quit", style="dim")
    if shown < len(scene.rows):
        text = f"{view.first + 1} to {view.first + shown} of {len(scene.rows)} devices "
        line.append("  ").append(text.rjust(max(0, shape.width - line.cell_len - 2)), style="dim")
    return line


def _cut(text: str, column: _Column) -> str:
    text = text[: column.width]
    return text.ljust(column.width) if column.left else text.rjust(column.width)


def _shortened(text: str, width: int, shape: Shape) -> str:
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1) + ("~" if shape.ascii_only else "…")


def _one_line(text: str) -> str:
    """Escapes names and reasons, which may hold any bytes, for the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def plain(lines: Iterable[Text]) -> str:
    """The frame without styles, for files and pipes."""
    return "\n".join(line.plain.rstrip() for line in lines)
