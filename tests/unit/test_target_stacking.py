"""References to other devices, descriptions of targets, and errors of a drain that hangs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import blkloom
from blkloom._engine import Extent
from blkloom.errors import BusyError, DrainError, UsageError
from blkloom.table import Table, parse_table
from blkloom.targets.claim import Claim
from blkloom.targets.descriptors import OwnDescriptors
from blkloom.targets.device_ref import DeviceRef, rename_device_refs
from blkloom.targets.holding import SharedFiles
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.registry import all_targets
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes, Sectors


def table(text: str, *targets: type[TargetSpec]) -> Table:
    return parse_table(text, targets=all_targets(targets))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("blkloom:a b", "a b"),
        ("/run/x/dev/a\\x20b", "a b"),
        ("/run/x/../x/dev//a", "a"),
        ("/run/x/dev/a/b", None),
        ("/run/x/dev", None),
        ("/dev/sda", None),
        ("relative", None),
    ],
)
def test_a_leg_names_a_device_by_its_name_or_by_its_socket(path: str, name: str | None) -> None:
    assert DeviceRef(path, Sectors(0)).device_name("/run/x/dev") == name


def test_without_a_run_directory_only_the_name_names() -> None:
    assert DeviceRef("/dev/a", Sectors(0)).device_name() is None
    assert DeviceRef("blkloom:a", Sectors(0)).device_name() == "a"


def test_a_rename_below_changes_the_references_and_nothing_else() -> None:
    text = (
        "0 8 linear blkloom:old 0\n8 8 linear /r/dev/old 4\n16 8 linear /old 0\n24 8 striped 2 4 blkloom:old 0 f\\ g 1"
    )
    renamed = rename_device_refs(table(text), "old", "n w", device_folder="/r/dev")
    assert renamed == (
        "0 8 linear blkloom:n\\ w 0\n8 8 linear /r/dev/n\\\\x20w 4\n"
        "16 8 linear /old 0\n24 8 striped 2 4 blkloom:n\\ w 0 f\\ g 1"
    )
    assert [ref.device_name("/r/dev") for ref in table(renamed).segments[1].target.device_refs()] == ["n w"]


def test_striped_says_what_the_kernel_s_says_and_others_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(8192))
    with blkloom.open(f"0 8 striped 2 4 {path} 0 {path} 4\n8 8 zero") as device:
        assert device.status() == [(0, 8, "striped", f"2 {path} {path} 1 AA"), (8, 8, "zero", "")]


def test_a_message_goes_to_the_segment_that_holds_the_sector() -> None:
    class LoadedSaid(LoadedTarget):
        def message(self, words: list[str]) -> str | None:
            return " ".join(words)

    class Said(TargetSpec):
        name = "said"

        def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
            return LoadedSaid(self, [(Bytes(0), length, Extent.zero())])

    with blkloom.open("0 8 zero\n8 8 said\n", targets=[Said]) as device:
        assert device.message(Sectors(15), ["a", "b"]) == "a b"
        with pytest.raises(UsageError, match="Invalid argument: target zero understands no message 'a'"):
            device.message(Sectors(7), ["a"])
        with pytest.raises(UsageError, match="outside device: 16; it has 16 sectors"):
            device.message(Sectors(16), ["a"])


def test_an_abandoned_claim_stands_as_long_as_a_duplicate_lives_and_is_taken_up_by_it(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(512))

    class Former(OwnDescriptors):
        def claimed(self, path: str) -> int | None:
            return os.dup(kept)

    fd = os.open(path, os.O_RDWR)
    try:
        claim = Claim(fd, str(path), writable=True)
        kept = os.dup(claim.descriptor)
        claim.abandon()
        other = os.open(path, os.O_RDWR)
        with pytest.raises(BusyError):
            Claim(other, str(path), writable=False)
        again = Claim(other, str(path), writable=True, descriptors=Former())
        os.close(kept)
        again.release()
        Claim(fd, str(path), writable=True).release()
        os.close(other)
    finally:
        os.close(fd)


class Hangs(TargetSpec):
    """Reads wait for `go`."""

    name = "hangs"
    asked = threading.Event()
    go = threading.Event()

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return LoadedHangs(self, [(Bytes(0), length, Extent.fault())])


class LoadedHangs(LoadedTarget):
    def read(self, offset: Bytes, length: Bytes) -> bytes:
        Hangs.asked.set()
        Hangs.go.wait()
        return bytes(length)


@contextmanager
def reading(device: blkloom.Device) -> Iterator[None]:
    """A read is under way, and ends after the block."""
    Hangs.asked.clear()
    Hangs.go.clear()
    thread = threading.Thread(target=device.pread, args=(512, 0))
    thread.start()
    try:
        assert Hangs.asked.wait(60)
        yield
    finally:
        Hangs.go.set()
        thread.join()


def test_a_drain_that_hangs_names_the_file_of_whichever_device_below() -> None:
    class Slow(SharedFiles):
        def in_flight(self) -> dict[str, int]:
            return {"/mnt/slow": 3}

    lower = blkloom.Device(table("0 8 hangs\n", Hangs), held=Slow())
    with lower, blkloom.Device(table("0 8 linear blkloom:l 0"), devices={"l": lower}) as upper, reading(upper):
        with pytest.raises(DrainError, match=r"had not ended after 0\.1 s: 3 in /mnt/slow; see what") as caught:
            upper.suspend(timeout=0.1)
        assert caught.value.path == "/mnt/slow"
        assert isinstance(caught.value, TimeoutError)
        assert not upper.suspended


def test_files_at_rest_hold_nothing_up(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(4096))
    held = SharedFiles()
    with blkloom.Device(table(f"0 8 loop {path}"), held=held) as device:
        device.pwrite(bytes(4096), 0)
        device.flush()
        assert len(held) == 1
        assert held.in_flight() == {}


def test_a_drain_that_waits_for_a_target_says_so_and_a_resume_that_cannot_drain_changes_nothing() -> None:
    with blkloom.Device(table("0 8 hangs\n", Hangs)) as device:
        device.load(table("0 8 zero"))
        with reading(device):
            with pytest.raises(DrainError, match="no file holds them up, so a target does"):
                device.resume(timeout=0.1)
            assert not device.suspended
        assert device.inactive_table is not None
        device.resume()
        assert device.inactive_table is None


def test_a_table_may_be_read_only_on_a_device_that_is_not() -> None:
    with blkloom.open("0 8 ram") as device:
        device.load(table("0 8 ram"), read_only=True)
        assert not device.read_only
        device.resume()
        assert device.read_only
        with pytest.raises(OSError, match="Read-only"):
            device.pwrite(b"x", 0)
        device.load(table("0 8 ram"), read_only=False)
        device.resume()
        assert device.pwrite(b"x", 0) == 1
