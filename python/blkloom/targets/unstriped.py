"""`unstriped`: one stripe of a striped device or file.

Source: Linux Documentation/admin-guide/device-mapper/unstriped.rst; dm-unstripe.c for the limits.
"""

from __future__ import annotations

from typing import ClassVar, Final

from typing_extensions import override

from blkloom._engine import Extent
from blkloom.table.arguments import Arguments
from blkloom.table.syntax import Syntax, argument, integer
from blkloom.targets.device_ref import OnDevice, device_ref
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.units import Bytes, Sectors, to_bytes, to_sectors

_MOST: Final = (1 << 32) - 1


class Unstriped(OnDevice):
    """A segment in which chunk i is chunk i * `stripes` + `stripe` of `device`."""

    stripes: int
    chunk: Sectors
    stripe: int
    name: ClassVar[str] = "unstriped"
    raw: ClassVar[bool] = True
    arguments: ClassVar[Syntax] = (
        integer("stripes", least=1, most=_MOST)._replace(syntax="<number of stripes>"),
        argument("chunk", "<chunk size>", lambda words: Sectors(words.integer("chunk size", least=1, most=_MOST))),
        integer("stripe", most=_MOST)._replace(syntax="<stripe #>"),
        device_ref("device"),
    )
    summary: ClassVar[str] = "one stripe of a striped file or device (sizes in sectors)"

    @classmethod
    @override
    def parse(cls, arguments: Arguments) -> Unstriped:
        found = super().parse(arguments)
        if found.stripe >= found.stripes:
            what = "Unstripe set to stripe greater than or equal to number of stripes"
            raise arguments.error(what, value=str(found.stripe), cure=f"give a number from 0 to {found.stripes - 1}")
        return found

    @override
    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        sectors = to_sectors(length)
        if sectors % self.chunk:
            below = sectors // self.chunk * self.chunk
            cure = f"make it {below + self.chunk} sectors" if not below else f"make it {below} sectors"
            raise context.refuse("Target length not divisible by chunk size", value=str(sectors), cure=cure)
        # The last chunk of this stripe is the farthest one.
        chunks = (sectors // self.chunk - 1) * self.stripes + self.stripe + 1
        striped = self.device.extent(context, to_bytes(Sectors(chunks * self.chunk)))
        extent = Extent.unstriped(to_bytes(self.chunk), self.stripe, self.stripes, striped)
        return LoadedTarget(self, [(Bytes(0), length, extent)])
