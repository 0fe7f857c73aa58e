"""Texts for users have plain values and not their Python notation: no bytes literals, enums, paths or classes."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

import blkloom
from blkloom.errors import FaultError, NoSuchDevice, TableError, UsageError
from blkloom.printing import described, quoted
from blkloom.targets.registry import Targets
from blkloom.targets.spec import TargetSpec

SOURCES = Path(blkloom.__file__).parent
_PYTHON_FORM = re.compile(r"![ra][:}]|%r|map\(repr")


def test_no_text_for_users_is_made_from_what_python_calls_a_value() -> None:
    found = [
        f"{path.relative_to(SOURCES)}:{number}"
        for path in sorted(SOURCES.rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if _PYTHON_FORM.search(line) and 'f"<blkloom.' not in line  # of a __repr__
    ]
    assert found == []


def test_bytes_are_shown_as_text_in_one_line() -> None:
    assert quoted(b"disk \xff\n\xc3\xa4") == "'disk \\xff\\x0a\u00e4'"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/srv/a.img"),
            "/srv/a.img: No space left on device (ENOSPC)",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", b"/srv/\xff"),
            "/srv/\\xff: No space left on device (ENOSPC)",
        ),
        (FaultError(errno.EIO, "the far end is gone"), "the far end is gone (EIO)"),
        (OSError("of no errno"), "OSError: of no errno"),
        (NoSuchDevice("Device a not found", cure="look"), "Device a not found; look"),
        (ValueError("seven"), "ValueError: seven"),
        (KeyError(), "KeyError"),
    ],
)
def test_an_exception_is_told_with_the_name_of_its_errno_or_its_class(error: BaseException, text: str) -> None:
    assert described(error) == text


def test_two_targets_of_one_name_are_told_apart_by_where_they_are() -> None:
    class Zero(TargetSpec):
        name = "zero"

    class Other(TargetSpec):
        name = "zero"

    with pytest.raises(UsageError, match=r"test_error_texts\..*\.Zero and .*test_error_texts\..*\.Other; rename one"):
        Targets([Zero, Other])


def test_a_value_with_a_quote_in_it_is_shown_as_it_is() -> None:
    with pytest.raises(TableError) as caught:
        blkloom.open("0 8 loop /there 0 1 it's")
    assert "'it's'" in str(caught.value)


def test_a_device_without_a_name_is_the_device() -> None:
    told = r"^\[Errno 5\] the device \(4096 bytes\): read of 512 bytes at 0"
    with blkloom.open("0 8 error") as device, pytest.raises(OSError, match=told):
        device.pread(512, 0)
    with pytest.raises(OSError, match=r"the device is closed"):
        device.suspend()
    with (
        blkloom.open("0 8 error", name="disk") as device,
        pytest.raises(OSError, match=r"^\[Errno 5\] device 'disk' \("),
    ):
        device.pread(512, 0)
