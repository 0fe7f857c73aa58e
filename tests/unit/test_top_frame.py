"""The frame of `blkloom top`: rows to lines, and the keys that change it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from blkloom.cli.top_frame import TOTAL, Scene, Shape, draw, natural_width, plain
from blkloom.cli.top_view import View
from blkloom.control.states import DeviceInfo
from blkloom.metrics.ordering import Order
from blkloom.metrics.rates import Flow, Rates, Row, total_of
from blkloom.metrics.sampling import DeviceSample, Sample
from blkloom.stats import Histogram, bucket_of

LATENCY = Histogram((*[0] * bucket_of(20_000), 99, *[0] * 40, 1))
BUSY = Row(
    DeviceInfo(name="disk", minor=0, types=["loop", "ram"], size=1 << 30, connections=3),
    17,
    Rates(Flow(12_345, 48 << 20, LATENCY), Flow(0, 0), 4),
)
NEW = Row(DeviceInfo(name="new", minor=1, types=["zero"], size=512, state="SUSPENDED"), 2, None)
FAILED = Row(DeviceInfo(name="broken", minor=2, state="FAILED", reason="its worker died\x1b[2J 6 times", size=4096))


def scene(*rows: Row, **changes: object) -> Scene:
    rows = rows or (FAILED, BUSY, NEW)
    sample = Sample(
        5.0, {row.info.minor: DeviceSample(row.info) for row in rows}, run_dir="/run/user/7/blkloom", version="9.8"
    )
    made = Scene(replace(sample, workers=2), rows, total_of(rows), {0: [1, 2], TOTAL: [3]}, clock="12:34:56")
    return replace(made, **changes)  # type: ignore[arg-type]


def text_of(scene: Scene, shape: Shape) -> str:
    return plain(draw(scene, shape))


def test_the_header_tells_where_and_which_and_how_many() -> None:
    header = text_of(scene(), Shape(160)).splitlines()[0]
    assert "/run/user/7/blkloom  supervisor 9.8  3 devices  2 workers  1 failed" in header
    assert header.endswith("every 1 s  12:34:56")


def test_a_row_has_all_numbers_of_its_device() -> None:
    (line,) = [line for line in text_of(scene(), Shape(200)).splitlines() if line.startswith(" disk")]
    numbers = "3 12.3k 0 48 MiB 0 B 20.5 us 20.5 us · · 17 4 ▅█"
    assert line.split() == ["disk", "ACTIVE", "loop,ram", "1", "GiB", *numbers.split()]


def test_a_device_without_rates_yet_shows_that_they_are_unknown() -> None:
    (line,) = [line for line in text_of(scene(), Shape(200)).splitlines() if line.startswith(" new")]
    assert line.split() == ["new", "SUSPENDED", "zero", "512", "B", "0", *["·"] * 8, "2", "·"]


def test_a_failed_device_is_red_and_tells_why_without_control_characters() -> None:
    (line,) = [line for line in draw(scene(), Shape(120)) if line.plain.startswith(" broken")]
    assert "its worker died [2J 6 times" in line.plain
    styles = {line.plain[span.start : span.end].strip(): str(span.style) for span in line.spans}
    assert styles["broken"] == styles["FAILED"] == "bold red"


def test_the_total_is_below_the_devices() -> None:
    lines = text_of(scene(), Shape(200)).splitlines()
    assert lines[-1].split()[:6] == ["total", "1", "GiB", "3", "12.3k", "0"]


def test_columns_that_do_not_fit_are_left_out_and_the_essential_ones_stay() -> None:
    wide, narrow = (text_of(scene(), Shape(width)).splitlines() for width in (160, 80))
    assert {"TARGETS", "FAULTS/s", "p50"} <= set(wide[3].split())
    assert narrow[3].split() == ["DEVICE", "STATE", "read", "write", "read/s", "write/s", "p99", "p99", "DEPTH"]


@given(st.integers(1, 200), st.integers(1, 50), st.integers(0, 60), st.integers(0, 70), st.booleans())
def test_no_picture_is_larger_than_its_terminal(width: int, height: int, devices: int, first: int, ascii: bool) -> None:
    rows = [replace(BUSY, info=DeviceInfo(name=f"disk 磁盘 {n}", minor=n)) for n in range(devices)]
    shape = Shape(width, height, ascii)
    lines = draw(scene(*rows, view=View(first=first)) if rows else scene(rows=[], total=total_of([])), shape)
    assert all(line.cell_len <= width for line in lines)
    assert len(lines) == height


def test_more_devices_than_fit_scroll_and_the_last_line_says_which_are_seen() -> None:
    rows = [replace(BUSY, info=DeviceInfo(name=f"disk{n}", minor=n)) for n in range(40)]
    lines = text_of(scene(*rows, view=View(first=100)), Shape(120, 16)).splitlines()
    assert lines[4].startswith(" disk30")
    assert lines[-1].endswith("31 to 40 of 40 devices")


def test_old_numbers_are_said_to_be_old() -> None:
    line = draw(scene(problem="old numbers: no answer"), Shape(160))[0]
    assert "old numbers: no answer" in line.plain


@pytest.mark.parametrize(
    ("view", "marked"),
    [
        (View(Order.IOPS), "IOPS ▼"),
        (View(Order.IOPS, reverse=True), "IOPS ▲"),
        (View(Order.BANDWIDTH), "bandwidth ▼"),
        (View(Order.LATENCY), "read latency ▼"),
        (View(Order.NAME), "DEVICE ▲"),
        (View(Order.NAME, reverse=True), "DEVICE ▼"),
    ],
)
def test_the_order_is_marked_in_its_title(view: View, marked: str) -> None:
    text = text_of(scene(view=view), Shape(160))
    assert marked in text
    assert sum(text.count(mark) for mark in "▼▲") == (2 if view.order is Order.LATENCY else 1)


def test_a_terminal_without_utf_8_gets_ascii_only() -> None:
    assert text_of(scene(), Shape(160, 20, ascii_only=True)).isascii()


def test_the_natural_width_shows_every_column_and_cuts_nothing() -> None:
    made = scene(replace(BUSY, info=DeviceInfo(name="a rather long name", minor=0, connections=1)))
    lines: list[Text] = draw(made, Shape(natural_width(made)))
    assert lines[4].plain.startswith(" a rather long name ")
    assert lines[3].plain.split()[-2:] == ["IOPS,", "past"]


def test_without_devices_it_says_so() -> None:
    assert " No devices." in text_of(scene(rows=[], total=total_of([])), Shape(100, 20)).splitlines()


KEYS = {"rows": 40, "page": 10}


@pytest.mark.parametrize(("key", "order"), [("i", "iops"), ("b", "bandwidth"), ("l", "latency"), ("n", "name")])
def test_a_key_chooses_an_order_and_pressed_again_the_other_way(key: str, order: str) -> None:
    other = View(Order.NAME if key != "n" else Order.IOPS, first=7)
    once = other.after(key, **KEYS)
    assert once == View(Order(order))
    assert once.after(key, **KEYS) == View(Order(order), reverse=True)
    assert once.after(key, **KEYS).after(key, **KEYS) == once


@pytest.mark.parametrize(
    ("keys", "first"),
    [
        (["j"], 1),
        (["down", "down", "up"], 1),
        (["k"], 0),
        (["pagedown"], 10),
        ([" "] * 9, 30),
        (["end"], 30),
        (["end", "pageup"], 20),
        (["end", "home"], 0),
        (["x", "\r"], 0),
    ],
)
def test_scrolling_stays_within_the_devices(keys: list[str], first: int) -> None:
    view = View()
    for key in keys:
        view = view.after(key, **KEYS)
    assert view.first == first
