"""Reports in the layout of libdevmapper: `-o` selects fields, `-O` sorts. Pure.

Source: libdm-report.c (_parse_fields, _output_as_columns, _output_as_rows, _report_headings).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from blkloom.dm.failing import NoReport
from blkloom.dm.fields import DEFAULT, SECTIONS, Field, Row

HELP: Final = frozenset({"help", "?"})
"""`-o help` lists the fields (`list_fields`)."""

_ALIASES: Final = {"treeall": "depsall"}


@dataclass(frozen=True)
class Layout:
    """The format of a report. headings: 0 none, 1 titles, 2 field names."""

    separator: str = " "
    aligned: bool = True
    headings: int = 1
    prefixes: bool = False
    quoted: bool = True
    as_rows: bool = False


def find_field(name: str) -> Field | None:
    """Finds a field by name; underscores and the prefix of the section are ignored."""
    wanted = _canonical(name)
    for section in SECTIONS:
        for field in section.fields:
            own = _canonical(field.id)
            if wanted in (own, _canonical(section.prefix) + own):
                return field
    return None


def read_fields(text: str) -> list[Field]:
    """The fields of `-o`: names, `all`, `info_all` and the like; `+` adds to the default fields.

    Raises NoReport with the list of fields for an unknown one.
    """
    if text.startswith("+"):
        text = f"{DEFAULT},{text[1:]}"
    found: list[Field] = []
    for name in filter(None, text.split(",")):
        wanted = _canonical(name)
        wanted = _ALIASES.get(wanted, wanted)
        whole = [f for s in SECTIONS if wanted in ("all", _canonical(s.prefix) + "all") for f in s.fields]
        if whole:
            found += whole
        elif (field := find_field(name)) is not None:
            found.append(field)
        else:
            raise NoReport(*list_fields(), f"Unrecognised field: {name}")
    return found


def sort_rows(rows: Iterable[Row], keys: str) -> list[Row]:
    """Parses sort keys: comma-separated fields, each with an optional `+` or `-` in front. Raises NoReport."""
    ordered = list(rows)
    for key in reversed([key for key in keys.split(",") if key]):
        name = key.removeprefix("+").removeprefix("-")
        if (field := find_field(name)) is None:
            raise NoReport(*list_fields(), f"dm_report: Unrecognised field: {name}")
        value = field.value
        ordered.sort(key=lambda row: value(row), reverse=key.startswith("-"))
    return ordered


def lay_out(rows: Sequence[Row], fields: Sequence[Field], layout: Layout) -> Iterator[str]:
    """The lines of the report; empty without rows."""
    if not rows or not fields:
        return
    texts = [[str(field.value(row)) for field in fields] for row in rows]
    headings = [field.id if layout.headings == 2 else field.heading for field in fields]
    if layout.as_rows:
        for number, heading in enumerate(headings):
            cells = [_cell(fields[number], line[number], 0, layout) for line in texts]
            yield layout.separator.join([heading, *cells] if layout.headings else cells)
        return
    widths = [
        max(field.width, *(len(line[number]) for line in texts)) if layout.aligned else 0
        for number, field in enumerate(fields)
    ]
    if layout.headings:
        cut = [h[:w].ljust(w) if layout.aligned else h for h, w in zip(headings, widths, strict=True)]
        yield layout.separator.join(cut)
    for line in texts:
        cells = [_cell(f, text, w, layout) for f, text, w in zip(fields, line, widths, strict=True)]
        yield layout.separator.join(cells)


def list_fields() -> list[str]:
    """All fields with their descriptions, for `-o help`."""
    width = max(len(field.id) for section in SECTIONS for field in section.fields)
    lines: list[str] = []
    for section in SECTIONS:
        title = f"{section.title} Fields"
        lines += [title, "-" * len(title), f"  {section.prefix + 'all':<{width}} - All fields in this section."]
        lines += [f"  {field.id:<{width}} - {field.help}" for field in section.fields]
        lines.append(" ")
    return lines


def _cell(field: Field, text: str, width: int, layout: Layout) -> str:
    if layout.aligned and not layout.as_rows:
        text = text.rjust(width) if field.number else text.ljust(width)
    if not layout.prefixes:
        return text
    return f"DM_{field.id.upper()}=" + (f"'{text}'" if layout.quoted else text)


def _canonical(name: str) -> str:
    return name.replace("_", "")
