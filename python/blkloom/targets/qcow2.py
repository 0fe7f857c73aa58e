"""`qcow2`: a QCOW2 image, with its backing chain.

Source: dm-qcow2 (Tkhai 2020), QEMU docs/interop/qcow2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal

from typing_extensions import override

from blkloom.table.syntax import Syntax, choice, flag, options, size, text
from blkloom.targets import image
from blkloom.units import Bytes

if TYPE_CHECKING:
    from blkloom.image.format import Format

_OPTIONS: Final = options(
    image.READ_ONLY,
    image.DIRECT_IO,
    text("snapshot", "<id|name>"),
    image.ALLOW_BACKING,
    image.LOCK,
    image.CACHE_SIZE,
    choice("discard", "unmap", "ignore", field="discard_as"),
    size("preallocate"),
    flag("compact_zeroes"),
    choice("on_enospc", "fail", "park"),
    image.FAULT_INJECTION,
)


class Qcow2(image.ImageSpec):
    """A QCOW2 image. snapshot: id or name of an internal snapshot to serve instead of the active state. preallocate:
    bytes around a first write for which clusters are allocated together with it; None for the automatic size.
    on_enospc: whether a write fails for lack of space, or waits for space.
    """

    snapshot: str = ""
    discard_as: Literal["unmap", "ignore"] = "unmap"
    preallocate: Bytes | None = None
    compact_zeroes: bool = False
    on_enospc: Literal["fail", "park"] = "fail"

    name: ClassVar[str] = "qcow2"
    arguments: ClassVar[Syntax] = (image.PATH, _OPTIONS)
    summary: ClassVar[str] = "a QCOW2 image with its backing files"
    modules: ClassVar[tuple[str, ...]] = (
        *image.ImageSpec.modules,
        "blkloom.image.qcow2.driver",
        "blkloom.image.qcow2.write.writer",
    )

    @override
    def image_format(self) -> Format:
        from blkloom.image.qcow2.driver import Qcow2Format

        return Qcow2Format(
            snapshot=self.snapshot,
            discard=self.discard_as == "unmap",
            compact_zeroes=self.compact_zeroes,
            preallocate=self.preallocate,
        )

    @property
    @override
    def waits_for_space(self) -> bool:
        return self.on_enospc == "park"
