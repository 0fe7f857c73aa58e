"""The supervisor's view of a table before a worker loads it, and refused tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from blkloom.errors import ResourceError, TableError, UnknownTarget, UsageError
from blkloom.supervisor.group import Group
from blkloom.supervisor.registry import Entry, Registry
from blkloom.supervisor.tables import Tables, error_table
from blkloom.targets.registry import Targets, all_targets

FOLDER = Path("/run/blkloom/dev")
LIMIT = 1 << 20


@pytest.fixture
def registry() -> Registry:
    return Registry(64)


@pytest.fixture
def tables(registry: Registry) -> Tables:
    return Tables(all_targets(), registry, FOLDER, memory=LIMIT)


def add(registry: Registry, name: str) -> Entry:
    entry = Entry(name, registry.check_new(name, "", None), Group("g"))
    registry.add(entry)
    return entry


def test_devices_are_known_by_name_and_by_socket_and_files_are_no_devices(registry: Registry, tables: Tables) -> None:
    lower = [add(registry, name) for name in ("a", "my disk", "c")]
    upper = add(registry, "upper")
    text = "0 8 linear blkloom:a 0\n8 8 linear /run/blkloom/dev/my\\\\x20disk 0\n16 8 linear /run/other/c 0\n24 8 zero"
    assert tables.read(upper, text, "table").below == {lower[0].minor, lower[1].minor}


def test_one_that_appears_twice_is_stood_on_once(registry: Registry, tables: Tables) -> None:
    lower, upper = add(registry, "a"), add(registry, "upper")
    found = tables.read(upper, "0 16 striped 2 8 blkloom:a 0 blkloom:a 8", "table")
    assert found.below == {lower.minor}


def test_a_device_that_is_not_there_is_named_with_its_place(registry: Registry, tables: Tables) -> None:
    upper = add(registry, "upper")
    with pytest.raises(TableError, match="Device lookup failed") as caught:
        tables.read(upper, "0 8 zero\n8 8 linear blkloom:absent 0", "my.table")
    assert (caught.value.value, caught.value.place.source, caught.value.place.line) == (
        "blkloom:absent",
        "my.table",
        2,
    )


def test_one_that_is_only_being_made_is_not_there_yet(registry: Registry, tables: Tables) -> None:
    upper = add(registry, "upper")
    add(registry, "a").making = True
    with pytest.raises(TableError, match="Device lookup failed"):
        tables.read(upper, "0 8 linear blkloom:a 0", "table")


def test_nothing_stands_on_a_failed_device(registry: Registry, tables: Tables) -> None:
    upper = add(registry, "upper")
    add(registry, "a").failed = "its worker was killed by SIGSEGV"
    with pytest.raises(UsageError, match="device 'a' has failed: its worker was killed by SIGSEGV; blkloom resume a"):
        tables.read(upper, "0 8 linear blkloom:a 0", "table")


@pytest.mark.parametrize("slot", ["active", "inactive"])
def test_a_cycle_is_refused_whichever_slot_it_goes_through(registry: Registry, tables: Tables, slot: str) -> None:
    bottom, middle, top = (add(registry, name) for name in ("bottom", "middle", "top"))
    registry.set_below(top, active=tables.read(top, "0 8 linear blkloom:middle 0", "table").below)
    registry.set_below(middle, **{slot: tables.read(middle, "0 8 linear blkloom:bottom 0", "table").below})
    for text in ("0 8 linear blkloom:top 0", "0 8 linear blkloom:bottom 0"):
        with pytest.raises(TableError, match="device 'bottom' would be stacked on itself"):
            tables.read(bottom, text, "table")
    assert tables.read(top, "0 8 linear blkloom:bottom 0", "table").below == {bottom.minor}, "a diamond is no cycle"


def test_what_does_not_parse_is_refused_with_its_source(registry: Registry, tables: Tables) -> None:
    entry = add(registry, "a")
    with pytest.raises(UnknownTarget) as caught:
        tables.read(entry, "0 8 lineer blkloom:a 0", "other.table")
    assert (caught.value.value, caught.value.place.source) == ("lineer", "other.table")


def test_no_target_is_mapped_here(registry: Registry, tables: Tables, tmp_path: Path) -> None:
    entry = add(registry, "a")
    assert tables.read(entry, f"0 8 linear {tmp_path}/missing 0", "table").below == frozenset()


# Memory


def test_memory_is_what_a_ram_device_takes_and_nothing_else(registry: Registry, tables: Tables) -> None:
    entry = add(registry, "a")
    assert tables.read(entry, "0 24 ram", "table").memory == 24 * 512
    assert tables.read(entry, "0 8 zero\n8 8 linear /disk 0", "table").memory == 0


def test_the_last_byte_of_memory_may_be_had_and_none_above(registry: Registry, tables: Tables) -> None:
    add(registry, "other").memory_active = LIMIT - 8 * 512
    entry = add(registry, "a")
    assert tables.read(entry, "0 8 ram", "table").memory == 4096
    with pytest.raises(ResourceError, match=r"memory for 'a' are too much.* of the 1 MiB they may have; .*--max-ram"):
        tables.read(entry, "0 9 ram", "table")


def test_both_slots_of_a_device_count_but_a_table_makes_way_for_the_next(registry: Registry, tables: Tables) -> None:
    entry = add(registry, "a")
    entry.memory_active, entry.memory_inactive = LIMIT // 2, LIMIT // 2
    half, more = LIMIT // 2 // 512, LIMIT // 2 // 512 + 1
    tables.read(entry, f"0 {half} ram", "table")
    with pytest.raises(ResourceError):
        tables.read(entry, f"0 {more} ram", "table")


def test_a_table_on_its_way_counts_for_others(registry: Registry, tables: Tables) -> None:
    add(registry, "other").memory_loading = LIMIT
    entry = add(registry, "a")
    with pytest.raises(ResourceError):
        tables.read(entry, "0 8 ram", "table")


def test_a_table_without_memory_is_taken_however_little_is_left(registry: Registry, tables: Tables) -> None:
    add(registry, "other").memory_active = 2 * LIMIT  # a former supervisor had a higher limit
    assert tables.read(add(registry, "a"), "0 8 zero", "table").memory == 0


def test_a_table_is_shown_as_it_was_meant(tables: Tables) -> None:
    assert tables.shown("# mine\n 0  8  zero\n\n8 8 linear   /dev/x 3") == "0 8 zero\n8 8 linear /dev/x 3"


@pytest.mark.parametrize(("size", "sectors"), [(0, 1), (512, 1), (4096, 8)])
def test_the_table_that_fails_all_io_is_as_long_as_the_device(tables: Tables, size: int, sectors: int) -> None:
    (segment,) = tables.parsed(error_table(size)).segments
    assert (segment.target.name, segment.start, segment.length) == ("error", 0, sectors)


def test_without_plug_ins_their_targets_are_unknown(registry: Registry) -> None:
    bare = Tables(Targets(), registry, FOLDER, memory=LIMIT)
    with pytest.raises(UnknownTarget):
        bare.look("0 8 zero", "table")
