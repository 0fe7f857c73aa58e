"""Draws the tree of `ls --tree` like dmsetup. Pure.

Source: dmsetup.c (_display_tree_node, _out_char, _process_tree_options).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from blkloom.dm.dependencies import Graph, Node
from blkloom.dm.failing import NotACommandLine


@dataclass(frozen=True)
class Symbols:
    """The characters of the drawing."""

    branch: str
    vertical: str
    last: str
    single: str
    first: str


ASCII: Final = Symbols("|-", "| ", "`-", "---", "-+-")
UTF: Final = Symbols("├─", "│ ", "└─", "───", "─┬─")
VT100: Final = Symbols(
    "\x1b(0\x0ftq\x1b(B", "\x1b(0\x0fx\x1b(B ", "\x1b(0\x0fmq\x1b(B", "\x1b(0\x0fqqq\x1b(B", "\x1b(0\x0fqwq\x1b(B"
)


@dataclass(frozen=True)
class Style:
    """The style of a tree. width: columns; 0: lines are never cut."""

    symbols: Symbols = ASCII
    device: bool = True
    block_name: bool = False
    active: bool = False
    rw: bool = False
    open: bool = False
    uuid: bool = False
    compact: bool = False
    inverted: bool = False
    width: int = 80


_CHANGES: Final[dict[str, dict[str, object]]] = {
    "active": {"active": True},
    "ascii": {"symbols": ASCII},
    "blkdevname": {"block_name": True},
    "compact": {"compact": True},
    "device": {"device": True},
    "inverted": {"inverted": True},
    "nodevice": {"device": False},
    "notrunc": {"width": 0},
    "open": {"open": True},
    "rw": {"rw": True},
    "status": {},
    "table": {},
    "utf": {"symbols": UTF},
    "uuid": {"uuid": True},
    "vt100": {"symbols": VT100},
}
OPTIONS: Final = tuple(_CHANGES)


def read_style(options: str, style: Style) -> Style:
    """`style` with comma-separated tree options. Raises NotACommandLine."""
    for option in filter(None, options.split(",")):
        if option not in _CHANGES:
            raise NotACommandLine(
                f"Tree options not recognised: {option}.", what=f"the tree's options are {', '.join(OPTIONS)}"
            )
        style = replace(style, **_CHANGES[option])  # type: ignore[arg-type]
    return style


def draw(graph: Graph, style: Style, show: Callable[[str], str] = str) -> Iterator[str]:
    """The lines of the tree. show: how a name is shown."""
    attributes = style.active or style.rw or style.open or style.uuid
    return _Drawing(style, style.compact and not attributes, show).lines(graph)


class _Drawing:
    def __init__(self, style: Style, compact: bool, show: Callable[[str], str]) -> None:
        self._style = style
        self._compact = compact
        self._show = show

    def lines(self, graph: Graph) -> Iterator[str]:
        nodes = self._visible(graph.roots(inverted=self._style.inverted))
        for node in nodes:
            yield from self._node(node, [], "", node is nodes[-1])

    def _visible(self, nodes: list[Node]) -> list[Node]:
        return [node for node in nodes if node.name or self._style.device or self._style.block_name]

    def _node(self, node: Node, above: list[tuple[int, bool]], line: str, last: bool) -> Iterator[str]:
        """above: for each ancestor, the width of its text and whether siblings follow."""
        symbols, depth = self._style.symbols, len(above)
        if line:
            line += (symbols.single if last else symbols.first) if depth else ""
            start = len(line) - 3
        else:
            for level, (width, _) in enumerate(above):
                follows = above[level + 1][1] if level + 1 < depth else not last
                joint = (symbols.branch if follows else symbols.last) if level == depth - 1 else ""
                line += " " * (width + 1) + (joint or (symbols.vertical if follows else "  "))
            start = len(line)
        line += self._text(node)
        children = self._visible(node.used_by if self._style.inverted else node.uses)
        compact = self._compact and bool(children)
        if not compact:
            yield self._cut(line)
        below = [*above, (len(line) - start if self._compact else 0, not last)]
        for child in children:
            yield from self._node(child, below, line if compact and child is children[0] else "", child is children[-1])

    def _text(self, node: Node) -> str:
        style, info = self._style, node.dependency.device
        text = self._show(node.name) if node.name else ""
        if style.block_name or (info is not None and node.dependency.block_name != info.name):
            text += f" <{node.dependency.block_name}>"
        if style.device:
            text += f" ({node.dependency.number(':')})"
        if info is None:
            return text
        attributes = [
            *([info.state] if style.active else []),
            *(["RO" if info.read_only else "RW"] if style.rw else []),
            *([str(info.open_count)] if style.open else []),
            *([info.uuid] if style.uuid else []),
        ]
        return f"{text} [{', '.join(attributes)}]" if attributes else text

    def _cut(self, line: str) -> str:
        width = self._style.width
        return line if not width or len(line) <= width else line[: width - 1] + "..."
