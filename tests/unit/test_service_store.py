"""systemd's descriptor store: what is sent over NOTIFY_SOCKET, the names of descriptors, and which are taken up."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.states import Label, Role, export_label
from blkloom.export.systemd import PassedDescriptor, ServiceNotifier
from blkloom.supervisor.service_store import ServiceStore, stored_label, stored_name, take_stored

DEVICE = export_label(3, "auto-fuse", "export", "device")
RECORD = export_label(3, "auto-fuse", "export", "record")
FILE = Label(device=3, load=7, role="file", key="w-/srv/a")
MEMORY = Label(device=3, load=7, role="memory", key="0")


class Manager:
    """Receives notifications."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.setblocking(False)

    def told(self) -> list[tuple[str, list[int]]]:
        """What has arrived: the text, and inode numbers of the descriptors."""
        found = []
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(64))
            except BlockingIOError:
                return found
            fds = array.array("i")
            for _, _, rights in ancillary:
                fds.frombytes(rights)
            found.append((data.decode(), [os.fstat(fd).st_ino for fd in fds]))
            for fd in fds:
                os.close(fd)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


@pytest.fixture
def store(manager: Manager) -> Iterator[DescriptorStore]:
    made = DescriptorStore(ServiceStore(ServiceNotifier({"NOTIFY_SOCKET": manager.address})))
    yield made
    made.drop(made.labels(3))


def new_descriptor() -> tuple[int, int]:
    made = os.memfd_create("test", os.MFD_CLOEXEC)
    return made, os.fstat(made).st_ino


def test_a_connection_and_its_end_are_told(store: DescriptorStore, manager: Manager) -> None:
    descriptor, inode = new_descriptor()
    store.put(DEVICE, descriptor)
    assert manager.told() == [("FDSTORE=1\nFDNAME=export.3.0.auto-fuse/device", [inode])]
    store.drop([DEVICE])
    assert manager.told() == [("FDSTOREREMOVE=1\nFDNAME=export.3.0.auto-fuse/device", [])]
    store.drop([DEVICE])
    assert manager.told() == []


def test_a_second_of_the_same_label_replaces_the_first(store: DescriptorStore, manager: Manager) -> None:
    store.put(MEMORY, new_descriptor()[0])
    manager.told()
    descriptor, inode = new_descriptor()
    store.put(MEMORY, descriptor)
    assert manager.told() == [
        ("FDSTOREREMOVE=1\nFDNAME=memory.3.7.0", []),
        ("FDSTORE=1\nFDNAME=memory.3.7.0", [inode]),
    ]


def test_files_and_what_comes_from_the_manager_are_not_sent(store: DescriptorStore, manager: Manager) -> None:
    store.put(FILE, new_descriptor()[0])
    store.adopt(DEVICE, new_descriptor()[0])
    store.read(_written())
    assert manager.told() == []
    assert store.find(MEMORY) is not None


def _written() -> int:
    """As the program before an upgrade has written it."""
    former = DescriptorStore()
    former.put(MEMORY, new_descriptor()[0])
    return former.write()


@pytest.mark.parametrize("name", ["", "a:b", "a\nFDSTOREREMOVE=1", "x" * 256, "\xe9"])
def test_a_name_that_systemd_refuses_is_an_error(manager: Manager, name: str) -> None:
    notifier = ServiceNotifier({"NOTIFY_SOCKET": manager.address})
    with pytest.raises(ValueError, match="no name for a stored descriptor"):
        notifier.store(name, 0)
    with pytest.raises(ValueError, match="no name for a stored descriptor"):
        notifier.forget(name)
    assert manager.told() == []


ROLES: tuple[Role, ...] = ("export", "memory", "file", "claim", "listen", "connection")
KEYS = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters=":"), min_size=1, max_size=60)


@given(
    st.builds(
        Label, role=st.sampled_from(ROLES), device=st.integers(0, 1 << 20), load=st.integers(0, 1 << 40), key=KEYS
    )
)
def test_a_name_leads_back_to_its_label(label: Label) -> None:
    name = stored_name(label)
    assert (name is not None) == (label.role == "export" or (label.role == "memory" and label.load > 0))
    assert name is None or stored_label(name) == label


@pytest.mark.parametrize("name", ["blkloom.socket", "stored", "", "export.3.0.", "export.x.0.a", "file.3.7.a"])
def test_other_names_are_no_label(name: str) -> None:
    assert stored_label(name) is None


def test_stored_descriptors_are_taken_and_others_left() -> None:
    store = DescriptorStore()
    passed = {name: new_descriptor()[0] for name in ("blkloom.socket", *map(str, map(stored_name, (DEVICE, RECORD))))}
    os.set_inheritable(passed["export.3.0.auto-fuse/device"], True)
    left = take_stored(store, [PassedDescriptor(fd, name) for name, fd in passed.items()])
    assert left == [PassedDescriptor(passed["blkloom.socket"], "blkloom.socket")]
    assert store.find(DEVICE) == passed["export.3.0.auto-fuse/device"]
    assert not os.get_inheritable(passed["export.3.0.auto-fuse/device"])
    store.drop([DEVICE, RECORD])
    os.close(passed["blkloom.socket"])


def test_a_record_without_its_connection_is_dropped(manager: Manager) -> None:
    store = DescriptorStore(ServiceStore(ServiceNotifier({"NOTIFY_SOCKET": manager.address})))
    take_stored(store, [PassedDescriptor(new_descriptor()[0], "export.3.0.auto-fuse/record")])
    assert len(store) == 0
    assert manager.told() == [("FDSTOREREMOVE=1\nFDNAME=export.3.0.auto-fuse/record", [])]
