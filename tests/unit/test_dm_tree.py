"""`ls --tree`, as in dmsetup."""

from __future__ import annotations

import pytest

from blkloom.control.states import DeviceInfo
from blkloom.dm.dependencies import Graph
from blkloom.dm.failing import NotACommandLine
from blkloom.dm.tree import Style, draw, read_style

HIGH = DeviceInfo(name="high", minor=3, deps=["blkloom:mid", "blkloom:low"])
LONE = DeviceInfo(name="lone", minor=4, read_only=True, state="SUSPENDED", uuid="some-uuid")
LOW = DeviceInfo(name="low", minor=1, deps=["a.img"], open_count=2)
MID = DeviceInfo(name="mid", minor=2, deps=["blkloom:low"], open_count=1)


def tree(options: str = "", style: Style = Style()) -> list[str]:  # noqa: B008
    return list(draw(Graph([HIGH, LONE, LOW, MID]), read_style(options, style)))


def test_devices_nothing_stands_on_come_first_and_what_they_stand_on_below() -> None:
    assert tree() == [
        "high (0:3)",
        " |-low (0:1)",
        " |  `- (a.img)",
        " `-mid (0:2)",
        "    `-low (0:1)",
        "       `- (a.img)",
        "lone (0:4)",
    ]


def test_without_devices_numbers_files_are_not_shown() -> None:
    assert tree("nodevice") == ["high", " |-low", " `-mid", "    `-low", "lone"]


def test_inverted_it_grows_from_what_stands_on_nothing() -> None:
    assert tree("inverted") == [
        " (a.img)",
        " `-low (0:1)",
        "    |-high (0:3)",
        "    `-mid (0:2)",
        "       `-high (0:3)",
        "lone (0:4)",
    ]


def test_compact_it_uses_fewer_lines() -> None:
    assert tree("compact") == [
        "high (0:3)-+-low (0:1)--- (a.img)",
        "           `-mid (0:2)---low (0:1)--- (a.img)",
        "lone (0:4)",
    ]
    assert tree("compact,nodevice") == ["high-+-low", "     `-mid---low", "lone"]


def test_attributes_stand_in_brackets() -> None:
    assert tree("active,rw,open,uuid,nodevice,blkdevname")[-1] == "lone <lone> [SUSPENDED, RO, 0, some-uuid]"


def test_lines_are_cut_at_the_width_unless_told_otherwise() -> None:
    assert tree("", Style(width=8))[0] == "high (0..."
    assert tree("notrunc", Style(width=8))[0] == "high (0:3)"
    assert tree("", Style(width=10))[0] == "high (0:3)"


def test_it_is_drawn_with_lines_where_they_can_be_shown() -> None:
    assert tree("utf,nodevice")[1:3] == [" ├─low", " └─mid"]


def test_an_unknown_option_is_refused_with_dmsetups_words() -> None:
    with pytest.raises(NotACommandLine) as caught:
        tree("ascii,nonsense")
    assert caught.value.lines == ("Tree options not recognised: nonsense.",)
