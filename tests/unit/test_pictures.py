"""The drawing of the data path is readable in any renderer: no text leaves its box or lies on an arrow.

Widths are those of a wide font (DejaVu Sans); other fonts are not wider.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

PICTURE = Path(__file__).parents[2] / "docs" / "data-path.svg"
SVG = "{http://www.w3.org/2000/svg}"
WIDTH_OF_A_LETTER = 0.62


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def holds(self, other: Box) -> bool:
        inside = self.left <= other.left and other.right <= self.right
        return inside and self.top <= other.top and other.bottom <= self.bottom

    def meets(self, other: Box) -> bool:
        apart = self.right <= other.left or other.right <= self.left
        return not (apart or self.bottom <= other.top or other.bottom <= self.top)


def elements() -> Iterator[tuple[ElementTree.Element, dict[str, str]]]:
    """What is drawn, with the attributes it inherits."""

    def below(
        element: ElementTree.Element, inherited: dict[str, str]
    ) -> Iterator[tuple[ElementTree.Element, dict[str, str]]]:
        attributes = inherited | element.attrib
        yield element, attributes
        for child in element:
            if child.tag != f"{SVG}defs":
                yield from below(child, attributes)

    return below(ElementTree.parse(PICTURE).getroot(), {})


def texts() -> Iterator[tuple[str, Box]]:
    for element, attributes in elements():
        if element.tag == f"{SVG}text":
            text, size = element.text or "", float(attributes["font-size"])
            width, x, y = len(text) * size * WIDTH_OF_A_LETTER, float(attributes["x"]), float(attributes["y"])
            left = x - width / 2 if attributes.get("text-anchor") == "middle" else x
            yield text, Box(left, y - size * 0.8, left + width, y + size * 0.25)


def boxes() -> list[Box]:
    found = []
    for element, _ in elements():
        if element.tag == f"{SVG}rect":
            x, y = float(element.get("x", 0)), float(element.get("y", 0))
            found.append(Box(x, y, x + float(element.attrib["width"]), y + float(element.attrib["height"])))
    return found


def points(path: str) -> list[tuple[float, float]]:
    """Along a path of M, H, V and C."""
    found: list[tuple[float, float]] = []
    for command, numbers in re.findall(r"([MHVC])([^MHVC]*)", path):
        values = [float(number) for number in re.findall(r"-?[\d.]+", numbers)]
        x, y = found[-1] if found else (0.0, 0.0)
        if command == "C":
            (ax, ay), (bx, by), (cx, cy) = values[:2], values[2:4], values[4:]
            for step in range(1, 51):
                t, u = step / 50, 1 - step / 50
                found.append(
                    (
                        u**3 * x + 3 * u * u * t * ax + 3 * u * t * t * bx + t**3 * cx,
                        u**3 * y + 3 * u * u * t * ay + 3 * u * t * t * by + t**3 * cy,
                    )
                )
        else:
            found.append({"M": (values[0], values[-1]), "H": (values[0], y), "V": (x, values[0])}[command])
    return found


def test_every_text_is_in_one_box_and_touches_no_other() -> None:
    page, *rest = boxes()
    for text, place in texts():
        assert page.holds(place), text
        for box in rest:
            assert box.holds(place) or not box.meets(place), f"{text} leaves its box"


def test_no_text_lies_on_an_arrow_or_on_another_text() -> None:
    found = list(texts())
    for element, attributes in elements():
        if element.tag == f"{SVG}path":
            for (ax, ay), (bx, by) in pairwise(points(attributes["d"])):
                line = Box(min(ax, bx) - 1, min(ay, by) - 1, max(ax, bx) + 1, max(ay, by) + 1)
                for text, place in found:
                    assert not place.meets(line), f"{text} lies on {attributes['d']}"
    for (text, place), (other, elsewhere) in pairwise(found):
        assert not place.meets(elsewhere), f"{text} lies on {other}"


def test_it_is_drawn_without_style_sheets_which_not_every_renderer_knows() -> None:
    assert "<style" not in PICTURE.read_text()
