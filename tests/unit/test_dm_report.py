"""`info -c`: fields, order, layout and selection, as in libdevmapper."""

from __future__ import annotations

import pytest

from blkloom.control.states import DeviceInfo
from blkloom.dm.failing import NoReport
from blkloom.dm.fields import DEFAULT, SECTIONS, Row
from blkloom.dm.report import Layout, find_field, lay_out, read_fields, sort_rows
from blkloom.dm.selecting import parse_selection

LOW = DeviceInfo(name="low", minor=3, live=True, targets=1, open_count=2, deps=["/x.img"], holders=["mid", "high"])
MID = DeviceInfo(
    name="mid", minor=10, uuid="LVM-1", live=True, inactive=True, state="SUSPENDED", targets=2, deps=["blkloom:low"]
)
HIGH = DeviceInfo(name="high", minor=0, read_only=True, event=7, deps=["blkloom:mid", "blkloom:low"])
ALL = {info.name: info for info in (LOW, MID, HIGH)}
ROWS = [Row(info, others=ALL) for info in ALL.values()]


def report(fields: str, layout: Layout = Layout(), rows: list[Row] = ROWS) -> list[str]:  # noqa: B008
    return list(lay_out(rows, read_fields(fields), layout))


def test_the_usual_columns_are_dmsetups_to_the_letter() -> None:
    assert report(DEFAULT) == [
        "Name             Maj Min Stat Open Targ Event  UUID                            ",
        "low                0   3 L--w    2    1      0                                 ",
        "mid                0  10 LIsw    0    2      0 LVM-1                           ",
        "high               0   0 ---r    0    0      7                                 ",
    ]


def test_columns_grow_with_what_is_in_them() -> None:
    long = Row(DeviceInfo(name="a-name-longer-than-sixteen", minor=1))
    assert report("name,minor", rows=[long]) == ["Name                       Min", "a-name-longer-than-sixteen   1"]


def test_relations_are_told_as_the_kernel_orders_them() -> None:
    assert report("name,device_count,devs_used,names_using_dev,device_ref_count", Layout(":", False, 0)) == [
        "low:1::high,mid:2",
        "mid:1:low::0",
        "high:2:low,mid::0",
    ]


@pytest.mark.parametrize(
    ("layout", "lines"),
    [
        (Layout(":", False, 0), ["low:3"]),
        (Layout(",", False), ["Name,Min", "low,3"]),
        (Layout(headings=2), ["name             min", "low                3"]),
        (Layout(":", False, 0, prefixes=True), ["DM_NAME='low':DM_MINOR='3'"]),
        (Layout(" ", False, 0, prefixes=True, quoted=False), ["DM_NAME=low DM_MINOR=3"]),
        (Layout(as_rows=True), ["Name low", "Min 3"]),
    ],
)
def test_layouts(layout: Layout, lines: list[str]) -> None:
    assert report("name,minor", layout, ROWS[:1]) == lines


def test_nothing_is_printed_of_nothing() -> None:
    assert report("name", rows=[]) == []


def test_fields_are_found_without_underscores_and_by_section() -> None:
    assert find_field("tablesloaded") is find_field("tables_loaded") is find_field("info_tables_loaded")
    assert [field.id for field in read_fields("info_all")] == [field.id for field in SECTIONS[1].fields]
    assert [field.id for field in read_fields("+size")][-1] == "size"


def test_an_unknown_field_is_refused_with_the_list_of_those_there_are() -> None:
    with pytest.raises(NoReport) as caught:
        read_fields("name,nonsense")
    assert caught.value.lines[-1] == "Unrecognised field: nonsense"
    assert any(line.strip().startswith("tables_loaded") for line in caught.value.lines)


@pytest.mark.parametrize(
    ("keys", "names"),
    [("name", "high low mid"), ("-minor", "mid low high"), ("-open,name", "low high mid"), ("", "low mid high")],
)
def test_rows_are_sorted_by_several_fields(keys: str, names: str) -> None:
    assert [row.info.name for row in sort_rows(ROWS, keys)] == names.split()


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        ("name=low", "low"),
        ("name!=low", "mid high"),
        ("uuid=~^LVM", "mid"),
        ("uuid!~LVM", "low high"),
        ("segments>0", "low mid"),
        ("segments>=2 || events=7", "mid high"),
        ("minor<10 && open>1", "low"),
        ("minor<=10, open=0", "mid high"),
        ("name=low # name=high", "low high"),
        ("!(name=low || name='mid')", "high"),
        ("! name=low && !name=mid", "high"),
        ('name="low"', "low"),
        ("", "low mid high"),
    ],
)
def test_a_selection_chooses(selection: str, names: str) -> None:
    chosen = parse_selection(selection)
    assert [row.info.name for row in ROWS if chosen(row)] == names.split()


@pytest.mark.parametrize(
    ("selection", "why"),
    [
        ("nonsense=1", "Unrecognised selection field: nonsense"),
        ("name", "Unrecognised comparison operator"),
        ("name=", "Missing value after operator"),
        ("name=a)", "Selection syntax error at '\\)'"),
        ("(name=a", "right parenthesis not found"),
        ("minor=x", "Failed to parse numeric value for selection field minor"),
        ("minor=~1", "Operator can be used only with string"),
        ("name>a", "Operator can be used only with number"),
        ("name=~(", "Missing value after operator"),
        ("name=~'('", "Failed to parse regex value"),
        ("(" * 200 + "name=a", "Too many parentheses"),
    ],
)
def test_what_is_no_selection_is_refused(selection: str, why: str) -> None:
    with pytest.raises(NoReport, match=why):
        parse_selection(selection)
