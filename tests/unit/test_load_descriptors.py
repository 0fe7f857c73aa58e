"""Open files of a load: taken over from the previous load, requested, kept, and given back after a failure."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from blkloom.control.descriptor_store import DescriptorStore
from blkloom.errors import BackingError, ResourceError
from blkloom.open_files import descriptor_path, open_file
from blkloom.targets.holding import SharedFiles
from blkloom.targets.load_context import LoadContext
from blkloom.worker.load_descriptors import LoadDescriptors
from left_behind import no_descriptor_left


class Caller:
    """Opens, and remembers what."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool, bool, bool]] = []

    def __call__(self, path: str, *, writable: bool, direct: bool, exclusive: bool, opened: int | None = None) -> int:
        self.asked.append((path, writable, direct, exclusive))
        return open_file(path if opened is None else descriptor_path(opened), writable=writable, direct=direct)


def no_opener(path: str, *, writable: bool, direct: bool, exclusive: bool, opened: int | None = None) -> int:
    """There is no one who waits for the load."""
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "file"
    path.write_bytes(bytes(512))
    return str(path)


@pytest.fixture(autouse=True)
def all_descriptors_closed() -> Iterator[None]:
    with no_descriptor_left():
        yield


def close(*fds: int | None) -> None:
    for fd in fds:
        assert fd is not None
        os.close(fd)


def empty(store: DescriptorStore) -> None:
    store.drop([label for label, _ in store])


def test_a_file_is_asked_for_once_a_way(file: str) -> None:
    store, caller = DescriptorStore(), Caller()
    load = LoadDescriptors(store, 1, 7, caller)
    close(*(load.open(file, writable=writable, direct=False) for writable in (True, False, True)))
    assert caller.asked == [(file, True, False, False), (file, False, False, False)]
    assert [label.key for label in load.succeed()] == [f"w-{file}", f"r-{file}"]
    empty(store)


def test_what_a_failed_load_got_is_closed_and_not_kept(file: str) -> None:
    store = DescriptorStore()
    load = LoadDescriptors(store, 1, 7, Caller())
    close(load.open(file, writable=True, direct=False), load.memory(lambda: os.memfd_create("m")))
    load.fail()
    assert list(store) == []


def test_the_next_process_s_load_finds_everything_without_asking(file: str) -> None:
    store = DescriptorStore()
    first = LoadDescriptors(store, 1, 7, Caller())
    fd = first.open(file, writable=True, direct=False)
    first.claim(file, fd)
    memories = [first.memory(partial(os.memfd_create, name)) for name in ("a", "b")]
    close(fd, *memories)
    first.succeed()
    second = LoadDescriptors(store, 1, 7, no_opener, restored=True)
    found = [
        second.open(file, writable=True, direct=False),
        second.claimed(file),
        *(second.memory(lambda: pytest.fail("made anew")) for _ in memories),
    ]
    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in found]
    assert names == [file, file, "/memfd:a (deleted)", "/memfd:b (deleted)"]
    assert second.succeed() == []
    close(*found)
    empty(store)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "not kept by an older version"])
def test_the_directory_of_a_relative_path_is_kept_and_is_none_of_the_files(
    file: str, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    folder, real = Path(file).parent / "vm", file
    folder.mkdir()
    (folder / "link").symlink_to(real)
    monkeypatch.chdir(folder.parent)
    store = DescriptorStore()

    def name(load: LoadDescriptors) -> str:
        context = LoadContext(SharedFiles(), shared=True, descriptors=load)
        try:
            found = context.file("vm/link", read_only=True)
            return context.files.absolute("vm/link", found) if kept or load.restored else ""
        finally:
            context.close()
            del found
            load.succeed()

    assert name(LoadDescriptors(store, 1, 7, Caller())) == (f"{folder}/link" if kept else "")
    monkeypatch.chdir("/")
    assert list(store.files(1, 7)) == ["vm/link"]
    assert name(LoadDescriptors(store, 1, 7, no_opener, restored=True)) == (f"{folder}/link" if kept else real)
    empty(store)


def test_what_is_lost_and_cannot_be_asked_for_is_an_error_that_names_it(file: str) -> None:
    load = LoadDescriptors(DescriptorStore(), 1, 7, no_opener, restored=True)
    with pytest.raises(BackingError, match="was lost with the process that had it") as caught:
        load.open(file, writable=True, direct=False)
    assert (caught.value.path, caught.value.errno) == (file, errno.ESTALE)
    assert load.claimed(file) is None


def test_lost_memory_is_not_replaced_by_zeros() -> None:
    load = LoadDescriptors(DescriptorStore(), 1, 7, no_opener, restored=True)
    with pytest.raises(ResourceError, match="what was in its memory is lost"):
        load.memory(lambda: pytest.fail("made anew"))


def test_lost_memory_is_made_again_where_the_target_can_do_so() -> None:
    store = DescriptorStore()
    load = LoadDescriptors(store, 1, 7, no_opener, restored=True)
    context = LoadContext(SharedFiles(), descriptors=load)
    assert context.saved_state().is_lost
    context.saved_state().save("new")
    context.close()
    load.succeed()
    again = LoadContext(SharedFiles(), descriptors=LoadDescriptors(store, 1, 7, no_opener, restored=True))
    assert (again.saved_state().is_lost, again.saved_state().read()) == (False, "new")
    again.close()
    empty(store)


def test_a_load_goes_on_with_the_files_of_another_whatever_their_paths_lead_to(file: str) -> None:
    store, caller = DescriptorStore(), Caller()
    first = LoadDescriptors(store, 1, 7, caller)
    close(first.open(file, writable=True, direct=False))
    first.succeed()
    identity = os.stat(file).st_ino
    os.rename(file, f"{file}.old")
    Path(file).write_bytes(bytes(1024))
    caller.asked.clear()
    load = LoadDescriptors(store, 1, 8, caller, same_as=7)
    for writable in (True, False):
        fd = load.open(file, writable=writable, direct=False)
        assert os.fstat(fd).st_ino == identity
        close(fd)
    assert caller.asked == [(file, False, False, False)], "what is open in that way already was asked for"
    load.fail()
    other = LoadDescriptors(store, 1, 9, caller)
    fd = other.open(file, writable=True, direct=False)
    assert os.fstat(fd).st_ino != identity
    close(fd)
    other.fail()
    empty(store)


def test_a_claim_on_a_block_device_is_opened_but_not_kept_as_a_file(file: str) -> None:
    store, caller = DescriptorStore(), Caller()
    load = LoadDescriptors(store, 1, 7, caller)
    close(load.open(file, writable=False, direct=False, exclusive=True))
    assert caller.asked == [(file, False, False, True)]
    assert load.succeed() == []
