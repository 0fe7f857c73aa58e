"""What each target's arguments may be, and that targets print what they were parsed from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkloom.errors import Place, TableError
from blkloom.table.arguments import Arguments, Word
from blkloom.target.base import Target
from blkloom.target.leg import Leg
from blkloom.target.linear import Linear
from blkloom.target.loop import Loop
from blkloom.target.ram import Ram
from blkloom.target.registry import builtin_targets
from blkloom.target.striped import Striped
from blkloom.units import DEVICE_LIMIT, SECTOR, Bytes, Sectors

PATHS = st.text(min_size=1)
SECTORS = st.integers(0, (DEVICE_LIMIT - 1) // SECTOR).map(Sectors)
LEGS = st.builds(Leg, PATHS, SECTORS)
WAYS = st.sampled_from(("", "direct_io", "direct_io=require", "block_map", "block_map=try"))
TARGETS = st.one_of(
    st.sampled_from([cls() for cls in (*map(builtin_targets().find, ("zero", "error", "ram")),)]),
    st.builds(Linear, LEGS),
    st.builds(Striped, st.integers(1, 2**32 - 1).map(Sectors), st.lists(LEGS, min_size=1, max_size=5).map(tuple)),
    st.builds(Ram, st.booleans(), st.booleans()),
    st.builds(Loop, PATHS, SECTORS.map(lambda n: Bytes(n * SECTOR)), WAYS, st.sampled_from(("", "read_only"))),
)


def arguments(cls: type[Target], words: list[str]) -> Arguments:
    """Words as if they stood on line 3, word i in column 10 * i."""
    placed = [Word(word, Place("T", 3, 10 * i)) for i, word in enumerate(words, 1)]
    return Arguments(placed, target=cls.name, syntax=cls.syntax, end=Place("T", 3, 99))


def parse(text: str) -> Target:
    name, *words = text.split(" ")
    cls = builtin_targets().find(name)
    return cls.parse(arguments(cls, words))


@given(TARGETS)
def test_a_target_parses_back_from_what_it_prints(target: Target) -> None:
    assert type(target).parse(arguments(type(target), target.format())) == target


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("linear /dev/sdb 2048", Linear(Leg("/dev/sdb", Sectors(2048)))),
        ("linear 8:16 0", Linear(Leg("8:16", Sectors(0)))),
        ("linear blkloom:base 8", Linear(Leg("blkloom:base", Sectors(8)))),
        ("striped 2 100 a 0 b 7", Striped(Sectors(100), (Leg("a", Sectors(0)), Leg("b", Sectors(7))))),
        ("striped 1 3 a 0", Striped(Sectors(3), (Leg("a", Sectors(0)),))),
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
def test_arguments_mean(text: str, target: Target) -> None:
    assert parse(text) == target


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("zero 1", 10, "Invalid argument count"),
        ("error x", 10, "Invalid argument count"),
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


def test_only_ram_must_stand_alone() -> None:
    assert [cls.name for cls in builtin_targets() if cls.singleton] == ["ram"]


def test_every_built_in_target_documents_itself() -> None:
    for cls in builtin_targets():
        assert cls.summary
        assert cls.__doc__
        assert cls.__module__.endswith(cls.name)
