"""The documented example of a user's target works as docs/writing-a-target.md says."""

import errno
import struct
from pathlib import Path

import pytest

import blkloom
from blkloom.examples import pattern
from blkloom.examples.pattern import CLUSTER, Pattern

DOCS = Path(__file__).parents[2] / "docs"


def expected(offset: int, length: int) -> bytes:
    return b"".join(struct.pack(">Q", at) for at in range(offset, offset + length, 8))


def test_every_8_bytes_hold_their_own_offset() -> None:
    with blkloom.open("0 1000 pattern", targets=[Pattern]) as device:
        assert device.pread(device.size, 0) == expected(0, device.size)


def test_only_the_first_access_of_a_cluster_runs_python() -> None:
    with blkloom.open("0 4096 pattern", targets=[Pattern]) as device:
        for _ in range(100):
            device.pread(4096, CLUSTER)
            device.pwrite(b"x" * 512, CLUSTER)
        assert device.stats()["faults"] == 1


def test_what_is_written_stays_and_the_rest_keeps_its_pattern() -> None:
    with blkloom.open("0 4096 pattern", targets=[Pattern]) as device:
        device.pwrite(b"w" * 512, CLUSTER - 256)
        device.write_zeroes(3 * CLUSTER, 512)
        assert device.pread(1024, CLUSTER - 512) == expected(CLUSTER - 512, 256) + b"w" * 512 + expected(
            CLUSTER + 256, 256
        )
        assert device.pread(1024, 3 * CLUSTER) == bytes(512) + expected(3 * CLUSTER + 512, 512)


def test_it_is_read_only_when_its_device_is() -> None:
    with blkloom.open("0 4096 pattern", targets=[Pattern], read_only=True) as device:
        for mapped in (False, True):
            for write in (lambda: device.pwrite(b"x", 0), lambda: device.write_zeroes(0, 512)):
                with pytest.raises(OSError, match=rf"\[Errno {errno.EROFS}\]"):
                    write()
            if not mapped:
                device.pread(8, 0)
        assert device.pread(8, 8) == expected(8, 8)


def test_the_documentation_shows_the_code_that_runs() -> None:
    source = Path(pattern.__file__).read_text()
    assert source.endswith(shown("class Pattern")), "all of it, with its imports"


def test_the_smallest_target_of_the_documentation_runs() -> None:
    names = {name: getattr(blkloom, name) for name in ("TargetSpec", "LoadedTarget", "LoadContext", "Extent", "Bytes")}
    exec(shown("class Zero"), names)
    with blkloom.open("0 8 zero", targets=[names["Zero"]]) as device:
        device.pwrite(b"w" * 512, 0)
        assert device.pread(4096, 0) == bytes(4096)


def test_the_arguments_that_the_documentation_shows_are_read_and_printed() -> None:
    names = {name: getattr(blkloom, name) for name in ("TargetSpec", "Bytes", "syntax")}
    exec(shown("insecure"), names)
    line = "0 8 http http://there/disk 2 cache=2M insecure"
    table = blkloom.parse_table(line, targets=blkloom.all_targets([names["Http"]]))
    assert table.segments[0].target == names["Http"]("http://there/disk", 2 << 20, True)
    assert names["Http"].syntax == "<url> [<#opts> [cache=<size>] [insecure]]"


def shown(word: str) -> str:
    """The first block of the documentation with that word."""
    blocks = (DOCS / "writing-a-target.md").read_text().split("```python\n")[1:]
    return next(block for block in (block.split("```")[0] for block in blocks) if word in block)
