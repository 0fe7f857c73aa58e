"""Parser for `-S`: selects devices with the selection language of libdevmapper.

    field operator value, joined by && (or ,) and || (or #), negated by !, grouped by ( )

Operators: = != for all; > >= < <= for numbers; =~ !~ for text against a regular expression (searched
anywhere). Values may be quoted. Pure. Source: lvmreport(7), libdm-report.c (_parse_selection).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any, Final, NoReturn

from blkloom.dm.failing import NoReport
from blkloom.dm.fields import Field, Row
from blkloom.dm.report import find_field

Selection = Callable[[Row], bool]

_FIELD: Final = re.compile(r"\s*([A-Za-z0-9_-]+)\s*")
_OPERATOR: Final = re.compile(r"=~|!~|!=|>=|<=|=|>|<")
_VALUE: Final = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^\s,#&|()]+(?:\s+[^\s,#&|()]+)*))\s*""")
_COMPARE: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_DEEPEST: Final = 100


def parse_selection(text: str) -> Selection:
    """Parses a selection. Raises NoReport if it is invalid."""
    if not text.strip():
        return lambda _row: True
    parser = _Parser(text)
    selection = parser.either(0)
    if parser.at < len(text):
        parser.fail()
    return selection


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self.at = 0

    def either(self, depth: int) -> Selection:
        parts = [self._all(depth)]
        while self._take("||") or self._take("#"):
            parts.append(self._all(depth))
        return lambda row: any(part(row) for part in parts)

    def fail(self, why: str = "") -> NoReturn:
        lines = [why] if why else []
        raise NoReport(*lines, f"Selection syntax error at '{self._text[self.at :]}'.", what=_HOW)

    def _all(self, depth: int) -> Selection:
        parts = [self._one(depth)]
        while self._take("&&") or self._take(","):
            parts.append(self._one(depth))
        return lambda row: all(part(row) for part in parts)

    def _one(self, depth: int) -> Selection:
        if depth > _DEEPEST:
            self.fail("Too many parentheses")
        if self._take("!"):
            negated = self._one(depth + 1)
            return lambda row: not negated(row)
        if self._take("("):
            inner = self.either(depth + 1)
            if not self._take(")"):
                self.fail("Syntax error: right parenthesis not found")
            return inner
        return self._comparison()

    def _comparison(self) -> Selection:
        if not (named := _FIELD.match(self._text, self.at)):
            self.fail("Expecting field name")
        if (field := find_field(named[1])) is None:
            self.fail(f"Unrecognised selection field: {named[1]}")
        self.at = named.end()
        if not (found := _OPERATOR.match(self._text, self.at)):
            self.fail(f"Unrecognised comparison operator: {self._text[self.at :]}")
        self.at = found.end()
        value = _VALUE.match(self._text, self.at)
        if not value:
            self.fail("Missing value after operator")
        text = next(group for group in value.groups() if group is not None)
        test = self._test(field, found[0], text)
        self.at = value.end()
        return test

    def _test(self, field: Field, sign: str, text: str) -> Selection:
        if sign in ("=~", "!~"):
            if field.number:
                self.fail(f"Operator can be used only with string or string list fields: {field.id}")
            try:
                pattern = re.compile(text)
            except re.error as error:
                self.fail(f"Failed to parse regex value for selection field {field.id}: {error}")
            return lambda row: bool(pattern.search(str(field.value(row)))) == (sign == "=~")
        compare = _COMPARE[sign]
        if field.number:
            if not (text.isascii() and text.isdigit()):
                self.fail(f"Failed to parse numeric value for selection field {field.id}.")
            number = int(text)
            return lambda row: compare(field.value(row), number)
        if sign not in ("=", "!="):
            self.fail(f"Operator can be used only with number, size, time or percent fields: {field.id}")
        return lambda row: compare(str(field.value(row)), text)

    def _take(self, token: str) -> bool:
        at = self.at
        while at < len(self._text) and self._text[at].isspace():
            at += 1
        if not self._text.startswith(token, at):
            return False
        self.at = at + len(token)
        return True


_HOW = "a selection is written: name=disk && (open>0 || uuid=~'^LVM'); info -c -o help lists the fields"
