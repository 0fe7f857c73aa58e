"""The qcow2 target for reading: arguments, the engine's table, clusters filled in memory, load and close."""

from __future__ import annotations

import gc
import logging
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import blkloom
from blkloom.errors import BackingError, BusyError, TableError
from blkloom.image import attachment
from blkloom.image.attachment import Attachment
from blkloom.image.open_chain import open_chain
from blkloom.image.path_policy import PathPolicy
from blkloom.image.qcow2.driver import Qcow2Format
from blkloom.table import Segment, Table, format_table, parse_table
from blkloom.targets.holding import SharedFiles
from blkloom.targets.image import CACHE
from blkloom.targets.load_context import LoadContext
from blkloom.targets.qcow2 import Qcow2
from blkloom.targets.registry import all_targets
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes, Sectors
from left_behind import open_descriptors
from qcow2_by_hand import ByHand

CLUSTER = 4096


def target_of(line: str) -> TargetSpec:
    return parse_table(line, targets=all_targets()).segments[0].target


def full(folder: Path, count: int = 64, *, compressed: bool = True, bits: int = 12) -> tuple[Path, bytes]:
    """An image of `count` clusters, all with data of their own."""
    image = ByHand(count << bits, bits)
    parts = [bytes([number % 255 + 1, number >> 8]) * (image.cluster // 2) for number in range(count)]
    for number, part in enumerate(parts):
        (image.compress if compressed else image.data)(number, part)
    return image.write(folder / "disk.qcow2"), b"".join(parts)


def open_image(path: Path, options: str = "", *, direct_io: bool = False) -> blkloom.Device:
    size = int.from_bytes(path.read_bytes()[24:32], "big")
    return blkloom.open(f"0 {size // 512} qcow2 {path} {options}", read_only=True, direct_io=direct_io)


class TestArguments:
    @given(
        st.builds(
            Qcow2,
            path=st.just("/a b/disk.qcow2"),
            read_only=st.booleans(),
            direct_io=st.booleans(),
            snapshot=st.sampled_from(["", "1", "be fore", "a=b"]),
            allow_backing=st.lists(st.sampled_from(["/x", "/y z", "/"]), max_size=3).map(tuple),
            lock=st.booleans(),
            cache=st.sampled_from([CACHE, Bytes(0), Bytes(1 << 30)]),
            discard_as=st.sampled_from(["unmap", "ignore"]),
            preallocate=st.sampled_from([None, Bytes(0), Bytes(1 << 20)]),
            compact_zeroes=st.booleans(),
            on_enospc=st.sampled_from(["fail", "park"]),
            fault_injection=st.booleans(),
        )
    )
    def test_what_is_printed_is_read_again(self, target: Qcow2) -> None:
        table = Table((Segment(Sectors(0), Sectors(8), target),))
        assert target_of(format_table(table)) == target

    def test_every_option_is_understood_as_people_write_it(self) -> None:
        line = (
            "0 8 qcow2 d 12 read_only direct_io snapshot=s allow_backing=/a allow_backing=/b lock=off cache=1.5M "
            "discard=ignore preallocate=64K compact_zeroes on_enospc=park fault_injection"
        )
        assert target_of(line) == Qcow2(
            "d",
            read_only=True,
            direct_io=True,
            snapshot="s",
            allow_backing=("/a", "/b"),
            lock=False,
            cache=Bytes(3 << 19),
            discard_as="ignore",
            preallocate=Bytes(65536),
            compact_zeroes=True,
            on_enospc="park",
            fault_injection=True,
        )

    @pytest.mark.parametrize(
        ("option", "says"),
        [
            ("readonly", "unknown option"),
            ("read_only=yes", "unknown option"),
            ("snapshot", "unknown option"),
            ("snapshot=", "nothing behind the ="),
            ("allow_backing=dir", "must begin with /"),
            ("lock=no", "must be on or off"),
            ("cache=many", "is not a size"),
            ("cache=9P", "more than any machine has"),
            ("discard=yes", "must be unmap or ignore"),
            ("on_enospc=wait", "must be fail or park"),
            ("on_error=wait", "unknown option"),
        ],
    )
    def test_an_option_that_cannot_be_is_named(self, option: str, says: str) -> None:
        with pytest.raises(TableError, match=says) as refused:
            target_of(f"0 8 qcow2 disk 1 {option}")
        assert option in str(refused.value)

    def test_an_option_given_twice_is_refused(self) -> None:
        with pytest.raises(TableError, match="given twice"):
            target_of("0 8 qcow2 disk 2 cache=1M cache=2M")


class TestWholeFiles:
    def test_a_path_named_like_an_image_is_served_as_one(self, tmp_path: Path) -> None:
        path, content = full(tmp_path)
        with blkloom.open(path, read_only=True) as device:
            assert device.pread(device.size, 0) == content

    def test_a_raw_file_that_looks_like_an_image_is_served_raw_with_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path, _ = full(tmp_path)
        raw = path.rename(tmp_path / "disk.raw")
        with caplog.at_level(logging.WARNING), blkloom.open(raw, read_only=True) as device:
            assert device.pread(4, 0) == b"QFI\xfb"
        assert "looks like a QCOW2 image and is served as it is" in caplog.text

    def test_a_file_named_like_an_image_that_is_none_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.qcow2"
        path.write_bytes(bytes(1 << 20))
        with pytest.raises(BackingError, match="no QCOW2 image"):
            blkloom.open(path)


class TestMemory:
    @pytest.mark.parametrize("cache", [0, CLUSTER, 5 * CLUSTER, 1 << 20])
    @pytest.mark.parametrize("piece", [512, CLUSTER, 3 * CLUSTER + 512, 1 << 20])
    def test_compressed_clusters_read_right_however_few_are_kept(self, tmp_path: Path, cache: int, piece: int) -> None:
        path, content = full(tmp_path)
        with open_image(path, f"1 cache={cache}") as device:
            for _ in range(2):
                for at in range(0, len(content), piece):
                    assert device.pread(min(piece, len(content) - at), at) == content[at : at + piece]

    def test_many_readers_at_once_read_right_while_clusters_are_evicted(self, tmp_path: Path) -> None:
        path, content = full(tmp_path, 300)
        wrong: list[int] = []
        with open_image(path, f"1 cache={16 * CLUSTER}") as device:

            def work(seed: int) -> None:
                dice = random.Random(seed)
                for _ in range(60):
                    places = [dice.randrange(len(content) // 512 - 16) * 512 for _ in range(8)]
                    buffers = [bytearray(dice.randint(1, 16) * 512) for _ in places]
                    device.batch([("r", buffer, at) for buffer, at in zip(buffers, places, strict=True)])
                    wrong.extend(
                        at
                        for buffer, at in zip(buffers, places, strict=True)
                        if buffer != content[at : at + len(buffer)]
                    )

            threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not wrong
            assert "cache=16/16" in device.status()[0][3] or "cache=1" in device.status()[0][3]

    def test_what_is_in_memory_is_not_asked_for_again(self, tmp_path: Path) -> None:
        path, content = full(tmp_path)
        with open_image(path) as device:
            device.pread(len(content), 0)
            before = device.status()[0][3]
            assert device.pread(len(content), 0) == content
            assert device.status()[0][3] == before, "no fault came"
            assert "cache=64/" in before

    def test_a_reader_who_reads_on_finds_clusters_made_ahead(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("os.cpu_count", lambda: 4)
        path, content = full(tmp_path, 200)
        with open_image(path) as device:
            for at in range(0, len(content), CLUSTER):
                assert device.pread(CLUSTER, at) == content[at : at + CLUSTER]
            faults = int(device.status()[0][3].split("faults=")[1].split()[0])
            assert faults < 50

    def test_a_corrupt_cluster_fails_alone_also_among_those_read_with_it(self, tmp_path: Path) -> None:
        image = ByHand(8 * CLUSTER)
        for number in range(8):
            packed = b"\xff" * 100 if number == 5 else None
            image.compress(number, bytes([number]) * CLUSTER, packed)
        path = image.write(tmp_path / "disk.qcow2")
        with blkloom.open(path, read_only=True) as device:
            buffers = [bytearray(CLUSTER) for _ in range(8)]
            results = device.batch([("r", buffer, number * CLUSTER) for number, buffer in enumerate(buffers)])
            assert results == [CLUSTER] * 5 + [-5] + [CLUSTER] * 2
            assert [buffer[0] for number, buffer in enumerate(buffers) if number != 5] == [0, 1, 2, 3, 4, 6, 7]


class Told:
    """An attachment of its own, and how often it waited for the engine."""

    def __init__(self, path: Path, *, cache: int = 1 << 20) -> None:
        self.context = LoadContext(SharedFiles(), read_only=True, shared=True)
        self.chain = open_chain(str(path), self.context, PathPolicy.of_image(str(path)), format=Qcow2Format())
        self.waits = 0
        self.attachment = Attachment(self.chain, self.chain.size, cache=cache, synchronize=self._wait)

    def _wait(self) -> None:
        self.waits += 1

    def __enter__(self) -> Attachment:
        return self.attachment

    def __exit__(self, *_: object) -> None:
        self.attachment.close()
        self.context.close()


class TestTable:
    def test_a_fault_fills_a_whole_stretch_and_the_engine_does_the_rest(self, tmp_path: Path) -> None:
        path, content = full(tmp_path, 64, compressed=False)
        with open_image(path) as device:
            assert device.pread(len(content), 0) == content
            assert "faults=1 " in device.status()[0][3]

    def test_eviction_takes_entries_out_and_waits_before_a_slot_is_used_again(self, tmp_path: Path) -> None:
        path, content = full(tmp_path, 20)
        told = Told(path, cache=8 * CLUSTER)
        with told as attached:
            for number in (0, 7, 2, 5, 1, 4, 6, 3):  # none reads on
                assert attached.read(number * CLUSTER, CLUSTER) == content[number * CLUSTER :][:CLUSTER]
            assert told.waits == 0
            assert attached.table.entry(0) != 0
            assert attached.read(9 * CLUSTER, 512) == content[9 * CLUSTER :][:512]
            assert told.waits == 1
            assert attached.table.entry(0) == 0
            assert attached.table.entry(9) != 0

    def test_reads_announced_together_make_no_more_than_there_is_room_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, content = full(tmp_path, 64)
        told = Told(path, cache=4 * CLUSTER)
        made: list[tuple[int, int]] = []
        making = told.chain.making
        monkeypatch.setattr(told.chain, "making", lambda *key: made.append(key) or making(*key))
        with told as attached:
            reads = [(number * CLUSTER, CLUSTER) for number in range(0, 64, 2)]
            attached.prefetch(reads)
            assert len(made) == 4
            for offset, length in reads:
                assert attached.read(offset, length) == content[offset : offset + length]

    def test_pages_are_forgotten_beyond_the_limit_and_come_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(attachment, "_TABLE_LIMIT", 1 << 16)
        image = ByHand(64 << 20, 9)
        for number in range(0, image.size >> 9, 1000):
            image.data(number, number.to_bytes(4, "big"))
        told = Told(image.write(tmp_path / "disk.qcow2"))
        with told as attached:
            for _ in range(2):
                for number in range(0, image.size >> 9, 1000):
                    assert attached.read(number << 9, 512) is None or not attached.table.entry(number)
                    assert attached.table.entry(number) != 0
                assert attached.table.pages <= 3

    @pytest.mark.parametrize(("bits", "size"), [(9, 60 << 30), (12, 1 << 40), (16, 1 << 40), (21, 1 << 60)])
    def test_a_huge_disk_takes_little_memory_and_is_read_where_its_data_is(
        self, tmp_path: Path, bits: int, size: int
    ) -> None:
        image = ByHand(1 << bits, bits)
        image.data(0, b"here")
        raw = image.build()
        path = tmp_path / "disk.qcow2"
        per_table = 1 << 2 * bits - 3
        tables = -(-size // per_table)
        header = bytearray(raw[:104])
        header[24:32], header[36:40] = size.to_bytes(8, "big"), tables.to_bytes(4, "big")
        l1 = -(-len(raw) >> bits) << bits
        header[40:48] = l1.to_bytes(8, "big")
        with path.open("wb") as file:
            file.write(raw)
            file.seek(0)
            file.write(header)
            file.seek(l1 + tables * 8 - 8)
            file.write(raw[image.cluster * 2 :][:8])  # its only table describes the disk's end
            file.truncate(l1 + (-(-tables * 8 >> bits) << bits))
        with blkloom.open(path, read_only=True) as device:
            assert device.pread(4, (tables - 1) * per_table) == b"here"
            assert device.pread(512, 0) == device.pread(512, size // 2) == bytes(512)
            assert device.extents(0, 1 << 30) == [(0, 1 << 30, 3)]

    def test_extents_tell_data_from_zeros_before_and_after_anything_is_read(self, tmp_path: Path) -> None:
        image = ByHand(100 * CLUSTER)
        image.data(3, b"x")
        image.compress(4, bytes(CLUSTER))
        image.entry(5, 1)
        path = image.write(tmp_path / "disk.qcow2")
        expected = [(0, 3 * CLUSTER, 3), (3 * CLUSTER, 2 * CLUSTER, 0), (5 * CLUSTER, 95 * CLUSTER, 3)]
        with blkloom.open(path, read_only=True) as device:
            assert device.extents() == expected
            device.pread(device.size, 0)
            assert device.extents() == expected

    def test_direct_io_reads_the_same(self, tmp_path: Path) -> None:
        path, content = full(tmp_path, 32, compressed=False)
        with open_image(path, direct_io=True) as device:
            assert device.pread(len(content), 0) == content
            assert device.pread(1024, 512) == content[512:1536]


class TestLife:
    def test_the_file_is_claimed_while_live_and_free_while_suspended(self, tmp_path: Path) -> None:
        path, _ = full(tmp_path)
        with open_image(path) as device:
            with pytest.raises(BusyError):
                blkloom.open(f"0 8 loop {path}")
            device.suspend()
            blkloom.open(f"0 8 loop {path}").close()
            device.resume()
            with pytest.raises(BusyError):
                blkloom.open(f"0 8 loop {path}")

    def test_resume_waits_for_the_user_of_the_file_and_names_it(self, tmp_path: Path) -> None:
        path, content = full(tmp_path)
        with open_image(path) as device:
            device.suspend()
            with blkloom.open(f"0 8 loop {path}"), pytest.raises(BusyError):
                device.resume()
            assert device.suspended
            device.resume()
            assert device.pread(512, 0) == content[:512]

    def test_what_changed_meanwhile_is_read_anew(self, tmp_path: Path) -> None:
        path, _ = full(tmp_path)
        with open_image(path) as device:
            device.pread(device.size, 0)
            device.suspend()
            image = ByHand(64 * CLUSTER)
            image.data(1, b"changed")
            image.write(path)
            device.resume()
            assert device.pread(device.size, 0) == bytes(CLUSTER) + b"changed".ljust(63 * CLUSTER, b"\0")

    def test_a_whole_image_that_grew_or_shrank_takes_the_device_with_it(self, tmp_path: Path) -> None:
        path, _ = full(tmp_path)
        with open_image(path) as device:
            for count in (100, 10):
                device.suspend()
                _, content = full(tmp_path, count)
                device.resume()
                assert device.size == count * CLUSTER
                assert device.pread(device.size, 0) == content

    def test_a_part_of_an_image_stays_as_long_and_refuses_one_too_short(self, tmp_path: Path) -> None:
        path, _ = full(tmp_path)
        table = f"0 8 zero\n8 80 qcow2 {path}"
        with blkloom.open(table, read_only=True) as device:
            device.suspend()
            _, content = full(tmp_path, 100)
            device.resume()
            assert device.pread(device.size, 0) == bytes(CLUSTER) + content[: 10 * CLUSTER]
            device.suspend()
            full(tmp_path, 9)
            with pytest.raises(BackingError, match="has 72 sectors now, and the table wants 80"):
                device.resume()
            assert device.suspended
            _, content = full(tmp_path, 10)
            device.resume()
            assert device.pread(device.size, 0) == bytes(CLUSTER) + content

    def test_an_image_that_became_unusable_keeps_the_device_suspended_and_free_to_be_mended(
        self, tmp_path: Path
    ) -> None:
        path, content = full(tmp_path)
        good = path.read_bytes()
        with open_image(path) as device:
            device.suspend()
            path.write_bytes(b"\0" * 4096)
            with pytest.raises(BackingError, match="no QCOW2 image"):
                device.resume()
            assert device.suspended
            blkloom.open(f"0 8 loop {path}").close()
            path.write_bytes(good)
            device.resume()
            assert device.pread(len(content), 0) == content

    def test_a_table_swapped_for_one_over_the_same_image_keeps_reading(self, tmp_path: Path) -> None:
        path, content = full(tmp_path)
        with open_image(path) as device:
            for _ in range(3):
                device.load(parse_table(f"0 {len(content) // 512} qcow2 {path} 1 cache=64K", targets=all_targets()))
                device.resume()
                assert device.pread(len(content), 0) == content

    def test_writes_to_what_may_only_be_read_are_refused(self, tmp_path: Path) -> None:
        path, _ = full(tmp_path)
        before = path.read_bytes()
        with blkloom.open(f"0 512 qcow2 {path} 1 read_only") as device:
            for change in (
                lambda: device.pwrite(b"x" * 512, 0),
                lambda: device.discard(0, 4096),
                lambda: device.write_zeroes(0, 4096),
            ):
                with pytest.raises(OSError, match="Read-only"):
                    change()
        assert path.read_bytes() == before

    def test_an_image_read_only_needs_no_right_to_write(self, tmp_path: Path) -> None:
        path, content = full(tmp_path)
        path.chmod(0o444)
        with blkloom.open(f"0 {len(content) // 512} qcow2 {path} 1 read_only") as device:
            assert device.pread(512, 0) == content[:512]

    def test_nothing_stays_open_after_it_is_closed_or_refused(self, tmp_path: Path) -> None:
        path, content = full(tmp_path)
        before = open_descriptors()
        with open_image(path) as device:
            device.pread(len(content), 0)
            assert any("blkloom-unpacked" in new.target for new in open_descriptors() - before)
            device.suspend()
            device.resume()
        with pytest.raises(TableError):
            blkloom.open(f"0 {len(content)} qcow2 {path}")
        gc.collect()
        left = open_descriptors() - before  # what an engine keeps is not the image's
        assert not [new for new in left if "blkloom-unpacked" in new.target or str(tmp_path) in new.target]
