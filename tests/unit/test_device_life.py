"""Load, resume, suspend and close of a device; afterwards no file is left open."""

import errno
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import blkloom
from blkloom.device.open_device import is_table_text
from blkloom.errors import BackingError, TableError, UsageError
from blkloom.table import Table, parse_table
from blkloom.targets.registry import all_targets, builtin_targets
from left_behind import no_descriptor_left, no_thread_left


def table(text: str) -> Table:
    return parse_table(text, targets=builtin_targets())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "disk"
    file.write_bytes(b"f" * 4096)
    return file


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No descriptor and no thread more than before."""
    with no_descriptor_left(collect=True), no_thread_left():
        yield


def test_open_takes_a_path_a_table_s_text_or_a_table(path: Path) -> None:
    text = f"0 8 loop {path}"
    for source in (path, str(path), text, f"# a comment\n{text}\n", table(text)):
        with blkloom.open(source, name="d") as device:
            assert (device.size, device.name, device.pread(4, 0)) == (4096, "d", b"ffff")
            assert device.table == table(text)


@pytest.mark.parametrize(
    ("text", "is_table"),
    [
        ("0 8 zero", True),
        ("  0 8 zero", True),
        ("a\nb", True),
        ("disk.img", False),
        ("0", False),
        ("0.img", False),
        ("/0 8", False),
    ],
)
def test_a_path_and_a_table_are_told_apart(text: str, is_table: bool) -> None:
    assert is_table_text(text) is is_table


def test_a_device_without_a_table_starts_suspended_and_empty() -> None:
    with blkloom.Device() as device:
        assert (device.suspended, device.size, device.table) == (True, 0, None)
        with pytest.raises(UsageError, match="load a table first"):
            device.resume()
        device.load(table("0 8 zero"))
        assert (device.table, device.inactive_table) == (None, table("0 8 zero"))
        device.resume()
        assert (device.suspended, device.size, device.inactive_table) == (False, 4096, None)


def test_a_loaded_table_waits_in_the_inactive_slot_until_resume(path: Path) -> None:
    with blkloom.open("0 8 zero") as device:
        device.load(table(f"0 4 loop {path}"))
        assert (device.size, device.pread(1, 0)) == (4096, b"\0")
        device.resume()
        assert (device.size, device.pread(1, 0)) == (2048, b"f")


def test_clear_empties_the_inactive_slot_and_gives_its_files_up(path: Path) -> None:
    with blkloom.open("0 8 zero") as device:
        device.load(table(f"0 8 loop {path}"))
        device.clear()
        assert device.inactive_table is None
        blkloom.open(path).close()


def test_a_second_load_replaces_the_first() -> None:
    with blkloom.open("0 8 zero") as device:
        device.load(table("0 16 zero"))
        device.load(table("0 24 zero"))
        device.resume()
        assert device.size == 24 * 512


def test_a_table_may_be_replaced_by_one_over_the_same_files(path: Path) -> None:
    with blkloom.open(path) as device:
        device.load(table(f"0 4 linear {path} 4\n4 4 linear {path} 0\n"))
        device.resume()
        device.pwrite(b"x", 0)
        with pytest.raises(blkloom.BusyError):
            blkloom.open(path)
    assert path.read_bytes()[2048:2049] == b"x"


def test_a_failed_load_leaves_both_tables_and_opens_nothing(path: Path, tmp_path: Path) -> None:
    with blkloom.open("0 8 zero") as device:
        device.load(table("0 16 zero"))
        with pytest.raises(BackingError) as caught:
            device.load(table(f"0 8 loop {path}\n8 8 loop {tmp_path}/missing\n"))
        assert any("table:2" in note for note in caught.value.__notes__)
        assert (device.table, device.inactive_table) == (table("0 8 zero"), table("0 16 zero"))
        blkloom.open(path).close()


def test_a_table_that_would_make_a_device_stand_on_itself_is_refused() -> None:
    devices: dict[str, blkloom.Device] = {}
    with blkloom.open("0 8 ram") as ram:
        devices["self"] = blkloom.Device(devices={"ram": ram}, table=table("0 8 linear blkloom:ram 0"))
        with blkloom.Device(devices=devices, table=table("0 8 linear blkloom:self 0")) as upper:
            lower = devices["self"]
            lower._devices["upper"] = upper
            with pytest.raises(TableError, match="would be stacked on itself: 'upper'"):
                lower.load(table("0 8 linear blkloom:upper 0"))
            assert lower.inactive_table is None
            assert not lower.suspended
            assert upper.pread(1, 0) == b"\0"
        devices["self"].close()


def test_io_waits_while_the_device_is_suspended() -> None:
    with blkloom.open("0 8 ram") as device:
        device.suspend()
        done = threading.Event()

        def write() -> None:
            device.pwrite(b"late", 0)
            done.set()

        thread = threading.Thread(target=write)
        thread.start()
        assert not done.wait(0.05)
        device.resume()
        thread.join()
        assert device.pread(4, 0) == b"late"


def test_tables_are_swapped_under_load_without_an_error(path: Path) -> None:
    stop = threading.Event()
    wrong: list[object] = []

    def load(device: blkloom.Device) -> None:
        while not stop.is_set():
            try:
                if (found := device.pread(4096, 0)) not in (bytes(4096), b"f" * 4096):
                    wrong.append(found)
            except OSError as error:
                wrong.append(error)

    with blkloom.open(path) as device:
        threads = [threading.Thread(target=load, args=(device,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for i in range(100):
            device.load(table(f"0 8 loop {path}" if i % 2 else "0 8 zero"))
            device.resume()
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_closed_device_refuses_everything_and_closes_twice(path: Path) -> None:
    device = blkloom.open(path)
    device.close()
    device.close()
    assert device.closed
    for act in (lambda: device.pread(1, 0), lambda: device.load(table("0 8 zero")), device.resume):
        with pytest.raises(OSError, match=rf"\[Errno {errno.ESHUTDOWN}\]"):
            act()


@pytest.mark.usefixtures("nothing_left")
def test_closing_gives_up_descriptors_threads_and_locks(path: Path) -> None:
    for source in (path, "0 8 ram", f"0 8 linear {path} 0"):
        with blkloom.open(source) as device:
            device.pwrite(b"x", 0)
            device.flush()


@pytest.mark.usefixtures("nothing_left")
def test_a_device_that_cannot_be_opened_leaves_nothing_behind(path: Path, tmp_path: Path) -> None:
    for text in (
        f"0 8 loop {path}\n8 8 loop {tmp_path}/missing\n",
        f"0 8 loop {path}\n8 800 linear {path} 0\n",
        f"0 4 linear {path} 0\n4 8 linear blkloom:none 0\n",
        "0 8 ram\n8 8 zero\n",
    ):
        with pytest.raises((BackingError, TableError)):
            blkloom.open(text)


def test_closing_a_suspended_device_fails_what_waits_at_its_gate(path: Path) -> None:
    device = blkloom.open(path)
    device.suspend()
    outcome: list[int | None] = []

    def read() -> None:
        try:
            device.pread(1, 0)
        except OSError as error:
            outcome.append(error.errno)

    thread = threading.Thread(target=read)
    thread.start()
    while device.stats()["in_flight"] == 0:
        time.sleep(0.001)
    device.close()
    thread.join()
    assert outcome == [errno.ESHUTDOWN]


def test_the_map_of_a_device_changes_only_with_its_table() -> None:
    with blkloom.open("0 8 zero") as device, pytest.raises(UsageError, match=r"use load\(\) and resume\(\)"):
        device.swap(None)  # type: ignore[arg-type]


def test_a_program_that_forgets_to_close_ends_all_the_same(path: Path) -> None:
    program = f"import blkloom; device = blkloom.open({str(path)!r}); device.pwrite(b'kept', 0)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert path.read_bytes()[:4] == b"kept"


def test_a_device_uses_the_engine_it_is_given_and_leaves_it_open() -> None:
    engine = blkloom.Engine(loops=1)
    with blkloom.open("0 8 ram", engine=engine) as first, blkloom.open("0 8 ram", engine=engine) as second:
        assert first.engine is second.engine is engine
    with blkloom.open("0 8 ram", engine=engine) as third:
        third.flush()
    engine.close()


def test_the_public_names_are_imported_when_used() -> None:
    program = (
        "import sys, blkloom\n"
        "assert 'blkloom._engine' not in sys.modules\n"
        "for name in blkloom.__all__: getattr(blkloom, name)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = blkloom.no_such_name  # type: ignore[attr-defined]
    assert "zero" in all_targets()


def test_a_table_loaded_read_only_makes_no_later_one_so(path: Path) -> None:
    with blkloom.open(f"0 8 loop {path}") as device:
        device.load(table("0 8 zero"), read_only=True)
        device.resume()
        assert device.read_only
        device.load(table(f"0 8 loop {path}"))
        device.resume()
        device.pwrite(b"w", 0)
        assert not device.read_only


def test_load_says_what_makes_a_table_of_text() -> None:
    with blkloom.open("0 8 zero") as device:
        with pytest.raises(TypeError, match=r"takes a Table, not str: blkloom\.parse_table\(text"):
            device.load("0 8 error")  # type: ignore[arg-type]
        assert device.inactive_table is None
