"""`dust`: a part of one file or device, with bad blocks that fail reads until they are written.

Source: Linux Documentation/admin-guide/device-mapper/dm-dust.rst; dm-dust.c for messages and the form of the status.
The bad blocks are lost when the table is replaced or the device is removed, as in the kernel. An upgrade keeps them.
"""

from __future__ import annotations

import logging
from typing import ClassVar, Final

from typing_extensions import override

from blkloom._engine import BadBlockFilter, Extent
from blkloom.errors import UsageError
from blkloom.table.arguments import Arguments, decimal
from blkloom.table.syntax import Syntax, argument
from blkloom.targets.device_ref import OnDevice, device_ref
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.units import SECTOR, Bytes, to_bytes

_log = logging.getLogger(__name__)
_LARGEST: Final = 1 << 30
_MOST_FAILING_WRITES: Final = 255
_MESSAGES: Final = (
    "addbadblock <block> [<failing writes>], removebadblock <block>, queryblock <block>, countbadblocks, "
    "listbadblocks, clearbadblocks, enable, disable, quiet"
)


def _block_size(arguments: Arguments) -> Bytes:
    size = arguments.integer("block size parameter", least=1, most=(1 << 32) - 1)
    if size < SECTOR:
        raise arguments.error(f"Block size must be at least {SECTOR}", value=str(size))
    if size & (size - 1):
        raise arguments.error("Block size must be a power of 2", value=str(size))
    if size > _LARGEST:
        raise arguments.error("Block size is too large", value=str(size), cure=f"at most {_LARGEST} bytes")
    return Bytes(size)


class Dust(OnDevice):
    """A segment that maps to `device`, with bad blocks of `block` bytes."""

    block: Bytes

    name: ClassVar[str] = "dust"
    arguments: ClassVar[Syntax] = (device_ref("device"), argument("block", "<block size>", _block_size))
    summary: ClassVar[str] = "a piece of a file or device, with bad blocks (block size in bytes)"

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        if self.block > length:
            cure = f"at most {length} bytes, the length of the segment"
            raise context.refuse("Block size is too large", value=str(self.block), cure=cure)
        return _LoadedDust(self, context, length)


class _LoadedDust(LoadedTarget):
    spec: Dust

    def __init__(self, spec: Dust, context: LoadContext, length: Bytes) -> None:
        # The kernel counts blocks from the start of the lower device.
        start = to_bytes(spec.device.offset)
        self._blocks = BadBlockFilter(spec.block, start=start)
        self._past = -(-(start + length) // spec.block)
        self._quiet = False
        extent = Extent.filtered(self._blocks, spec.device.extent(context, length))
        super().__init__(spec, [(Bytes(0), length, extent)])
        self._saved = context.saved_state()
        if (former := self._saved.read()) is not None:
            self._blocks.enable(former["enabled"])
            self._quiet = former["quiet"]
            for block, failing_writes in former["blocks"]:
                self._blocks.add(block, failing_writes)

    def _save(self) -> None:
        self._saved.save({"enabled": self._blocks.enabled, "quiet": self._quiet, "blocks": self._blocks.list()})

    @override
    def postsuspend(self) -> None:
        self._save()  # without the blocks that were written meanwhile

    @override
    def status(self) -> str:
        mode = "fail_read_on_bad_block" if self._blocks.enabled else "bypass"
        return f"{self.spec.device.path} {mode} {'quiet' if self._quiet else 'verbose'}"

    @override
    def message(self, words: list[str]) -> str | None:
        answer = self._execute(words)
        self._save()
        return answer

    def _execute(self, words: list[str]) -> str | None:
        match [words[0].lower(), *words[1:]] if words else []:
            case ["enable" | "disable" as word]:
                self._blocks.enable(word == "enable")
                _log.info("%sing read failures on bad sectors", "enabl" if word == "enable" else "disabl")
            case ["quiet"]:
                self._quiet = not self._quiet
            case ["countbadblocks"]:
                return f"countbadblocks: {len(self._blocks.list())} badblock(s) found"
            case ["listbadblocks"]:
                return "\n".join(str(block) for block, _ in self._blocks.list()) or "No blocks in badblocklist"
            case ["clearbadblocks"]:
                cleared = self._blocks.clear()
                return "clearbadblocks: badblocks cleared" if cleared else "clearbadblocks: no badblocks found"
            case ["queryblock", block]:
                number = self._block(block)
                found = any(number == bad for bad, _ in self._blocks.list())
                return f"queryblock: block {number} {'found' if found else 'not found'} in badblocklist"
            case ["addbadblock", block, *more] if len(more) <= 1:
                self._add(self._block(block), self._failing_writes(more[0]) if more else 0)
            case ["removebadblock", block]:
                self._remove(self._block(block))
            case _:
                raise UsageError(f"Invalid argument: unrecognized message '{' '.join(words)}'", cure=_MESSAGES)
        return None

    def _block(self, word: str) -> int:
        number = decimal(word)
        if number is None:
            raise UsageError(f"Invalid argument: '{word}' is no block number", cure=_MESSAGES)
        if number >= self._past:
            raise UsageError(
                f"Invalid argument: selected block value out of range: {number}",
                cure=f"blocks of {self.spec.block} bytes are counted from the start of {self.spec.device.path}; "
                f"the last one is {self._past - 1}",
            )
        return number

    def _failing_writes(self, word: str) -> int:
        number = decimal(word)
        if number is None or number > _MOST_FAILING_WRITES:
            what = f"Invalid argument: selected write fail count out of range: '{word}'"
            raise UsageError(what, cure=f"give a number from 0 to {_MOST_FAILING_WRITES}")
        return number

    def _add(self, block: int, failing_writes: int) -> None:
        if not self._blocks.add(block, failing_writes):
            what = f"Invalid argument: block {block} already in badblocklist"
            raise UsageError(what, cure=f"remove it first: removebadblock {block}")
        if not self._quiet:
            _log.info("addbadblock: badblock added at block %d with write fail count %d", block, failing_writes)

    def _remove(self, block: int) -> None:
        if not self._blocks.remove(block):
            what = f"Invalid argument: block {block} not found in badblocklist"
            raise UsageError(what, cure="listbadblocks lists them")
        if not self._quiet:
            _log.info("removebadblock: badblock removed at block %d", block)
