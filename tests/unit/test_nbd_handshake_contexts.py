"""Replies to metadata context options in the NBD handshake.

The table in test_nbd_handshake_musts.py maps each MUST of the specification to the tests here, too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from blkloom.export.nbd.codes import Option, Reply
from blkloom.export.nbd.offer import CONTEXT_OFFERS, Offer, negotiable
from handshake_client import (
    DISK,
    NO_ZEROES,
    Client,
    Said,
    client,
    contexts,
    extended,
    select,
    structured,
)

ALLOCATION = b"base:allocation"


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_contexts_before_structured_replies_are_invalid(option: Option) -> None:
    asking = client()
    assert asking.answer(option, contexts("disk", "base:allocation")) == Reply.ERR_INVALID
    assert asking.go().contexts == ()


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_contexts_of_an_unknown_export_are_unknown(option: Option) -> None:
    assert structured().answer(option, contexts("nosuch", "base:allocation")) == Reply.ERR_UNKNOWN


@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ((), True),
        (("base:",), True),
        (("base:allocation",), True),
        (("x-nosuch:", "base:allocation", "base:"), True),
        (("base:nosuch",), False),
        (("x-nosuch:", "qemu:dirty-bitmap:a", "based:allocation"), False),
    ],
)
def test_listing_contexts_matches_queries(queries: tuple[str, ...], found: bool) -> None:
    said = structured().ask(Option.LIST_META_CONTEXT, contexts("disk", *queries))
    listed = [Said(Option.LIST_META_CONTEXT, Reply.META_CONTEXT, bytes(4) + ALLOCATION)] if found else []
    assert said == [*listed, Said(Option.LIST_META_CONTEXT, Reply.ACK, b"")]


def test_listing_contexts_selects_none() -> None:
    asking = structured()
    asking.ask(Option.LIST_META_CONTEXT, contexts("disk", "base:allocation"))
    assert asking.go().contexts == ()


@pytest.mark.parametrize("begin", [structured, extended])
def test_selected_context_gets_the_id_transmission_uses(begin: Callable[[], Client]) -> None:
    asking = begin()
    context, ack = select(asking, "x-nosuch:a", "base:allocation", "base:allocation")
    assert (context.kind, context.data[4:], ack.kind) == (Reply.META_CONTEXT, ALLOCATION, Reply.ACK)
    assert asking.go().contexts == ((int.from_bytes(context.data[:4]), "base:allocation"),)


@pytest.mark.parametrize("queries", [(), ("base:",), ("base:nosuch",), ("x-nosuch:allocation",)])
def test_queries_that_select_nothing_are_acknowledged(queries: tuple[str, ...]) -> None:
    asking = structured()
    assert select(asking, *queries) == [Said(Option.SET_META_CONTEXT, Reply.ACK, b"")]
    assert asking.go().contexts == ()


@pytest.mark.parametrize(
    ("name", "queries", "answer"),
    [
        ("disk", (), Reply.ACK),
        ("disk", ("x-nosuch:a",), Reply.ACK),
        ("other", ("base:allocation",), Reply.ACK),
        ("nosuch", ("base:allocation",), Reply.ERR_UNKNOWN),
        ("disk", ("nonsense",), Reply.ERR_INVALID),
        ("disk", tuple(f"x-{number}:{'x' * 4000}" for number in range(30)), Reply.ERR_TOO_BIG),
    ],
)
def test_every_selection_replaces_the_one_before_even_if_it_fails(
    name: str, queries: tuple[str, ...], answer: Reply
) -> None:
    asking = structured()
    select(asking, "base:allocation")
    assert select(asking, *queries, name=name)[-1].kind == answer
    assert asking.go("disk").contexts == ()


def test_selection_holds_only_for_its_export() -> None:
    for name, valid in (("disk", True), ("", True), ("other", False)):
        asking = structured()
        select(asking, "base:allocation", name="disk")
        assert bool(asking.go(name).contexts) == valid


def test_options_that_fail_leave_what_was_agreed() -> None:
    asking = structured()
    select(asking, "base:allocation")
    for option in (Option.STARTTLS, Option.LIST, 99):
        asking.option(option, b"junk")
    asking.option(Option.EXTENDED_HEADERS)
    event = asking.go()
    assert event.extended
    assert event.contexts


def test_no_base_context_ever_requires_extended_headers() -> None:
    for queries in ((), ("base:",), ("base:allocation", "base:nosuch")):
        for option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            assert structured().answer(option, contexts("disk", *queries)) == Reply.ACK


# contexts of targets

NAMES = ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b0:1", "x-test:a")
RICH = Offer("rich", 1 << 20, contexts=NAMES[1:])


def rich() -> Client:
    asking = client(NO_ZEROES, RICH, DISK)
    assert asking.answer(Option.STRUCTURED_REPLY) == Reply.ACK
    return asking


def found(said: list[Said]) -> list[tuple[int, str]]:
    *contexts, last = said
    assert last == Said(last.option, Reply.ACK, b"")
    assert all(one.kind == Reply.META_CONTEXT for one in contexts)
    return [(int.from_bytes(one.data[:4]), one.data[4:].decode()) for one in contexts]


@pytest.mark.parametrize(
    ("queries", "wanted"),
    [
        ((), NAMES),
        (("base:",), NAMES[:1]),
        (("qemu:",), NAMES[1:4]),
        (("qemu:dirty-bitmap:",), NAMES[2:4]),
        (("qemu:dirty-bitmap:b0",), NAMES[2:3]),
        (("qemu:dirty-bitmap:b0:",), ()),
        (("qemu:dirty-bitmap:b", "qemu:allocation", "qemu:allocation-depth:", "x-test", "x-other:"), None),
        (("x-test:", "base:allocation"), (NAMES[0], NAMES[4])),
        (("qemu:", "base:", "qemu:allocation-depth", "x-test:a"), NAMES),
    ],
)
def test_listing_finds_contexts_by_name_namespace_and_kind(
    queries: tuple[str, ...], wanted: tuple[str, ...] | None
) -> None:
    asking = rich()
    if wanted is None:  # one of them has no colon
        assert asking.answer(Option.LIST_META_CONTEXT, contexts("rich", *queries)) == Reply.ERR_INVALID
        return
    listed = found(asking.ask(Option.LIST_META_CONTEXT, contexts("rich", *queries)))
    assert listed == [(0, name) for name in wanted]
    assert asking.go("rich").contexts == ()


def test_several_contexts_are_selected_at_once_each_with_an_id_of_its_own() -> None:
    asking = rich()
    queries = ("qemu:dirty-bitmap:b0:1", "base:allocation", "qemu:dirty-bitmap:nosuch", "qemu:allocation-depth")
    selected = found(select(asking, *queries, name="rich"))
    assert [name for _, name in selected] == ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0:1"]
    assert len({number for number, _ in selected}) == 3
    assert asking.go("").contexts == tuple(selected)


def test_a_selection_for_one_export_is_none_for_another_that_has_the_same_contexts() -> None:
    asking = rich()
    select(asking, "qemu:allocation-depth", "base:allocation", name="rich")
    assert asking.go("disk").contexts == ()


@pytest.mark.parametrize("query", ["qemu:", "qemu:dirty-bitmap:", "x-test:", "base:", "qemu:dirty-bitmap:nosuch"])
def test_wildcards_and_unknown_names_select_nothing(query: str) -> None:
    asking = rich()
    assert found(select(asking, query, name="rich")) == []
    assert asking.go("rich").contexts == ()


@pytest.mark.parametrize(
    "names", [[f"x-test:{number}" for number in range(65)], [f"x-test:{c * 4000}" for c in "abcde"]]
)
def test_more_contexts_than_a_connection_may_have_are_too_big(names: list[str]) -> None:
    asking = client(NO_ZEROES, Offer("disk", 512, contexts=tuple(names)))
    asking.answer(Option.STRUCTURED_REPLY)
    assert len(asking.ask(Option.LIST_META_CONTEXT, contexts("disk"))) == len(names) + 2
    assert select(asking, *names)[-1].kind == Reply.ERR_TOO_BIG
    assert asking.go().contexts == ()
    asking = client(NO_ZEROES, Offer("disk", 512, contexts=tuple(names)))
    asking.answer(Option.STRUCTURED_REPLY)
    assert [name for _, name in found(select(asking, *names[:4]))] == names[:4]


def test_only_names_that_are_contexts_are_offered() -> None:
    wrong = ["nonsense", ":leaf", "x-test:", "base:allocation", "base:else", "x-test:a\0b", "x-test:" + "x" * 4096]
    assert negotiable([*wrong, "x-test:a", "qemu:dirty-bitmap:b:c", "x-test:a"]) == (
        "x-test:a",
        "qemu:dirty-bitmap:b:c",
    )
    assert len(negotiable(f"x-test:{number}" for number in range(5000))) == CONTEXT_OFFERS
