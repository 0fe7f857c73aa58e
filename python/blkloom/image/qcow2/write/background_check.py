"""Background check: reads all tables of an image that is written to, in small steps between requests.

All refcounts of an image that was not closed are computed again. For other images this is done only if there are free
clusters inside the file as it was opened: before such a cluster is allocated, it must be certain that no table refers
to it. At the end of the check, the allocator may `trust` the refcounts. One thread (the mapper's). May fail:
CorruptImage, OSError.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from blkloom.image.errors import CorruptImage
from blkloom.image.qcow2.write.recount import Recount

if TYPE_CHECKING:
    from blkloom.image.qcow2.format.snapshots import Snapshot
    from blkloom.image.qcow2.state.image import Image
    from blkloom.image.qcow2.state.l2_checks import L2Checks
    from blkloom.image.qcow2.state.overlap_check import OverlapCheck
    from blkloom.image.qcow2.state.refcounts import Refcounts
    from blkloom.image.qcow2.write.allocation import Allocator
    from blkloom.image.qcow2.write.flush import WriteBack

_log = logging.getLogger(__name__)

_BLOCKS: Final = 8
"""Refcount blocks examined in a step."""
_LAST_STEPS: Final = 256
"""Maximum number of steps at the end of a session, so that only large images are left unfinished."""


class BackgroundCheck:
    """Background check of one image. ended: called when all refcounts are right, with the number of corrected ones."""

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
        proxy = weakref.proxy(allocator)  # which uses it while it counts
        self._recount: Final = Recount(image, refcounts, overlaps, l2_checks, snapshots, proxy)
        self.unfinished = image.needs_repair
        """Whether the image was not closed, and its refcounts are not right yet."""
        self._due = self.unfinished
        self._steps: Iterator[None] | None = None
        self._in_step = False
        self._failed = False
        if self.unfinished:
            allocator.recount = self._recount
        me = weakref.proxy(self)  # no reference cycle with the allocator
        allocator.check_end = lambda: me._check_end()

    @property
    def running(self) -> bool:
        """Whether there is another step."""
        return self._due or self._steps is not None

    def look_for_space(self) -> None:
        """Starts the check if there are free clusters inside the file."""
        self._due |= self._allocator.doubtful and self._steps is None and not self._failed

    def step(self) -> bool:
        """Runs the check for a few milliseconds; returns whether there is more. Errors other than CorruptImage are
        logged and not retried; the file then continues to grow. Raises CorruptImage.
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
        """Finishes the check at once, unless called from a step. Raises CorruptImage, OSError."""
        if not self._in_step and self._allocator.doubtful:
            if self._steps is None or self._allocator.recount is None:  # it has not started, or only searches for space
                self._steps = self._count()
            self._due = False
            try:
                while self.running:
                    self._next()
            except OSError:
                self.stop()
                raise

    def end(self) -> None:
        """Ends the check with the session: finishes it if that is fast, otherwise stops it. Raises CorruptImage."""
        if self.unfinished:
            for _ in range(_LAST_STEPS):
                if not self.step():
                    break
        self.stop()

    def stop(self) -> None:
        """Stops the check. Trusted refcounts are right at any time; others are wrong until all are computed."""
        self._steps, self._due = None, False
        if not self.unfinished:
            self._allocator.recount = None

    def _check_end(self) -> None:
        """Before the file grows for the first time: if refcounts are set past its end, checks whether it was truncated.
        Refcounts of an image that was not closed prove nothing; there the background check finds it.
        """
        if not self.unfinished and self._allocator.end > self._allocator.file_end:
            self.finish()

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
