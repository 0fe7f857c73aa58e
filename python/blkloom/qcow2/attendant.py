"""Who knows what goes wrong with an attached image, and what may be said to it with `blkloom message`.

One for each loaded table: it makes the storage that images are read and written through, keeps what failed there, and
answers as dm-qcow2 does where that makes sense: `get_errors`, `get_event` and `get_img_name` are its own, down to the
first lines of their answers; `set_fault_injection` counts faults of a kind instead of rolling dice; `retry` is new.
One thread (the mapper's). May fail: UsageError, with what would have been understood.

Source: dm-qcow2 (Tkhai 2020), drivers/md/dm-qcow2-cmd.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from blkloom.errors import UsageError
from blkloom.qcow2.injection import INJECTED, Injection, errno_named
from blkloom.qcow2.troubles import Troubles
from blkloom.qcow2.watched import WatchedStorage

if TYPE_CHECKING:
    from collections.abc import Callable

    from blkloom._engine import File
    from blkloom.qcow2.attachment import Asks
    from blkloom.qcow2.chain import Chain
    from blkloom.qcow2.errors import CorruptImage
    from blkloom.qcow2.storage import Role
    from blkloom.qcow2.types import HostOffset

_SYNTAX: Final = (
    "get_errors",
    "get_event",
    "get_img_name <number>",
    "retry",
    "set_fault_injection <what> <errno> <count>",
    "set_fault_injection off",
)
_MOST: Final = 1 << 30


class Attendant:
    """retry: asks again for requests that wait. fault_injection: whether messages may make anything fail."""

    def __init__(self, *, retry: Callable[[], None], fault_injection: bool) -> None:
        self.troubles: Final = Troubles()
        self._retry = retry
        self._injection = Injection() if fault_injection else None
        self._chain: Chain | None = None
        self._wanted_check = False

    def storage(self, file: File, path: str, role: Role) -> WatchedStorage:
        """As `chain.StorageOf`."""
        return WatchedStorage(file, path, role, self.troubles, self._injection)

    def attend(self, chain: Chain | None) -> None:
        """These are the images from now on; None: they are let go of."""
        self._wanted_check = self.wants_check
        self._chain = chain
        for image in chain.images() if chain else ():
            image.reported = self.found_corrupt

    def found_corrupt(self, error: CorruptImage) -> None:
        """Metadata that cannot be was met."""
        self.troubles.note("corrupt", error)

    def meeting_allocations(self, path: str) -> Callable[[HostOffset, int], None] | None:
        """What is to be told of space that is handed out of the image, so that it can be made to fail."""
        injection, troubles = self._injection, self.troubles
        if injection is None:
            return None

        def meet(offset: HostOffset, length: int) -> None:
            try:
                injection.meet("allocations", path)
            except OSError as error:
                troubles.note("allocation", error, f"{length} bytes at {offset:#x} of {path}")
                raise

        return meet

    @property
    def asks(self) -> Asks:
        """What the engine has to ask for, so that requests of clients can be made to fail."""
        if self._injection is None:
            return "what is not known"
        reads, writes = self._injection.armed("data_reads"), self._injection.armed("data_writes")
        return "everything" if reads else "writes" if writes else "what is not known"

    def meet_request(self, kind: Literal["data_read", "data_write"], path: str, offset: int, length: int) -> None:
        """A client's request comes to the image at `path`. Raises OSError if it is to fail."""
        if self._injection is None:
            return
        try:
            self._injection.meet("data_reads" if kind == "data_read" else "data_writes", path)
        except OSError as error:
            self.troubles.note(kind, error, f"{length} bytes at {offset} of the disk in {path}")
            raise

    @property
    def wants_check(self) -> bool:
        """Whether one of the images does, or did when they were let go of."""
        if self._chain is None:
            return self._wanted_check
        return any(image.wants_check for image in self._chain.images())

    def answer(self, words: list[str]) -> str | None:
        """Does what a message asks. Raises UsageError."""
        match words:
            case ["get_errors"]:
                return self.troubles.report(wants_check=self.wants_check)
            case ["get_event"]:
                event = self.troubles.take_event()
                return f"{event}\n" if event else ""
            case ["get_img_name", number] if number.isascii() and number.isdigit() and len(number) < 10:
                paths = [layer.path for layer in reversed(self._chain.layers)] if self._chain else []
                return f"{paths[int(number)]}\n" if int(number) < len(paths) else ""
            case ["retry"]:
                self._retry()
                return None
            case ["set_fault_injection", *rest]:
                self._inject(rest)
                return None
        raise UsageError(
            f"Invalid argument: target qcow2 understands no message {' '.join(words)!r}",
            cure=f"it understands: {', '.join(_SYNTAX)}",
        )

    def _inject(self, words: list[str]) -> None:
        if self._injection is None:
            raise UsageError(
                "Invalid argument: no fault is injected into a device that was not made for it",
                cure="say fault_injection in its table",
            )
        if words == ["off"]:
            self._injection.disarm()
            return
        if len(words) != 3:
            raise _unknown("what, an errno and a count are needed", " ".join(words))
        what, error, count = words
        kind = next((kind for kind in INJECTED if kind == what), None)
        number = errno_named(error)
        if kind is None:
            raise _unknown("no such operations", what)
        if number is None:
            raise _unknown("no errno", error)
        if not (count.isascii() and count.isdigit() and len(count) < 11 and int(count) <= _MOST):
            raise _unknown(f"a count must be a number up to {_MOST}", count)
        self._injection.arm(kind, number, int(count))


def _unknown(what: str, value: str) -> UsageError:
    return UsageError(
        f"Invalid argument: set_fault_injection: {what}: {value!r}",
        cure=f"set_fault_injection <what> <errno> <count>, what is one of {', '.join(INJECTED)}; or off",
    )
