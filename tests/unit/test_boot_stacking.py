"""What devices need each other for, and in which order they are made."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkloom.boot.snapshots import snapshots_first
from blkloom.boot.stacking import in_order, is_absolute, needs, paths, with_paths
from blkloom.control.rundir import RunDir
from blkloom.table import format_table, parse_table
from blkloom.targets.registry import builtin_targets

RUN_DIR = RunDir(Path("/r/blkloom"))
NODES = {"/dev/loop7": "seven"}


@pytest.mark.parametrize(
    ("path", "needed"),
    [
        ("blkloom:a", {"a"}),
        ("blkloom:my\\ disk", {"my disk"}),
        ("/r/blkloom/dev/my\\\\x20disk", {"my disk"}),
        ("/r/blkloom/nodes/a", {"a"}),
        ("/r/blkloom/nodes/a-part3", {"a", "a-part3"}),
        ("/r//blkloom/nodes/../nodes/a", {"a"}),
        ("/r/blkloom/fuse/a", {"a"}),
        ("/dev/loop7", {"seven"}),
        ("/dev/loop8", set()),
        ("/srv/a.img", set()),
        ("8:16", set()),
    ],
)
@pytest.mark.parametrize("line", ["linear {} 0", "loop {}", "qcow2 {}", "striped 1 8 {} 0"])
def test_a_device_is_needed_by_each_of_its_paths(path: str, needed: set[str], line: str) -> None:
    table = parse_table(f"0 8 {line.format(path)}", targets=builtin_targets())
    assert needs(table, RUN_DIR, NODES) == needed


def test_the_names_of_roots_nodes_are_in_dev() -> None:
    table = parse_table("0 8 loop /dev/blkloom/a", targets=builtin_targets())
    run_dir = RunDir(Path("/run/blkloom"))
    assert needs(table, run_dir, {}) == ({"a"} if str(run_dir.links) == "/dev/blkloom" else set())


def test_paths_are_replaced_where_they_are_paths() -> None:
    text = "0 8 linear 0 0\n8 16 striped 2 8 0 0 b 8\n24 8 loop 0 512\n32 8 zero"
    table = parse_table(text, targets=builtin_targets())
    assert list(paths(table)) == ["0", "b"]
    assert format_table(with_paths(table, lambda path: f"/{path}")) == (
        "0 8 linear /0 0\n8 16 striped 2 8 /0 0 /b 8\n24 8 loop /0 512\n32 8 zero"
    )


@pytest.mark.parametrize(("path", "absolute"), [("/a", True), ("blkloom:a", True), ("8:1", True), ("a", False)])
def test_relative_paths_are_those_of_a_directory(path: str, absolute: bool) -> None:
    assert is_absolute(path) is absolute


def test_lower_devices_come_first() -> None:
    order, errors = in_order({"top": {"middle", "elsewhere"}, "middle": {"low"}, "low": set(), "alone": set()})
    assert (order, errors) == (["alone", "low", "middle", "top"], {})


def test_a_cycle_is_named_and_the_others_are_made() -> None:
    order, errors = in_order({"a": {"b"}, "b": {"c"}, "c": {"b"}, "self": {"self"}, "other": set()})
    assert order == ["other"]
    assert str(errors["b"]).startswith("needs itself: 'b' needs 'c' needs 'b'")
    assert str(errors["self"]).startswith("needs itself: 'self' needs 'self'")
    assert str(errors["a"]).startswith("needs 'b', which cannot be made: 'b' needs 'c' needs 'b'")


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.sets(st.sampled_from("abcdefgh"), max_size=3)))
def test_each_comes_after_what_it_needs_or_is_an_error(needed: dict[str, set[str]]) -> None:
    order, errors = in_order(needed)
    assert sorted([*order, *errors]) == sorted(needed)
    for at, name in enumerate(order):
        assert needed[name] & needed.keys() <= set(order[:at])
    assert all(needed[name] & errors.keys() for name in errors)


def test_snapshots_come_before_what_writes_to_their_origin() -> None:
    lines = {
        "disk": "snapshot-origin blkloom:real",
        "a": "snapshot blkloom:real /a.cow P 8",
        "b": "snapshot /r/blkloom/dev/real /b.cow P 8",
        "merging": "snapshot-merge blkloom:other /m.cow P 8",
        "c": "snapshot blkloom:other blkloom:real P 8",
        "alone": "snapshot /srv/a.img /alone.cow P 8",
        "real": "loop /srv/b.img",
    }
    tables = {name: parse_table(f"0 8 {line}", targets=builtin_targets()) for name, line in lines.items()}
    assert snapshots_first(tables, "/r/blkloom/dev") == {"disk": {"a", "b"}, "merging": {"c"}}
