"""Test targets for tests of tables: they map zeros; only their arguments matter."""

from __future__ import annotations

from typing import ClassVar

from blkloom._engine import Extent
from blkloom.table import syntax
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes


class Blank(TargetSpec):
    """Takes nothing."""

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return LoadedTarget(self, [(Bytes(0), length, Extent.zero())])


class Words(Blank):
    """Takes any words."""

    words: tuple[str, ...] = ()

    name: ClassVar[str] = "words"
    arguments: ClassVar[syntax.Syntax] = (syntax.words("words"),)
