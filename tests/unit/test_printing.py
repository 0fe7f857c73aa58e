"""Text from files and images cannot control a terminal or fake lines of a log."""

from __future__ import annotations

import io
import logging
import os

from hypothesis import given
from hypothesis import strategies as st

from blkloom.errors import BackingError, BlkloomError, TableError
from blkloom.printing import LineFormatter, printable, printable_lines

HOSTILE = "a\x1b[2J\n2026-01-01 ERROR forged\r\x9b\u202e\u2028"
TEXTS = st.text(st.characters(codec="utf-8") | st.integers(0x80, 0xFF).map(lambda byte: os.fsdecode(bytes([byte]))))


@given(TEXTS)
def test_what_is_shown_is_one_line_and_says_every_byte(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown
    if "\\x" not in text:
        first, *rest = shown.split("\\x")
        said = first.encode() + b"".join(bytes.fromhex(part[:2]) + part[2:].encode() for part in rest)
        assert said == text.encode("utf-8", "surrogateescape")


def test_lines_that_are_meant_stay_lines() -> None:
    assert printable_lines("usage\n  \x1bverb") == "usage\n  \\x1bverb"


def test_errors_are_printable_whatever_they_name() -> None:
    for error in (
        BlkloomError(HOSTILE, cure=HOSTILE),
        BackingError(HOSTILE, path=HOSTILE, errno=5),
        TableError(HOSTILE, value=HOSTILE),
    ):
        assert str(error).isprintable()


def test_a_record_of_a_log_is_one_line_and_its_traceback_is_indented() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter("%(levelname)s %(name)s: %(message)s"))
    log = logging.Logger("images")
    log.addHandler(handler)
    log.warning("feature %s", HOSTILE)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("it failed")
    first, second, *rest = stream.getvalue().removesuffix("\n").split("\n")
    assert first.startswith("WARNING images: feature a\\x1b[2J\\x0a2026")
    assert first.isprintable()
    assert second == "ERROR images: it failed"
    assert rest
    assert all(line.startswith("    ") and line.isprintable() for line in rest)


def test_an_exception_in_a_log_is_told_as_users_are_told_it() -> None:
    record = logging.LogRecord("a", logging.ERROR, "a.py", 1, "%s: %s", ("x", OSError(2, "No such file", "/f")), None)
    assert LineFormatter("%(message)s").format(record) == "x: /f: No such file (ENOENT)"
