"""If the kernel has no FUSE over io_uring, the error names the file to set and the requirements."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from blkloom.errors import MountError
from blkloom.export.fuse.uring import check_available


def test_where_it_is_switched_off_the_error_says_which_file_to_set(tmp_path: Path) -> None:
    enable = tmp_path / "enable_uring"
    enable.write_text("N\n")
    with pytest.raises(MountError) as caught:
        check_available("/srv/disk", enable=enable)
    assert (caught.value.errno, caught.value.path) == (errno.EOPNOTSUPP, "/srv/disk")
    assert str(enable) in caught.value.what
    assert caught.value.cure == f"as root: echo Y > {enable}"
    enable.write_text("Y\n")
    check_available("/srv/disk", enable=enable)


def test_a_kernel_without_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(MountError, match=r"no FUSE over io_uring \(Linux 6.14 with CONFIG_FUSE_IO_URING\)"):
        check_available("/srv/disk", enable=tmp_path / "enable_uring")


def test_a_module_that_is_not_loaded_yet_is_asked_when_it_is(tmp_path: Path) -> None:
    check_available("/srv/disk", enable=tmp_path / "fuse" / "parameters" / "enable_uring")
