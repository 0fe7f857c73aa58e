"""Target specs: the target of one table line, with its arguments as fields.

A spec is frozen, so a table can be compared, printed, and loaded more than once. The state of a load is in the
`LoadedTarget` that `load` returns. The two classes correspond to `struct target_type` and `struct dm_target` of the
kernel.

Reading a table needs neither the engine nor files. Any thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self, dataclass_transform

import msgspec

from blkloom.table.syntax import Syntax, format_arguments, parse_arguments, syntax_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from blkloom.table.arguments import Arguments
    from blkloom.targets.device_ref import DeviceRef
    from blkloom.targets.load_context import LoadContext
    from blkloom.targets.loaded import LoadedTarget
    from blkloom.units import Bytes


@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class TargetSpec(msgspec.Struct, frozen=True):
    """Base class of target specs. A subclass defines `name`, annotated fields, an argument for each, and `load`."""

    name: ClassVar[str]
    """The name of the target in tables."""
    arguments: ClassVar[Syntax] = ()
    """The arguments in a table line (`blkloom.syntax`): parser, printer and documentation are derived from them."""
    syntax: ClassVar[str]
    """The syntax of the arguments, for documentation: `<dev path> <offset>`. Derived from `arguments`."""
    summary: ClassVar[str] = ""
    """A description in one line, for `blkloom targets`."""
    singleton: ClassVar[bool] = False
    """The target must be the only line of its table."""
    raw: ClassVar[bool] = False
    """All of its data is at fixed places of the files and devices that it names, and nothing of it in this process
    after a flush: another host that opens them continues with the same data.
    """
    modules: ClassVar[tuple[str, ...]] = ()
    """Modules with a slow import that `load` needs. For built-in targets they are imported once for all worker
    processes. The import must not start a thread.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.syntax = syntax_line(cls.arguments)

    @classmethod
    def parse(cls, arguments: Arguments) -> Self:
        """Creates the spec from the words of a table line. Raises TableError. Override it to refuse arguments that
        exclude each other (`arguments.error`).
        """
        return cls(**parse_arguments(arguments, cls.arguments))

    def format(self) -> list[str]:
        """The arguments as words, not escaped. `parse` of these words returns an equal spec."""
        return format_arguments(self, self.arguments)

    def device_refs(self) -> Sequence[DeviceRef]:
        """Lower devices and files in its arguments. These devices must be loaded before it."""
        return ()

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        """Loads the target for a segment of `length` bytes; returns it with its map.

        context: opens files, memory and lower devices, and says whether they must be read-only.
        start: offset of the segment in the device. Raises TableError (`context.refuse`) or
        BackingError; then the table is not loaded and nothing changes.
        """
        raise TypeError(f"{type(self).__qualname__} does not define load")


TargetSpec.syntax = ""
