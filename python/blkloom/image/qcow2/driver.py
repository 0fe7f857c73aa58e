"""QCOW2 as an image format: opens an image, and begins to write to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from typing_extensions import override

from blkloom.image.errors import CorruptImage
from blkloom.image.format import Backing, Format, Opened
from blkloom.image.qcow2.format.header import ExtensionKind, read_header
from blkloom.image.qcow2.format.snapshots import find_snapshot, read_snapshots
from blkloom.image.qcow2.state.image import Image
from blkloom.image.qcow2.state.layer import ImageLayer

if TYPE_CHECKING:
    from blkloom.image.format import WriteContext
    from blkloom.image.layer import Layer
    from blkloom.image.open_chain import ImageSource
    from blkloom.image.qcow2.write.writer import Writer
    from blkloom.image.storage import Storage


@dataclass(frozen=True)
class Qcow2Format(Format):
    """The format. snapshot: the id or name of an internal snapshot; "" for the active disk. discard, compact_zeroes,
    preallocate: see `Options`; None: the best value.
    """

    snapshot: str = ""
    discard: bool = True
    compact_zeroes: bool = False
    preallocate: int | None = None

    @property
    @override
    def writable(self) -> bool:
        return not self.snapshot

    @override
    def open(self, source: ImageSource) -> Opened:
        storage = source.metadata()
        header = read_header(storage)
        unit = header.geometry.unit
        if header.has_data_file:
            name = header.extension(ExtensionKind.DATA_FILE_NAME)
            if not name:
                raise CorruptImage("it needs an external data file and names none", path=source.path)
            data_storage, file = source.data_file(name, unit)
        else:
            data_storage, file = source.data(unit)
        if source.redo is not None and not source.redo.is_empty:
            source.redo.replay(storage, data_storage.sync)
            header = read_header(storage)
        snapshot = (
            find_snapshot(read_snapshots(storage, header), self.snapshot, path=source.path) if self.snapshot else None
        )
        image = Image.open(
            storage, writable=source.writable, data_storage=data_storage, header=header, snapshot=snapshot
        )
        backing = None
        if header.backing_name is not None:
            backing = Backing(header.backing_name, header.extension(ExtensionKind.BACKING_FORMAT))
        return Opened(ImageLayer(source.number, image, snapshot=self.snapshot), file, backing)

    @override
    def disk_size(self, storage: Storage) -> int:
        return read_header(storage).size

    @override
    def new_image(self, size: int) -> bytes:
        from blkloom.image.qcow2.format.creation import new_image

        return new_image(size)

    @override
    def begin_writing(self, top: Layer, context: WriteContext) -> Writer:
        from blkloom.image.qcow2.write.writer import Options, Writer  # images that are only read do not need it

        assert isinstance(top, ImageLayer), "this opened it"

        def broke() -> None:
            top.writable = False
            context.broke()

        options = Options(discard=self.discard, compact_zeroes=self.compact_zeroes)
        if self.preallocate is not None:
            options = replace(options, preallocate=self.preallocate)
        writer = Writer(top.image, replace(context, broke=broke), options)
        top.writable, top.guarded = True, writer.guarded
        top.follow(writer.bitmaps)
        return writer

    @override
    def end_writing(self, top: Layer) -> None:
        assert isinstance(top, ImageLayer), "this opened it"
        top.guarded = None  # the writer's; avoids a reference cycle that would keep its memory
