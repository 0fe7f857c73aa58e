"""The descriptor store owns its descriptors, each under a label, until they are dropped."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Literal

import pytest

from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.states import FailedSync, Label, file_label
from left_behind import no_descriptor_left


@pytest.fixture(autouse=True)
def all_descriptors_closed() -> Iterator[None]:
    with no_descriptor_left():
        yield


@pytest.fixture
def store() -> Iterator[DescriptorStore]:
    made = DescriptorStore()
    yield made
    for device in range(4):
        made.drop(made.labels(device))
    assert len(made) == 0


Role = Literal["file", "claim", "memory", "listen", "connection"]


def label(device: int, key: str, *, role: Role = "file", load: int = 1) -> Label:
    return Label(device=device, load=load, role=role, key=key)


def new_descriptor() -> int:
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def is_open(descriptor: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{descriptor}")


def test_what_is_put_is_found_by_its_whole_label(store: DescriptorStore) -> None:
    kept = new_descriptor()
    store.put(label(1, "a"), kept)
    assert store.find(label(1, "a")) == kept
    for other in (label(2, "a"), label(1, "b"), label(1, "a", role="claim"), label(1, "a", load=2)):
        assert store.find(other) is None


def test_a_second_of_the_same_label_closes_the_first(store: DescriptorStore) -> None:
    first, second = new_descriptor(), new_descriptor()
    store.put(label(1, "a"), first)
    store.put(label(1, "a"), second)
    assert not is_open(first)
    assert (store.find(label(1, "a")), len(store)) == (second, 1)


def test_dropping_closes_those_labels_and_no_others(store: DescriptorStore) -> None:
    kept, dropped = new_descriptor(), new_descriptor()
    store.put(label(1, "kept"), kept)
    store.put(label(1, "dropped"), dropped)
    store.drop([label(1, "dropped"), label(1, "dropped"), label(3, "never there")])
    assert (is_open(kept), is_open(dropped)) == (True, False)


def test_dropping_the_labels_of_a_device_closes_all_of_it_and_nothing_else(store: DescriptorStore) -> None:
    mine, other = [new_descriptor() for _ in range(3)], new_descriptor()
    for number, descriptor in enumerate(mine):
        store.put(label(1, str(number)), descriptor)
    store.put(label(2, "0"), other)
    store.drop(store.labels(1))
    store.drop(store.labels(1))
    assert [is_open(descriptor) for descriptor in [*mine, other]] == [False, False, False, True]


def test_labels_and_descriptors_of_devices_come_in_one_order(store: DescriptorStore) -> None:
    pairs = [(label(device, key), new_descriptor()) for device in (1, 2, 3) for key in "ab"]
    for what, descriptor in pairs:
        store.put(what, descriptor)
    found = store.of([3, 1])
    assert found == [*pairs[4:], *pairs[:2]]
    assert all(is_open(descriptor) for _, descriptor in found), "they stay the store's"


def test_what_is_received_becomes_the_stores(store: DescriptorStore) -> None:
    descriptors = [new_descriptor(), new_descriptor()]
    first, second = descriptors
    assert store.receive([label(1, "a"), label(1, "b")], descriptors) == []
    assert (store.find(label(1, "a")), store.find(label(1, "b"))) == (first, second)


def test_descriptors_without_a_label_are_closed(store: DescriptorStore) -> None:
    descriptors = [new_descriptor(), new_descriptor()]
    named, unnamed = descriptors
    assert store.receive([label(1, "a")], descriptors) == []
    assert (is_open(named), is_open(unnamed)) == (True, False)


def test_labels_without_a_descriptor_are_returned_and_not_there(store: DescriptorStore) -> None:
    assert store.receive([label(1, "a"), label(1, "b")], [new_descriptor()]) == [label(1, "b")]
    assert store.find(label(1, "b")) is None
    assert len(store) == 1


def test_connections_and_what_moves_with_them_are_only_passing(store: DescriptorStore) -> None:
    passing = [label(1, "0", role="connection", load=0), label(1, "0", role="memory", load=0)]
    staying = [label(1, "e1", role="listen", load=0), label(1, "0", role="memory"), label(1, "w-/f", role="claim")]
    for what in [*staying, *passing, label(2, "0", role="connection", load=0)]:
        store.put(what, new_descriptor())
    assert sorted(store.passing(1), key=str) == sorted(passing, key=str)
    assert store.passing(3) == []


def test_what_is_taken_out_is_the_callers(store: DescriptorStore) -> None:
    descriptor = new_descriptor()
    store.put(label(1, "a"), descriptor)
    assert store.take(label(1, "a")) == descriptor
    assert (store.find(label(1, "a")), store.take(label(1, "a")), len(store)) == (None, None, 0)
    os.close(descriptor)


def test_labels_of_former_loads_are_outlived_and_those_of_the_device_are_not(store: DescriptorStore) -> None:
    labels = [label(device, "a", load=load) for device, load in ((1, 0), (1, 1), (1, 2), (2, 1))]
    for what in labels:
        store.put(what, new_descriptor())
    store.note_failed_sync(label(1, "lost", load=3), errno.EIO)
    assert store.outlived(1, {2}) == [labels[1], label(1, "lost", load=3)]


def test_a_failed_sync_is_known_until_its_label_is_dropped(store: DescriptorStore) -> None:
    store.put(label(1, "a"), new_descriptor())
    store.note_failed_sync(label(1, "a"), errno.EIO)
    store.put(label(1, "a"), new_descriptor())
    assert store.sync_error(label(1, "a")) == errno.EIO
    assert store.failed_syncs(1) == [FailedSync(label=label(1, "a"), errno=errno.EIO)]
    assert (store.sync_error(label(1, "b")), store.failed_syncs(2)) == (0, [])
    store.drop([label(1, "a")])
    assert (store.sync_error(label(1, "a")), store.failed_syncs(1)) == (0, [])


def test_files_of_a_load_are_found_by_path_without_directories(store: DescriptorStore) -> None:
    paths = ["disk.img", "vm/", "vm/disk.img"]
    descriptors = {path: new_descriptor() for path in paths}
    for path, descriptor in descriptors.items():
        store.put(file_label(1, 2, path, writable=True, direct=False), descriptor)
    assert store.files(1, 2) == {path: descriptors[path] for path in ("disk.img", "vm/disk.img")}
    assert store.files(1, 3) == {}


def test_the_next_program_reads_what_was_written(store: DescriptorStore) -> None:
    pairs = [(label(1, "a"), new_descriptor()), (label(2, "caf\udce9"), new_descriptor())]
    for what, descriptor in pairs:
        store.put(what, descriptor)
    memory = store.write()
    assert all(os.get_inheritable(descriptor) for _, descriptor in pairs)
    for what, _ in pairs:
        store.take(what)
    store.read(memory)
    assert list(store) == pairs
    assert not any(os.get_inheritable(descriptor) for _, descriptor in pairs)
