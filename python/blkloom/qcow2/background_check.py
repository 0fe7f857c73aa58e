"""When all tables of an image that is written to are looked at, a step at a time, while requests are served.

An image that was not closed is counted anew from its beginning. Any other is counted when there are free clusters that
its file had when it was opened: they may be handed out only afterwards, lest a table that nobody has met names one of
them. Then the allocator may `trust` the counts. One thread (the mapper's). May fail: CorruptImage, OSError.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from blkloom.qcow2.errors import CorruptImage
from blkloom.qcow2.recount import Recount

if TYPE_CHECKING:
    from blkloom.qcow2.allocation import Allocator
    from blkloom.qcow2.flush import WriteBack
    from blkloom.qcow2.image import Image
    from blkloom.qcow2.l2_checks import L2Checks
    from blkloom.qcow2.overlap_check import OverlapCheck
    from blkloom.qcow2.refcounts import Refcounts
    from blkloom.qcow2.snapshots import Snapshot

_log = logging.getLogger(__name__)

_BLOCKS: Final = 8
"""Refcount blocks looked at in a step."""
_LAST_STEPS: Final = 256
"""Steps that the end of a session waits for, so that no image but a large one is left unfinished."""


class BackgroundCheck:
    """Of one image. ended: called when all counts are right, with how many were not."""

    def __init__(
        self,
        image: Image,
        refcounts: Refcounts,
        overlaps: OverlapCheck,
        l2_checks: L2Checks,
        snapshots: list[Snapshot],
        allocator: Allocator,
        write_back: WriteBack,
        *,
        ended: Callable[[int], None],
    ) -> None:
        self._path = image.path
        self._refcounts = refcounts
        self._l2_checks = l2_checks
        self._allocator = allocator
        self._write_back = write_back
        self._ended = ended
        proxy = weakref.proxy(allocator)  # which has it while it counts
        self._recount: Final = Recount(image, refcounts, overlaps, l2_checks, snapshots, proxy)
        self.unfinished = image.needs_repair
        """The image was not closed, and its counts are not right yet."""
        self._due = self.unfinished
        self._steps: Iterator[None] | None = None
        self._in_step = False
        self._failed = False
        if self.unfinished:
            allocator.recount = self._recount

    @property
    def running(self) -> bool:
        """Whether there is a step to be done."""
        return self._due or self._steps is not None

    def look_for_space(self) -> None:
        """Free clusters inside the file would be used if there are any."""
        self._due |= self._allocator.doubtful and self._steps is None and not self._failed

    def step(self) -> bool:
        """A few milliseconds of it; whether there is more. What fails is logged and not tried again, and the file grows
        on; but raises CorruptImage.
        """
        try:
            self._next()
        except CorruptImage:
            self.stop()
            raise
        except OSError as error:
            self.stop()
            self._failed = True
            _log.warning("%s: free clusters inside the file stay unused: %s", self._path, error)
        return self.running

    def finish(self) -> None:
        """All of it, at once, unless a step asks. Raises CorruptImage, OSError."""
        if not self._in_step and self._allocator.doubtful:
            if self._steps is None or self._allocator.recount is None:  # it has not begun, or only looks for space
                self._steps = self._count()
            self._due = False
            try:
                while self.running:
                    self._next()
            except OSError:
                self.stop()
                raise

    def end(self) -> None:
        """The session ends: finishes what is unfinished unless that takes long, and does nothing more. Raises
        CorruptImage.
        """
        if self.unfinished:
            for _ in range(_LAST_STEPS):
                if not self.step():
                    break
        self.stop()

    def stop(self) -> None:
        """Does nothing more. Counts that are believed are right at any time; others are not until all are counted."""
        self._steps, self._due = None, False
        if not self.unfinished:
            self._allocator.recount = None

    def _next(self) -> None:
        if self._steps is None:
            if not self._due:
                return
            self._due = False
            self._steps = self._count() if self.unfinished else self._look_and_count()
        self._in_step = True
        try:
            next(self._steps)
        except StopIteration:
            self._steps = None
        finally:
            self._in_step = False

    def _look_and_count(self) -> Iterator[None]:
        self._allocator.freed_inside = False
        end, per_block = self._allocator.end, self._refcounts.per_block
        for index in range(-(-end // per_block)):
            if not self._refcounts.full(index, end - index * per_block):
                yield from self._count()
                return
            if index % _BLOCKS == _BLOCKS - 1:
                yield

    def _count(self) -> Iterator[None]:
        yield from self._recount.steps(self._write_back)
        self._allocator.recount = None
        self._l2_checks.counts_hold = True
        self._allocator.trust()
        self.unfinished = False
        self._ended(self._recount.changed)
