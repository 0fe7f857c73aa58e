"""Conditions for the extents of a file whose blocks are mapped, and processes that have the file in a memory
mapping.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from blkloom.filemap import fiemap
from blkloom.filemap.fiemap import Extents
from blkloom.filemap.mappability import check_alignment, check_extents, check_place
from blkloom.filemap.mappings import mapped_to_write
from blkloom.filemap.not_mappable import NotMappable


def extents(*runs: tuple[int, int, int, int]) -> Extents:
    """(logical, physical, length, flags)."""
    logical, physical, length, flags = zip(*runs, strict=True)
    return Extents(
        np.array(logical, np.uint64),
        np.array(physical, np.uint64),
        np.array(length, np.uint64),
        np.array(flags, np.uint32),
    )


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        (fiemap.UNKNOWN, "in no known place"),
        (fiemap.DELALLOC | fiemap.UNKNOWN, "delayed allocation"),
        (fiemap.ENCODED, "compressed or encrypted"),
        (fiemap.ENCRYPTED | fiemap.ENCODED, "is encrypted"),
        (fiemap.NOT_ALIGNED, "begin and end with a block"),
        (fiemap.INLINE | fiemap.NOT_ALIGNED, "in the file system's metadata"),
        (fiemap.TAIL | fiemap.NOT_ALIGNED, "shares a block with other files"),
        (fiemap.UNWRITTEN, "allocated but not written"),
        (fiemap.SHARED, "reflink"),
        (1 << 20, "unknown flags 0x100000"),
    ],
)
@pytest.mark.parametrize("holes", [False, True])
def test_an_extent_of_that_kind_is_refused_and_named(flag: int, reason: str, holes: bool) -> None:
    found = extents((0, 8192, 4096, 0), (4096, 65536, 4096, flag), (8192, 16384, 4096, 0))
    with pytest.raises(NotMappable, match=f"byte 4096 .*{reason}"):
        check_extents(found, 0, 12288, holes=holes)


@pytest.mark.parametrize(
    ("runs", "hole"),
    [
        ([(4096, 0, 8192, 0)], 0),
        ([(0, 0, 4096, 0), (8192, 8192, 4096, 0)], 4096),
        ([(0, 0, 8192, 0)], 8192),
    ],
)
def test_a_hole_is_refused_only_where_it_could_be_written(runs: list[tuple[int, int, int, int]], hole: int) -> None:
    check_extents(extents(*runs), 0, 12288, holes=True)
    with pytest.raises(NotMappable, match=f"File is sparse: there is a hole at byte {hole}"):
        check_extents(extents(*runs), 0, 12288, holes=False)


def test_a_file_that_is_all_hole() -> None:
    nothing = extents((0, 0, 4096, 0)).within(8192, 12288)
    check_extents(nothing, 8192, 12288, holes=True)
    with pytest.raises(NotMappable, match="File is sparse"):
        check_extents(nothing, 8192, 12288, holes=False)


@pytest.mark.parametrize("run", [(0, 4096, 8193, 0), (0, 12289, 1, 0), (0, (1 << 64) - 4096, 4096, 0)])
def test_an_extent_past_the_end_of_the_disk_is_refused(run: tuple[int, int, int, int]) -> None:
    check_place(extents((0, 4096, 8192, 0)), 12288)
    with pytest.raises(NotMappable, match="reach past the 12288 bytes"):
        check_place(extents(run), 12288)


def test_what_direct_io_cannot_reach_is_refused() -> None:
    check_alignment(extents((0, 512, 4096, 0)), 0, 4096, 512)
    with pytest.raises(NotMappable, match="do not begin with a block of 4096 bytes"):
        check_alignment(extents((0, 512, 4096, 0)), 0, 4096, 4096)
    for start, end, what in ((512, 4096, "Unaligned offset 512"), (0, 1024, "Unaligned end 1024")):
        with pytest.raises(NotMappable, match=what):
            check_alignment(extents((0, 4096, 4096, 0)), start, end, 4096)


def test_too_many_extents_are_refused_before_they_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(4096))
    with path.open("rb") as file:
        try:
            assert len(fiemap.extents_of(file.fileno())) == 1
        except OSError as error:
            pytest.skip(f"no FIEMAP on this file system ({error.strerror})")
        monkeypatch.setattr(fiemap, "MOST", 0)
        with pytest.raises(OSError, match="Too many extents"):
            fiemap.extents_of(file.fileno())


def test_shared_writable_mappings_are_found_by_the_file_they_are_of(tmp_path: Path) -> None:
    (tmp_path / "12").mkdir()
    (tmp_path / "12" / "maps").write_text(
        "7f00-7f10 r--s 00000000 fd:01 100                        /srv/read-only\n"
        "7f10-7f20 rw-p 00000000 fd:01 101                        /srv/private\n"
        "7f20-7f30 rw-s 00001000 fd:01 102                        /srv/shared, with\\012a line\n"
        "7f30-7f40 -w-s 00000000 103:0a 103                       /srv/write-only\n"
        "7f40-7f50 rw-s 00000000 00:00 0 \n"
    )
    (tmp_path / "13").mkdir()  # ended
    (tmp_path / "14").mkdir()
    (tmp_path / "14" / "comm").write_text("blkloom 0a1b2c3\n")  # a worker: maps no files
    (tmp_path / "14" / "maps").write_text("7f00-7f10 rw-s 00000000 fd:01 104      /srv/not-looked-at\n")
    (tmp_path / "uptime").touch()
    assert mapped_to_write(tmp_path) == {(os.makedev(0xFD, 1), 102): 12, (os.makedev(0x103, 10), 103): 12}
    assert mapped_to_write(tmp_path / "nowhere") == {}
