"""After a failed sync of a file, every flush and FUA write of every device that may have written to it fails until the
file is reopened. Linux reports the error once and drops the unwritten data, so only blkloom knows of the loss then.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import blkloom
from blkloom import _engine
from blkloom.device.device import Device
from blkloom.errors import LostData
from blkloom.table import parse_table
from blkloom.targets.registry import all_targets
from blkloom.testing import NbdThread
from faulty_fs import FaultyFileSystem

from . import nbd_client as nbd

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
SECTORS = MIB // 512
LOOPS = ("loop", "loop direct", "linear", "striped")
IMAGES = ("qcow2", "qcow2 direct", "qcow2 data file", "qcow2 raw backing")


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultyFileSystem]:
    with FaultyFileSystem(tmp_path / "faulty") as faulty:
        yield faulty


def table(faulty: FaultyFileSystem, kind: str) -> str:
    """A table of that kind over new files of the file system."""
    if "qcow2" in kind:
        return f"0 {SECTORS} qcow2 {image(faulty, kind)}" + (" 1 direct_io" if "direct" in kind else "")
    path, other = faulty.file("disk.img", size=MIB), faulty.file("other.img", size=MIB)
    return (
        f"0 {SECTORS} "
        + {
            "loop": f"loop {path}",
            "loop direct": f"loop {path} 0 1 direct_io=require",
            "linear": f"linear {path} 0",
            "striped": f"striped 2 8 {other} 0 {path} 0",
        }[kind]
    )


def image(faulty: FaultyFileSystem, kind: str) -> Path:
    path = faulty.mount / "disk.qcow2"
    options = ["-o", f"data_file={faulty.mount / 'data.raw'}"] if "data file" in kind else []
    if "backing" in kind:
        options = ["-b", str(faulty.file("backing.raw", size=MIB)), "-F", "raw"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(MIB)], check=True, timeout=60)
    return path


def break_down(faulty: FaultyFileSystem, kind: str, number: int = errno.EIO) -> None:
    """What was written last does not reach the disk. Of direct I/O it is the flush of the disk's cache that fails."""
    faulty.fail("fsync" if "direct" in kind else "write", number)


def number_of(call: Callable[..., object], *arguments: object, **options: object) -> int:
    """The errno that it fails with; 0: it does not."""
    try:
        call(*arguments, **options)
    except OSError as error:
        return error.errno or -1
    return 0


@contextmanager
def losing(text: str, **options: Any) -> Iterator[Device]:
    """A device that says at its end that data written to it may be lost."""
    device = blkloom.open(text, **options)
    try:
        yield device
    finally:
        with pytest.raises(OSError, match=r"data .* may be lost: a sync of .* had failed"):
            device.close()


def load_anew(device: Device, text: str) -> None:
    device.load(parse_table(text, targets=all_targets()))
    device.resume()


@pytest.mark.usefixtures("qemu_tools")
@pytest.mark.parametrize("kind", [*LOOPS, *IMAGES])
def test_after_a_failed_flush_every_flush_and_fua_fails_until_the_file_is_opened_anew(
    faulty: FaultyFileSystem, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = table(faulty, kind)
    with blkloom.open(text) as device:
        device.pwrite(b"A" * 8192, 0)
        device.flush()
        device.pwrite(b"B" * 8192, 0)
        break_down(faulty, kind)
        assert number_of(device.flush) == errno.EIO
        faulty.mend()
        for _ in range(2):
            assert number_of(device.flush) == errno.EIO
            assert number_of(device.pwrite, b"C" * 4096, 0, fua=True) == errno.EIO
            assert number_of(device.write_zeroes, 65536, 4096, fua=True) == errno.EIO
            assert "sync_failed=EIO" in device.status()[0][3]
            device.suspend()  # nothing that is not known is lost by it
            device.resume()
        assert [record for record in caplog.records if "a sync failed" in record.message]
        load_anew(device, text)
        assert "sync_failed" not in device.status()[0][3]
        if "direct" not in kind:
            assert device.pread(8192, 0) == b"A" * 8192, "what the disk has, not what its cache had"
        device.pwrite(b"D" * 8192, 0)
        device.flush()
        device.pwrite(b"E" * 4096, 8192, fua=True)
    with blkloom.open(text) as device:
        assert device.pread(12288, 0) == b"D" * 8192 + b"E" * 4096


@pytest.mark.usefixtures("qemu_tools")
@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_whose_sync_failed_is_not_written_to_and_still_read(faulty: FaultyFileSystem, kind: str) -> None:
    with losing(table(faulty, kind)) as device:
        device.pwrite(b"A" * 65536, 0)
        device.flush()
        device.pwrite(b"B" * 65536, 65536)
        break_down(faulty, kind)
        assert number_of(device.flush) == errno.EIO
        faulty.mend()
        for _ in range(2):
            before = {path.name: path.read_bytes() for path in faulty.disk.iterdir()}
            assert number_of(device.pwrite, b"C" * 4096, 0) == errno.EIO, "a place that the engine knew"
            assert number_of(device.pwrite, b"C" * 4096, 256 << 10) == errno.EIO
            assert number_of(device.discard, 0, 65536) == errno.EIO
            assert device.pread(4096, 0) == b"A" * 4096
            device.suspend()
            os.sync()
            assert {path.name: path.read_bytes() for path in faulty.disk.iterdir()} == before
            device.resume()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("fua", [False, True], ids=["flush", "fua"])
def test_what_a_sync_finds_counts_and_what_a_write_finds_does_not(
    faulty: FaultyFileSystem, number: int, fua: bool
) -> None:
    with losing(table(faulty, "loop")) as device:
        faulty.fail("write", number, count=1)
        if fua:
            assert number_of(device.pwrite, b"A" * 4096, 0, fua=True) == number
        else:
            device.pwrite(b"A" * 4096, 0)
            assert number_of(device.flush) == number
        assert number_of(device.flush) == number
    with blkloom.open(f"0 {SECTORS} loop {faulty.mount / 'disk.img'} 0 1 direct_io") as device:
        faulty.fail("write", number, count=2)  # the second one when it is found out which part failed
        assert number_of(device.pwrite, b"A" * 4096, 0, fua=fua) == number
        faulty.mend()
        device.flush()
        device.pwrite(b"B" * 4096, 0, fua=True)


def test_a_durable_write_that_is_refused_by_itself_fails_nothing_else(tmp_path: Path) -> None:
    with (tmp_path / "disk.img").open("x+b") as stream:
        file = _engine.File(stream.fileno(), writable=True)
    engine = _engine.Engine()
    # Past the largest offset of any file system.
    extents = [(0, MIB, 0, _engine.Extent.data(file, 0)), (MIB, MIB, 0, _engine.Extent.data(file, (1 << 63) - 2 * MIB))]
    device = _engine.Device(engine, _engine.Map(extents))
    assert number_of(device.pwrite, b"A" * 4096, MIB, fua=True) == errno.EFBIG
    device.pwrite(b"A" * 4096, 0, fua=True)
    device.flush()
    engine.close()


def test_every_connection_and_every_flush_at_the_same_time_is_told(
    faulty: FaultyFileSystem, engine: _engine.Engine, host: NbdThread
) -> None:
    text = table(faulty, "loop")
    with blkloom.open(text, engine=engine) as device, host.exported(device, "disk"), ThreadPoolExecutor(8) as pool:
        clients = [nbd.NbdClient.unix(host.path, "disk") for _ in range(8)]
        for turn in range(10):
            letter = bytes([turn + 65])
            for at, client in enumerate(clients):
                assert not client.ask(nbd.WRITE, at * 4096, payload=letter * 4096).error
            faulty.fail("write", errno.EIO)
            flushes = [pool.submit(client.ask, nbd.FLUSH) for client in clients]
            assert [flush.result().error for flush in flushes] == [errno.EIO] * 8
            faulty.mend()
            late = nbd.NbdClient.unix(host.path, "disk")
            assert late.ask(nbd.FLUSH).error == errno.EIO
            assert late.ask(nbd.WRITE, 0, flags=nbd.FUA, payload=letter * 512).error == errno.EIO
            late.disconnect()
            load_anew(device, text)
            assert [client.ask(nbd.FLUSH).error for client in clients] == [0] * 8
        for client in clients:
            client.disconnect()


def test_devices_on_top_fail_too_and_their_neighbours_do_not(faulty: FaultyFileSystem, engine: _engine.Engine) -> None:
    other = faulty.file("neighbour.img", size=MIB)
    with (
        losing(table(faulty, "linear"), engine=engine, name="lower") as lower,
        blkloom.open(f"0 {SECTORS} loop {other}", engine=engine, name="other") as neighbour,
    ):
        devices = {"lower": lower, "other": neighbour}
        striped = f"0 {2 * SECTORS} striped 2 8 blkloom:other 0 blkloom:lower 0"
        with losing(striped, engine=engine, devices=devices, name="upper") as upper:
            upper.pwrite(b"A" * 65536, 0)
            faulty.fail("write", errno.EIO, name="disk.img")
            assert number_of(upper.flush) == errno.EIO
            faulty.mend()
            assert number_of(upper.flush) == errno.EIO
            assert number_of(upper.pwrite, b"B" * 512, 0, fua=True) == errno.EIO, "the healthy stripe"
            assert number_of(lower.flush) == errno.EIO
            neighbour.flush()
            neighbour.pwrite(b"C" * 512, 0, fua=True)
            assert "sync_failed" in upper.status()[0][3]
            assert upper.sync_errors == lower.sync_errors == {str(faulty.mount / "disk.img"): errno.EIO}
        assert neighbour.sync_errors == {}


def test_a_suspend_that_finds_the_failure_is_refused_and_the_next_one_works(faulty: FaultyFileSystem) -> None:
    with losing(table(faulty, "loop")) as device:
        device.pwrite(b"A" * 4096, 0)
        faulty.fail("write", errno.EIO)
        assert number_of(device.suspend) == errno.EIO
        assert not device.suspended
        device.suspend()
        device.resume()
        assert number_of(device.flush) == errno.EIO


def test_a_close_that_finds_the_failure_says_that_data_may_be_lost(faulty: FaultyFileSystem) -> None:
    with losing(table(faulty, "loop")) as device:
        device.pwrite(b"A" * 4096, 0)
        faulty.fail("write", errno.EIO)


def test_a_table_loaded_before_the_failure_shares_the_file_and_its_failure(faulty: FaultyFileSystem) -> None:
    text = table(faulty, "loop")
    with blkloom.open(text) as device:
        device.load(parse_table(text, targets=all_targets()))
        device.pwrite(b"A" * 4096, 0)
        faulty.fail("write", errno.EIO)
        assert number_of(device.flush) == errno.EIO
        faulty.mend()
        device.resume()
        assert number_of(device.flush) == errno.EIO
        load_anew(device, text)
        device.flush()


def test_a_file_that_still_cannot_be_synced_is_not_opened_anew(faulty: FaultyFileSystem) -> None:
    text = table(faulty, "loop")
    with losing(text) as device:
        device.pwrite(b"A" * 4096, 0)
        faulty.fail("write", errno.EIO)
        assert number_of(device.flush) == errno.EIO
        device.pwrite(b"B" * 4096, 4096)
        assert number_of(load_anew, device, text) == errno.EIO
        assert number_of(device.flush) == errno.EIO


def test_serve_says_at_its_end_that_data_may_be_lost(faulty: FaultyFileSystem, blkloom: str, tmp_path: Path) -> None:
    path, address = faulty.file("disk.img", size=MIB), tmp_path / "nbd.sock"
    command = [blkloom, "serve", str(path), "--socket", str(address)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline()
            client = nbd.NbdClient.unix(address)
            faulty.fail("write", errno.EIO, count=1)  # before the write: the kernel may write back at any time
            assert not client.ask(nbd.WRITE, 0, payload=b"A" * 4096).error
            assert client.ask(nbd.FLUSH).error == errno.EIO
            assert client.ask(nbd.FLUSH).error == errno.EIO
            client.close()
            process.terminate()
            _, errors = process.communicate(timeout=30)
        except BaseException:
            process.kill()  # leaving the block waits for it
            raise
    assert process.returncode == LostData.exit_code, errors
    assert f"may be lost: a sync of {path} had failed" in errors
