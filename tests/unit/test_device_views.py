"""The views of a device: file object and coroutines."""

import asyncio
import errno
import io
from pathlib import Path

import pytest

import blkloom
from left_behind import no_descriptor_left


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "disk"
    file.write_bytes(bytes(range(256)) * 256)
    return file


def test_a_raw_view_reads_and_writes_where_it_stands(path: Path) -> None:
    with blkloom.open(path) as device, device.raw() as raw:
        assert raw.read(3) == b"\0\1\2"
        assert raw.tell() == 3
        assert raw.write(b"xyz") == 3
        assert raw.seek(-2, io.SEEK_CUR) == 4
        assert raw.read(2) == b"yz"
        assert raw.seek(-1, io.SEEK_END) == device.size - 1
        assert raw.read(10) == b"\xff"
        assert raw.read(10) == b""


def test_a_raw_view_ends_where_the_device_does(path: Path) -> None:
    with blkloom.open(path) as device, device.raw() as raw:
        raw.seek(device.size - 2)
        assert raw.write(b"abcd") == 2
        with pytest.raises(OSError, match=rf"\[Errno {errno.ENOSPC}\]"):
            raw.write(b"cd")
        assert raw.write(b"") == 0
        assert raw.seek(10, io.SEEK_END) == device.size + 10
        assert raw.read(1) == b""
        with pytest.raises(OSError, match="before the start"):
            raw.seek(-1)
        with pytest.raises(ValueError, match="whence 9"):
            raw.seek(0, 9)
        with pytest.raises(io.UnsupportedOperation):
            raw.truncate(0)


def test_buffered_random_works_on_a_raw_view(path: Path) -> None:
    expected = bytearray(path.read_bytes())
    with blkloom.open(path) as device:
        with io.BufferedRandom(device.raw(), buffer_size=1000) as file:
            for at in range(0, 60_000, 777):
                file.seek(at)
                assert file.read(10) == expected[at : at + 10]
                file.seek(at + 3)
                file.write(b"buffered")
                expected[at + 3 : at + 11] = b"buffered"
        assert device.pread(device.size, 0) == expected


def test_closing_a_view_leaves_the_device_open(path: Path) -> None:
    with blkloom.open(path) as device:
        raw = device.raw()
        raw.close()
        with pytest.raises(ValueError, match="closed"):
            raw.read(1)
        assert device.pread(1, 0) == b"\0"


def test_views_of_a_read_only_device_do_not_write(path: Path) -> None:
    with blkloom.open(path, read_only=True) as device, device.raw() as raw:
        assert not raw.writable()
        with pytest.raises(io.UnsupportedOperation):
            raw.write(b"x")


def test_coroutines_do_what_the_device_s_methods_do(path: Path) -> None:
    async def use(device: blkloom.Device) -> None:
        async with device.asyncio() as disk:
            assert disk.size == device.size
            assert await disk.pread(4, 1) == b"\1\2\3\4"
            buffer = bytearray(5)
            assert await disk.pread_into(buffer, 2) == 5
            assert buffer == b"\2\3\4\5\6"
            assert await disk.pwrite(b"async", 100, fua=True) == 5
            await disk.flush()
            await disk.discard(4096, 4096)
            await disk.write_zeroes(8192, 4096, unmap=False)
            assert await disk.pread(8192, 4096) == bytes(8192)
            extents = await disk.extents()
            assert sum(length for _, length, _ in extents) == disk.size
            assert (await disk.extents(4096, 4096))[0][:2] == (4096, 4096)

    with blkloom.open(path) as device:
        asyncio.run(use(device))
        assert device.pread(5, 100) == b"async"


def test_many_coroutines_run_at_once(path: Path) -> None:
    async def use(device: blkloom.Device) -> list[bytes]:
        async with device.asyncio() as disk:
            return await asyncio.gather(*(disk.pread(16, 16 * i) for i in range(1000)))

    with blkloom.open(path) as device:
        found = asyncio.run(use(device))
        assert found == [device.pread(16, 16 * i) for i in range(1000)]


def test_what_need_not_wait_is_done_without_a_turn_of_the_event_loop() -> None:
    async def use(device: blkloom.Device) -> None:
        async with device.asyncio() as disk:
            reading = disk.pread(4096, 0)
            with pytest.raises(StopIteration) as done:
                reading.send(None)
            assert done.value.value == b"once" + bytes(4092)
            large = disk.pread(1 << 20, 0)
            assert large.send(None) is not None, "a loop reads this one, and the coroutine waits"
            large.close()

    with blkloom.open("0 4096 ram") as device:
        device.pwrite(b"once", 0)
        asyncio.run(use(device))


def test_an_asynchronous_error_carries_its_errno(path: Path) -> None:
    async def use(device: blkloom.Device) -> None:
        async with device.asyncio() as disk:
            with pytest.raises(OSError, match=rf"\[Errno {errno.EINVAL}\]"):
                await disk.pread(2, device.size - 1)
            with pytest.raises(OSError, match=rf"\[Errno {errno.ENOSPC}\]"):
                await disk.pwrite(b"xy", device.size - 1)
            assert await disk.pread(1, 0) == b"\0"

    with blkloom.open(path) as device:
        asyncio.run(use(device))


def test_an_asynchronous_batch_answers_each_request(path: Path) -> None:
    async def use(device: blkloom.Device) -> list[int]:
        async with device.asyncio() as disk:
            return await disk.batch([("r", bytearray(10), 0), ("w", b"abc", 20), ("r", bytearray(10), device.size)])

    with blkloom.open(path) as device:
        assert asyncio.run(use(device)) == [10, 3, -errno.EINVAL]
        assert device.pread(3, 20) == b"abc"


def test_cancelling_a_read_does_not_disturb_those_after_it() -> None:
    async def use(device: blkloom.Device) -> None:
        async with device.asyncio() as disk:
            device.suspend()  # so that the read cannot end before it is cancelled
            waiting = asyncio.create_task(disk.pread(512, 0))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            device.resume()
            assert await disk.pread(512, 512) == bytes(512)
        with pytest.raises(RuntimeError, match="closed"):
            await disk.pread(1, 0)

    with blkloom.open("0 8 ram") as device:
        asyncio.run(use(device))


def test_an_asynchronous_view_leaves_no_descriptor_behind(path: Path) -> None:
    async def use(device: blkloom.Device) -> None:
        async with device.asyncio() as disk:
            await disk.pread(1, 0)

    with blkloom.open(path) as device:
        asyncio.run(use(device))
        with no_descriptor_left():
            for _ in range(50):
                asyncio.run(use(device))
