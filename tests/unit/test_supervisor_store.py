"""The store owns the descriptors it is given, each under its label, until they are dropped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Literal

import pytest

from blkloom.control.states import Label
from blkloom.supervisor.store import Store


@pytest.fixture(autouse=True)
def all_descriptors_closed() -> Iterator[None]:
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store()
    yield made
    for device in range(4):
        made.forget(device)
    assert len(made) == 0


Role = Literal["file", "claim", "memory", "listen", "connection"]


def label(device: int, key: str, *, role: Role = "file", load: int = 1) -> Label:
    return Label(device=device, load=load, role=role, key=key)


def new_descriptor() -> int:
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def is_open(descriptor: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{descriptor}")


def test_what_is_put_is_found_by_its_whole_label(store: Store) -> None:
    kept = new_descriptor()
    store.put(label(1, "a"), kept)
    assert store.find(label(1, "a")) == kept
    for other in (label(2, "a"), label(1, "b"), label(1, "a", role="claim"), label(1, "a", load=2)):
        assert store.find(other) is None


def test_a_second_of_the_same_label_closes_the_first(store: Store) -> None:
    first, second = new_descriptor(), new_descriptor()
    store.put(label(1, "a"), first)
    store.put(label(1, "a"), second)
    assert not is_open(first)
    assert (store.find(label(1, "a")), len(store)) == (second, 1)


def test_dropping_closes_those_labels_and_no_others(store: Store) -> None:
    kept, dropped = new_descriptor(), new_descriptor()
    store.put(label(1, "kept"), kept)
    store.put(label(1, "dropped"), dropped)
    store.drop([label(1, "dropped"), label(1, "dropped"), label(3, "never there")])
    assert (is_open(kept), is_open(dropped)) == (True, False)


def test_forgetting_a_device_closes_all_of_it_and_nothing_else(store: Store) -> None:
    mine, other = [new_descriptor() for _ in range(3)], new_descriptor()
    for number, descriptor in enumerate(mine):
        store.put(label(1, str(number)), descriptor)
    store.put(label(2, "0"), other)
    store.forget(1)
    store.forget(1)
    assert [is_open(descriptor) for descriptor in [*mine, other]] == [False, False, False, True]


def test_labels_and_descriptors_of_devices_come_in_one_order(store: Store) -> None:
    pairs = [(label(device, key), new_descriptor()) for device in (1, 2, 3) for key in "ab"]
    for what, descriptor in pairs:
        store.put(what, descriptor)
    labels, descriptors = store.of([3, 1])
    assert list(zip(labels, descriptors, strict=True)) == [*pairs[4:], *pairs[:2]]
    assert all(is_open(descriptor) for descriptor in descriptors), "they stay the store's"


def test_what_is_taken_becomes_the_stores(store: Store) -> None:
    descriptors = [new_descriptor(), new_descriptor()]
    first, second = descriptors
    store.take([label(1, "a"), label(1, "b")], descriptors)
    assert (store.find(label(1, "a")), store.find(label(1, "b"))) == (first, second)


def test_descriptors_without_a_label_are_closed(store: Store) -> None:
    descriptors = [new_descriptor(), new_descriptor()]
    named, unnamed = descriptors
    store.take([label(1, "a")], descriptors)
    assert (is_open(named), is_open(unnamed)) == (True, False)


def test_labels_without_a_descriptor_are_not_there(store: Store) -> None:
    store.take([label(1, "a"), label(1, "b")], [new_descriptor()])
    assert store.find(label(1, "b")) is None
    assert len(store) == 1


def test_connections_and_what_moves_with_them_are_only_passing(store: Store) -> None:
    passing = [label(1, "0", role="connection", load=0), label(1, "0", role="memory", load=0)]
    staying = [label(1, "e1", role="listen", load=0), label(1, "0", role="memory"), label(1, "w-/f", role="claim")]
    for what in [*staying, *passing, label(2, "0", role="connection", load=0)]:
        store.put(what, new_descriptor())
    assert sorted(store.passing(1), key=str) == sorted(passing, key=str)
    assert store.passing(3) == []
