"""Targets for tests of tables: what they map is zeros, what counts is their words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from blkloom._engine import Extent
from blkloom.table.arguments import Arguments
from blkloom.target.base import Mapped, Target
from blkloom.target.opening import Opening
from blkloom.units import Bytes


class Blank(Target):
    """Takes nothing."""

    @classmethod
    def parse(cls, arguments: Arguments) -> Self:
        return cls()

    def map(self, opening: Opening, start: Bytes, length: Bytes) -> Mapped:
        return [(Bytes(0), length, Extent.zero())]


@dataclass(frozen=True)
class Words(Blank):
    """Takes any words."""

    words: tuple[str, ...] = ()

    name: ClassVar[str] = "words"
    syntax: ClassVar[str] = "[<word>...]"

    @classmethod
    def parse(cls, arguments: Arguments) -> Self:
        return cls(tuple(arguments.word("word") for _ in range(arguments.remaining)))

    def format(self) -> list[str]:
        return list(self.words)
