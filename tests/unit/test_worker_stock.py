"""What a load gets from the one before, asks for, keeps, and gives back when it fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from blkloom.control.states import Label
from blkloom.errors import BackingError, ResourceError
from blkloom.target.descriptors import descriptor_path, open_file
from blkloom.target.holding import HeldFiles
from blkloom.target.opening import Opening
from blkloom.worker.stock import LoadDescriptors, Stock


class Caller:
    """Opens, and remembers what."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool, bool, bool]] = []

    def __call__(self, path: str, *, writable: bool, direct: bool, exclusive: bool, opened: int | None = None) -> int:
        self.asked.append((path, writable, direct, exclusive))
        return open_file(path if opened is None else descriptor_path(opened), writable=writable, direct=direct)


def nobody(path: str, *, writable: bool, direct: bool, exclusive: bool, opened: int | None = None) -> int:
    """There is no one who waits for the load."""
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "file"
    path.write_bytes(bytes(512))
    return str(path)


@pytest.fixture(autouse=True)
def all_descriptors_closed() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert len(os.listdir("/proc/self/fd")) == len(before)


def close(*fds: int | None) -> None:
    for fd in fds:
        assert fd is not None
        os.close(fd)


def empty(stock: Stock) -> None:
    stock.discard([label for label, _ in stock])


def test_a_file_is_asked_for_once_a_way(file: str) -> None:
    stock, caller = Stock(), Caller()
    load = LoadDescriptors(stock, 1, 7, caller)
    close(*(load.open(file, writable=writable, direct=False) for writable in (True, False, True)))
    assert caller.asked == [(file, True, False, False), (file, False, False, False)]
    assert [label.key for label in load.succeed()] == [f"w-{file}", f"r-{file}"]
    empty(stock)


def test_what_a_failed_load_got_is_closed_and_not_kept(file: str) -> None:
    stock = Stock()
    load = LoadDescriptors(stock, 1, 7, Caller())
    close(load.open(file, writable=True, direct=False), load.memory(lambda: os.memfd_create("m")))
    load.fail()
    assert list(stock) == []


def test_the_next_process_s_load_finds_everything_without_asking(file: str) -> None:
    stock = Stock()
    first = LoadDescriptors(stock, 1, 7, Caller())
    fd = first.open(file, writable=True, direct=False)
    first.claim(file, fd)
    memories = [first.memory(partial(os.memfd_create, name)) for name in ("a", "b")]
    close(fd, *memories)
    first.succeed()
    second = LoadDescriptors(stock, 1, 7, nobody, restored=True)
    found = [
        second.open(file, writable=True, direct=False),
        second.claimed(file),
        *(second.memory(lambda: pytest.fail("made anew")) for _ in memories),
    ]
    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in found]
    assert names == [file, file, "/memfd:a (deleted)", "/memfd:b (deleted)"]
    assert second.succeed() == []
    close(*found)
    empty(stock)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "not kept by an older version"])
def test_the_directory_of_a_relative_path_is_kept_and_is_none_of_the_files(
    file: str, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    folder, real = Path(file).parent / "vm", file
    folder.mkdir()
    (folder / "link").symlink_to(real)
    monkeypatch.chdir(folder.parent)
    stock = Stock()

    def name(load: LoadDescriptors) -> str:
        opening = Opening(HeldFiles(), shared=True, descriptors=load)
        try:
            found = opening.file("vm/link", read_only=True)
            return opening.absolute("vm/link", found) if kept or load.restored else ""
        finally:
            opening.close()
            del found
            load.succeed()

    assert name(LoadDescriptors(stock, 1, 7, Caller())) == (f"{folder}/link" if kept else "")
    monkeypatch.chdir("/")
    assert list(stock.files(1, 7)) == ["vm/link"]
    assert name(LoadDescriptors(stock, 1, 7, nobody, restored=True)) == (f"{folder}/link" if kept else real)
    empty(stock)


def test_what_is_lost_and_cannot_be_asked_for_is_an_error_that_names_it(file: str) -> None:
    load = LoadDescriptors(Stock(), 1, 7, nobody, restored=True)
    with pytest.raises(BackingError, match="was lost with the process that had it") as caught:
        load.open(file, writable=True, direct=False)
    assert (caught.value.path, caught.value.errno) == (file, errno.ESTALE)
    assert load.claimed(file) is None


def test_lost_memory_is_not_replaced_by_zeros() -> None:
    load = LoadDescriptors(Stock(), 1, 7, nobody, restored=True)
    with pytest.raises(ResourceError, match="what was in its memory is lost"):
        load.memory(lambda: pytest.fail("made anew"))


def test_a_load_goes_on_with_the_files_of_another_whatever_their_paths_lead_to(file: str) -> None:
    stock, caller = Stock(), Caller()
    first = LoadDescriptors(stock, 1, 7, caller)
    close(first.open(file, writable=True, direct=False))
    first.succeed()
    identity = os.stat(file).st_ino
    os.rename(file, f"{file}.old")
    Path(file).write_bytes(bytes(1024))
    caller.asked.clear()
    load = LoadDescriptors(stock, 1, 8, caller, same_as=7)
    for writable in (True, False):
        fd = load.open(file, writable=writable, direct=False)
        assert os.fstat(fd).st_ino == identity
        close(fd)
    assert caller.asked == [(file, False, False, False)], "what is open in that way already was asked for"
    load.fail()
    other = LoadDescriptors(stock, 1, 9, caller)
    fd = other.open(file, writable=True, direct=False)
    assert os.fstat(fd).st_ino != identity
    close(fd)
    other.fail()
    empty(stock)


def test_a_claim_on_a_block_device_is_opened_but_not_kept_as_a_file(file: str) -> None:
    stock, caller = Stock(), Caller()
    load = LoadDescriptors(stock, 1, 7, caller)
    close(load.open(file, writable=False, direct=False, exclusive=True))
    assert caller.asked == [(file, False, False, True)]
    assert load.succeed() == []


def test_a_table_s_labels_outlive_it_only_by_name() -> None:
    stock = Stock()
    labels = [
        Label(device=device, load=load, role="file", key="k") for device, load in ((1, 0), (1, 1), (1, 2), (2, 1))
    ]
    for label in labels:
        stock.put(label, os.memfd_create("m"))
    assert stock.outlived(1, {0, 2}) == [labels[1]]
    assert stock.labels(2) == [labels[3]]
    stock.put(labels[0], os.memfd_create("other"))
    fd = stock.take(labels[0])
    close(fd)
    assert stock.find(labels[0]) is None
    empty(stock)
