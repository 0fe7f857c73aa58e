"""FUSE endpoints of a supervisor: mount, mount again, reap. No worker serves them in these tests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkloom.control.descriptor_store import DescriptorStore
from blkloom.control.messages import AddExport
from blkloom.control.rundir import RunDir
from blkloom.control.states import ExportState
from blkloom.export.fuse.endpoints import FuseEndpoints
from blkloom.export.fuse.mountinfo import mounted_at
from blkloom.export.fuse.state import FuseDetails
from blkloom.export.fuse.users import users_of
from blkloom.supervisor import exporting
from blkloom.supervisor.group import Group
from blkloom.supervisor.reaping import reap_endpoints
from blkloom.supervisor.registry import Entry
from faulty_fs import needs_fuse


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    needs_fuse()
    made = RunDir.at(tmp_path / "run")
    made.make()
    return made


@pytest.fixture
def entry(run_dir: RunDir) -> Iterator[tuple[Entry, ExportState, DescriptorStore]]:
    """A device with a file in the run directory."""
    store = DescriptorStore()
    entry = Entry("disk", 0, Group("group"))
    export = exporting.wanted(run_dir, entry, AddExport(device="disk", kind="fuse"))
    asyncio.run(exporting.open_endpoint(store, entry, export, allow_remote=False))
    entry.exports.append(export)
    yield entry, export, store
    asyncio.run(exporting.close_endpoint(store, entry, export))
    assert list(run_dir.mounts.iterdir()) == list(run_dir.files.iterdir()) == []


def test_what_no_other_worker_can_go_on_with_is_mounted_anew(entry: tuple[Entry, ExportState, DescriptorStore]) -> None:
    device, export, store = entry
    details = FuseDetails.of(export)
    if not details.survives:
        pytest.skip("this kernel has no FUSE_NOTIFY_RESEND (Linux 6.9)")
    kept = {label: os.fstat(store.find(label) or -1).st_ino for label in exporting.labels(store, device, export)}
    asyncio.run(exporting.reopen_lost(store, [device]))
    assert {label: os.fstat(store.find(label) or -1).st_ino for label in kept} == kept, "another can go on with it"
    details.survives = False
    details.put(export)
    asyncio.run(exporting.reopen_lost(store, [device]))
    assert FuseDetails.of(export).survives, "it was opened again"
    assert len(exporting.labels(store, device, export)) == len(kept)
    found = mounted_at(details.mounted)
    assert found is not None
    assert found.number == FuseDetails.of(export).number


def test_reaping_leaves_what_is_used_and_what_is_served(
    entry: tuple[Entry, ExportState, DescriptorStore], run_dir: RunDir
) -> None:
    device, export, store = entry
    assert reap_endpoints(run_dir, [export], alone=True) == []
    assert reap_endpoints(run_dir, [], alone=True) == [], "its connection lives"
    store.drop(exporting.labels(store, device, export))
    where = FuseDetails.of(export).mounted
    assert reap_endpoints(run_dir, [], alone=False) == [f"mount {where}", f"link {export.path}"]
    assert mounted_at(where) is None


def test_what_has_a_file_open_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    assert list(users_of(str(path))) == []
    with path.open("rb"):
        (user,) = users_of(str(path))
    assert user.endswith(f" (process {os.getpid()})")


def test_the_endpoint_of_a_device_is_a_link_with_a_name_that_a_file_may_have(run_dir: RunDir) -> None:
    call = AddExport(device="x", kind="fuse")
    for name in ("disk", "a b", "ü" * 63):
        state = FuseEndpoints().wanted(run_dir, name, call)
        assert Path(state.path).parent == run_dir.files
        assert len(os.fsencode(Path(state.path).name)) <= 255
