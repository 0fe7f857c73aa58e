"""The allowed arguments of each target; targets print the arguments from which they were parsed."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkloom.errors import Place, TableError
from blkloom.table.arguments import Arguments, Word
from blkloom.targets.device_ref import DeviceRef
from blkloom.targets.linear import Linear
from blkloom.targets.loop import Loop
from blkloom.targets.ram import Ram
from blkloom.targets.registry import builtin_targets
from blkloom.targets.spec import TargetSpec
from blkloom.targets.striped import Striped
from blkloom.units import DEVICE_LIMIT, SECTOR, Bytes, Sectors

PATHS = st.text(min_size=1)
SECTORS = st.integers(0, (DEVICE_LIMIT - 1) // SECTOR).map(Sectors)
REFS = st.builds(DeviceRef, PATHS, SECTORS)
WAYS = st.sampled_from(("", "direct_io", "direct_io=require", "block_map", "block_map=try"))
TARGETS = st.one_of(
    st.sampled_from([cls() for cls in (*map(builtin_targets().find, ("zero", "error", "ram")),)]),
    st.builds(Linear, REFS),
    st.builds(Striped, st.integers(1, 2**32 - 1).map(Sectors), st.lists(REFS, min_size=1, max_size=5).map(tuple)),
    st.builds(Ram, st.booleans(), st.booleans()),
    st.builds(Loop, PATHS, SECTORS.map(lambda n: Bytes(n * SECTOR)), WAYS, st.sampled_from(("", "read_only"))),
)


def arguments(cls: type[TargetSpec], words: list[str]) -> Arguments:
    """Words as if they stood on line 3, word i in column 10 * i."""
    placed = [Word(word, Place("T", 3, 10 * i)) for i, word in enumerate(words, 1)]
    return Arguments(placed, target=cls.name, syntax=cls.syntax, end=Place("T", 3, 99))


def parse(text: str) -> TargetSpec:
    name, *words = text.split(" ")
    cls = builtin_targets().find(name)
    return cls.parse(arguments(cls, words))


@given(TARGETS)
def test_a_target_parses_back_from_what_it_prints(target: TargetSpec) -> None:
    assert type(target).parse(arguments(type(target), target.format())) == target


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("linear /dev/sdb 2048", Linear(DeviceRef("/dev/sdb", Sectors(2048)))),
        ("linear 8:16 0", Linear(DeviceRef("8:16", Sectors(0)))),
        ("linear blkloom:base 8", Linear(DeviceRef("blkloom:base", Sectors(8)))),
        ("striped 2 100 a 0 b 7", Striped(Sectors(100), (DeviceRef("a", Sectors(0)), DeviceRef("b", Sectors(7))))),
        ("striped 1 3 a 0", Striped(Sectors(3), (DeviceRef("a", Sectors(0)),))),
        ("ram", Ram()),
        ("ram 0", Ram()),
        ("ram 2 preallocate huge_pages", Ram(huge_pages=True, preallocate=True)),
        ("loop /tmp/f", Loop("/tmp/f")),
        ("loop /tmp/f 1024", Loop("/tmp/f", Bytes(1024))),
        ("loop /tmp/f 0 1 read_only", Loop("/tmp/f", reading="read_only")),
        (
            "loop /tmp/f 4096 4 immutable=off block_map=try block_size=4096 read_only=auto",
            Loop("/tmp/f", Bytes(4096), "block_map=try", "read_only=auto", "block_size=4096", "immutable=off"),
        ),
        ("loop /tmp/f 512 2 read_only direct_io", Loop("/tmp/f", Bytes(512), way="direct_io", reading="read_only")),
    ],
)
def test_arguments_mean(text: str, target: TargetSpec) -> None:
    assert parse(text) == target


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("zero 1", 10, "Invalid argument count"),
        ("error x", 99, "Invalid argument count: device sector is missing"),
        ("error 1", 10, "1 options announced, 0 given"),
        ("linear", 99, "Invalid argument count: dev path is missing"),
        ("linear f", 99, "Invalid argument count: device sector is missing"),
        ("linear f 0 0", 30, "Invalid argument count"),
        ("linear f 1k", 20, "Invalid device sector"),
        ("linear f -1", 20, "Invalid device sector"),
        (f"linear f {2**54}", 20, "Invalid device sector"),
        ("striped 0 8", 10, "Invalid stripe count"),
        ("striped x 8 a 0", 10, "Invalid stripe count"),
        (f"striped {2**32} 8 a 0", 10, "Invalid stripe count"),
        ("striped 2 8 a 0", 10, "Not enough destinations specified"),
        ("striped 1 8 a 0 b 0", 10, "Invalid argument count"),
        ("striped 1", 10, "Not enough destinations specified"),
        ("striped 1 0 a 0", 20, "Invalid chunk_size"),
        ("striped 1 8 a y", 40, "Invalid device sector"),
        ("ram 1", 10, "Invalid argument count"),
        ("ram 1 hugepages", 20, "unknown option"),
        ("ram 2 preallocate preallocate", 30, "option given twice"),
        ("loop", 99, "Invalid argument count: path is missing"),
        ("loop f x", 20, "Invalid file offset"),
        ("loop f 512junk", 20, "Invalid file offset"),
        ("loop f 511", 20, "Unaligned offset"),
        ("loop f 0 1", 30, "Invalid argument count"),
        ("loop f 0 1 fast", 40, "unknown option"),
        ("loop f 0 0 x", 30, "Invalid argument count"),
    ],
)
def test_wrong_arguments_are_refused_where_they_stand(text: str, column: int, message: str) -> None:
    with pytest.raises(TableError, match=message) as caught:
        parse(text)
    assert caught.value.place == Place("T", 3, column)
    assert caught.value.cure


def test_an_unaligned_offset_says_which_would_do() -> None:
    with pytest.raises(TableError, match="write 512 or 1024"):
        parse("loop f 1000")


def test_targets_that_must_stand_alone() -> None:
    alone = [cls.name for cls in builtin_targets() if cls.singleton]
    assert alone == ["ram", "snapshot", "snapshot-merge", "snapshot-origin"]


@pytest.mark.parametrize("page", ["README.md", "docs/targets.md"])
def test_the_documentation_has_the_arguments_that_are_read(page: str) -> None:
    text = (Path(__file__).parents[2] / page).read_text()
    for cls in builtin_targets():
        rows = [line for line in text.splitlines() if re.match(rf"\| \[?`{cls.name}`", line)]
        if page == "README.md" and not rows:
            assert f"`{cls.name}`" in text
            continue
        (line,) = rows
        shown = re.sub(r"<#opts> .*", "<#opts> <opts...>]", cls.syntax) if cls.name == "qcow2" else cls.syntax
        wanted = "`{}`".format(shown.replace("|", r"\|")) if shown else ("none" if page == "docs/targets.md" else "")
        assert re.split(r"(?<!\\)\|", line)[2].strip() == wanted


def test_every_built_in_target_documents_itself() -> None:
    for cls in builtin_targets():
        assert cls.summary
        assert cls.__doc__
        assert cls.__module__.endswith(cls.name.replace("-", "_"))
