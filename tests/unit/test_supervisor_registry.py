"""The registry of devices compared with a model that recomputes everything each time, and refused changes."""

from __future__ import annotations

import errno
import itertools
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blkloom.control.messages import DeviceKey, Selector
from blkloom.control.states import Loaded
from blkloom.device_names import DeviceNameError
from blkloom.errors import DeviceBusy, DeviceExists, NoSuchDevice, ResourceError, TableError, UsageError
from blkloom.supervisor.group import Group
from blkloom.supervisor.registry import MOST_MINORS, Entry, Registry

LIMIT = 8
NAMES = st.sampled_from([f"d{number}" for number in range(12)])
UUIDS = st.sampled_from(["", "", *(f"u{number}" for number in range(6))])
MINORS = st.none() | st.integers(0, 10)


def entry_of(registry: Registry, name: str, minor: int | None = None, **kinds: Any) -> Entry:
    """A new device, in the registry."""
    entry = Entry(name, registry.check_new(name, kinds.get("uuid", ""), minor), Group("g"), **kinds)
    registry.add(entry)
    return entry


class Modelled(RuleBasedStateMachine):
    """`devices`: name → entry, the whole model; everything else is counted out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = Registry(LIMIT)
        self.devices: dict[str, Entry] = {}
        self.removed: list[str] = []

    def some(self, data: st.DataObject) -> Entry:
        return self.devices[data.draw(st.sampled_from(sorted(self.devices)))]

    def users_of(self, entry: Entry) -> set[int]:
        return {other.minor for other in self.devices.values() if entry.minor in other.below}

    def all_below(self, minors: frozenset[int]) -> set[int]:
        found = set(minors)
        while more := {m for e in self.devices.values() if e.minor in found for m in e.below} - found:
            found |= more
        return found

    @rule(name=NAMES, uuid=UUIDS, minor=MINORS)
    def make(self, name: str, uuid: str, minor: int | None) -> None:
        minors = {entry.minor for entry in self.devices.values()}
        uuids = {entry.uuid for entry in self.devices.values()} - {""}
        if name in self.devices or uuid in uuids or minor in minors:
            with pytest.raises(DeviceExists):
                entry_of(self.registry, name, minor, uuid=uuid)
        elif len(self.devices) == LIMIT:
            with pytest.raises(ResourceError):
                entry_of(self.registry, name, minor, uuid=uuid)
        else:
            entry = entry_of(self.registry, name, minor, uuid=uuid)
            lowest = next(number for number in itertools.count() if number not in minors)
            assert entry.minor == (lowest if minor is None else minor)
            self.devices[name] = entry

    @precondition(lambda self: self.devices)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        entry = self.some(data)
        if self.users_of(entry) or entry.connections:
            with pytest.raises(DeviceBusy):
                self.registry.check_unused(entry)
        else:
            self.registry.check_unused(entry)
            self.registry.remove(entry)
            del self.devices[entry.name]
            self.removed.append(entry.name)

    @precondition(lambda self: self.devices)
    @rule(data=st.data(), name=NAMES)
    def rename(self, data: st.DataObject, name: str) -> None:
        entry = self.some(data)
        former = entry.name
        if name in self.devices:
            with pytest.raises(DeviceExists):
                self.registry.rename(entry, name)
        else:
            self.registry.rename(entry, name)
            self.removed.append(former)
            self.devices[name] = self.devices.pop(former)

    @precondition(lambda self: self.devices)
    @rule(data=st.data(), uuid=UUIDS.filter(bool))
    def give_uuid(self, data: st.DataObject, uuid: str) -> None:
        entry = self.some(data)
        had = entry.uuid
        if had or uuid in {other.uuid for other in self.devices.values()}:
            with pytest.raises(UsageError):
                self.registry.set_uuid(entry, uuid)
            assert entry.uuid == had
        else:
            self.registry.set_uuid(entry, uuid)
            assert entry.uuid == uuid

    @precondition(lambda self: self.devices)
    @rule(data=st.data(), slot=st.sampled_from(["active", "inactive"]))
    def stand(self, data: st.DataObject, slot: str) -> None:
        entry = self.some(data)
        minors = sorted(other.minor for other in self.devices.values())
        below = frozenset(data.draw(st.sets(st.sampled_from(minors), max_size=3)))
        if entry.minor in self.all_below(below):
            with pytest.raises(TableError, match="would be stacked on itself"):
                self.registry.check_stack(entry, below)
        else:
            self.registry.check_stack(entry, below)
            self.registry.set_below(entry, **{slot: below})

    @precondition(lambda self: self.devices)
    @rule(data=st.data(), connections=st.integers(0, 2))
    def connect(self, data: st.DataObject, connections: int) -> None:
        self.some(data).connections = connections

    @invariant()
    def lookups_agree(self) -> None:
        by_minor = sorted(self.devices.values(), key=lambda entry: entry.minor)
        assert list(self.registry) == by_minor
        assert len(self.registry) == len(by_minor)
        for name, entry in self.devices.items():
            assert self.registry.find(name) is self.registry.named(name) is entry
            assert self.registry.find(Selector(minor=entry.minor)) is self.registry.get(entry.minor) is entry
            assert not entry.uuid or self.registry.find(Selector(uuid=entry.uuid)) is entry
        for name in set(self.removed) - self.devices.keys():
            assert self.registry.named(name) is None
            with pytest.raises(NoSuchDevice, match=name):
                self.registry.find(name)

    @invariant()
    def who_stands_on_whom_agrees(self) -> None:
        for entry in self.devices.values():
            users = self.users_of(entry)
            assert [holder.minor for holder in self.registry.holders(entry)] == sorted(users)
            assert self.registry.open_count(entry) == len(users) + entry.connections
            above = self.registry.above(entry)
            expected = {other.minor for other in self.devices.values() if entry.minor in self.all_below(other.below)}
            assert {other.minor for other in above} == expected
            assert len(above) == len(expected)
            for at, upper in enumerate(above):
                assert not {later.minor for later in above[at + 1 :]} & self.users_of(upper), "an upper one comes later"

    @invariant()
    def lower_ones_come_first(self) -> None:
        everything = {entry.minor for entry in self.devices.values()}
        for minors in (everything, {minor for minor in everything if minor % 2}):
            ordered = self.registry.lower_first(minors)
            assert {entry.minor for entry in ordered} == minors
            assert len(ordered) == len(minors)
            for at, entry in enumerate(ordered):
                assert not {later.minor for later in ordered[at:]} & entry.below, "a lower one comes later"

    @invariant()
    def what_is_told_agrees(self) -> None:
        for entry in self.devices.values():
            info = self.registry.info(entry)
            names = {other.name for other in self.devices.values() if entry.minor in other.below}
            assert (info.name, info.minor, info.uuid) == (entry.name, entry.minor, entry.uuid)
            assert set(info.holders) == names
            assert info.open_count == len(names) + entry.connections


TestModelled = Modelled.TestCase
TestModelled.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("name", ["", "a/b", "..", "control", "x" * 128, "nul\0"])
def test_a_name_no_device_can_have_is_refused(name: str) -> None:
    registry = Registry(LIMIT)
    with pytest.raises(DeviceNameError):
        registry.check_new(name, "", None)
    other = entry_of(registry, "fine")
    with pytest.raises(DeviceNameError):
        registry.rename(other, name)
    assert registry.find("fine") is other


def test_a_uuid_no_device_can_have_is_refused() -> None:
    registry = Registry(LIMIT)
    with pytest.raises(DeviceNameError, match="too long"):
        registry.check_new("fine", "u" * 129, None)


@pytest.mark.parametrize("minor", [-1, MOST_MINORS])
def test_a_number_no_device_can_have_is_refused(minor: int) -> None:
    with pytest.raises(UsageError, match=f"{minor} is not a minor number; take one from 0 to 1048575"):
        Registry(LIMIT).check_new("fine", "", minor)


@pytest.mark.parametrize("device", ["", "minor:0", "uuid:0", Selector(minor=-1), Selector(minor=9), Selector(uuid="0")])
def test_what_names_no_device_is_told_so(device: DeviceKey) -> None:
    registry = Registry(LIMIT)
    entry_of(registry, "there")
    with pytest.raises(NoSuchDevice, match="not found; `blkloom ls` lists"):
        registry.find(device)


@pytest.mark.parametrize("device", [Selector(), Selector(uuid="x", minor=0)])
def test_a_selector_has_one_of_uuid_and_number(device: Selector) -> None:
    with pytest.raises(UsageError, match="either a uuid or a minor number; give one of both"):
        Registry(LIMIT).find(device)


def test_no_name_stands_for_a_uuid_or_a_number() -> None:
    registry = Registry(LIMIT)
    plain = entry_of(registry, "plain", uuid="x")
    assert plain.minor == 0
    for name in ("uuid:x", "minor:0"):
        assert registry.find(entry_of(registry, name).name).name == name
    assert registry.find(Selector(uuid="x")) is registry.find(Selector(minor=0)) is plain


def test_clients_that_would_lose_their_devices_are_counted() -> None:
    registry = Registry(LIMIT)
    registry.check_no_clients()
    entry_of(registry, "one").connections = 1
    entry_of(registry, "two").connections = 2
    entry_of(registry, "unused")
    with pytest.raises(DeviceBusy, match=r"2 devices are in use: 'one' \(1 client\), 'two' \(2 clients\); .*--force"):
        registry.check_no_clients()


def test_the_limit_says_how_many_there_are_and_what_to_do() -> None:
    registry = Registry(2)
    entry_of(registry, "a")
    entry_of(registry, "b")
    with pytest.raises(
        ResourceError, match=r"there are 2 devices, the most this supervisor takes; .*--max-devices"
    ) as caught:
        registry.check_new("c", "", None)
    assert caught.value.errno == errno.ENOSPC


def test_a_busy_device_says_who_uses_it() -> None:
    registry = Registry(LIMIT)
    lower, upper = entry_of(registry, "lower"), entry_of(registry, "upper")
    registry.set_below(upper, active=frozenset({lower.minor}))
    lower.connections = 2
    with pytest.raises(DeviceBusy, match="in use: device 'upper' is stacked on it, 2 clients are connected; "):
        registry.check_unused(lower)


def test_loads_are_numbered_above_those_of_a_former_supervisor() -> None:
    registry = Registry(LIMIT)
    first = registry.new_load()
    registry.seen_load(41)
    registry.seen_load(7)
    assert (first, registry.new_load(), registry.new_load()) == (1, 42, 43)


def test_memory_counts_both_slots_and_what_is_on_its_way() -> None:
    registry = Registry(LIMIT)
    entry_of(registry, "a").memory_active = 1
    entry_of(registry, "b").memory_inactive = 10
    entry_of(registry, "c").memory_loading = 100
    assert registry.memory() == 111


def test_a_device_is_suspended_for_itself_or_for_one_below_and_failed_before_both() -> None:
    registry = Registry(LIMIT)
    entry = entry_of(registry, "a", active=Loaded(load=1, table="0 8 zero"))
    assert registry.info(entry).state == "ACTIVE"
    entry.suspended_for = 3
    assert (registry.info(entry).state, entry.state().suspended) == ("SUSPENDED", True)
    entry.suspended_for, entry.suspended = None, True
    assert (registry.info(entry).state, entry.state().suspended) == ("SUSPENDED", True)
    entry.failed = "its worker ended"
    assert (registry.info(entry).state, registry.info(entry).reason) == ("FAILED", "its worker ended")


def test_a_stack_higher_than_pythons_is_ordered() -> None:
    registry = Registry(4000)
    entries = [entry_of(registry, f"d{number}") for number in range(3000)]
    for lower, upper in itertools.pairwise(entries):
        registry.set_below(upper, active=frozenset({lower.minor}))
    assert registry.above(entries[0]) == entries[:0:-1]
    assert registry.lower_first({entry.minor for entry in entries}) == entries
    with pytest.raises(TableError, match="device 'd0' would be stacked on itself"):
        registry.check_stack(entries[0], frozenset({entries[-1].minor}))
