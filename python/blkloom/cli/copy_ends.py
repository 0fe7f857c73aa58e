"""SRC and DST of `blkloom copy`: what the words of the command line mean."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

import msgspec

from blkloom.copying.ends import End, NewTarget, Part, exists, file_end
from blkloom.copying.lower import below, number_at
from blkloom.device_names import STACKED
from blkloom.errors import NoSuchDevice, UsageError

if TYPE_CHECKING:
    from blkloom.control.client import Client
    from blkloom.control.states import DeviceInfo

_URI: Final = re.compile(r"nbds?(\+[a-z]+)?:", re.IGNORECASE)


class Word(msgspec.Struct, frozen=True):
    """SRC or DST as written, and what it names: a file or block device, a device of the supervisor, or a server."""

    text: str
    device: DeviceInfo | None = None
    uri: str = ""


def meaning(text: str, client: Client, what: str) -> Word:
    """What a word of the command line names. what: SRC or DST, for messages. Raises UsageError."""
    if text == "-":
        raise UsageError(
            f"{what} cannot be a pipe: a copy needs the size, and reads and writes in any order",
            cure="copy to or from a file, or pipe with cp, cat or dd",
        )
    if _URI.match(text):
        return Word(text, uri=text)
    if text.startswith(STACKED):
        return Word(text, device=client.info(text.removeprefix(STACKED))[0])
    if "/" in text:
        return Word(text)
    try:
        found = client.info(text)[0]
    except NoSuchDevice:
        return Word(text)
    if os.path.exists(text):
        raise UsageError(
            f"{what} '{text}' is a file here and a device of the supervisor",
            cure=f"say ./{text} for the file, {STACKED}{text} for the device",
        )
    return Word(text, device=found)


def meanings(source: str, target: str, client: Client) -> tuple[Word, Word]:
    """What SRC and DST name. Raises UsageError, also if both name the same device."""
    words = meaning(source, client, "SRC"), meaning(target, client, "DST")
    first, second = (word.device for word in words)
    if first is not None and second is not None and first.name == second.name:
        what = f"{target} and {source} are the same"
        raise UsageError(what, cure="copy to another file or device")
    return words


@contextmanager
def source(word: Word, client: Client, format: str, allow_backing: Sequence[str]) -> Iterator[End]:
    """The end that is read."""
    if word.uri:
        yield _server(word.uri, format, writable=False)
        return
    if word.device is None:
        yield _with_all_below(file_end(word.text, format=format, allow_backing=allow_backing), client.info())
        return
    with _device(word, word.device, client, format, writable=False) as end:
        yield _with_all_below(end, client.info())


@contextmanager
def target(
    word: Word,
    client: Client,
    format: str,
    size: int,
    *,
    force: bool,
    create: bool,
    resume: bool,
    allow_backing: Sequence[str],
) -> Iterator[End | NewTarget]:
    """The end that is written: an existing one, or one to be made with `size` bytes."""
    if word.uri:
        yield _server(word.uri, format, writable=True)
        return
    if word.device is not None:
        with _device(word, word.device, client, format, writable=True) as end:
            yield end
        return
    path = word.text
    is_new = not os.path.exists(path) or os.path.isfile(path)
    if not is_new or not create:
        if format not in ("auto", "raw") and is_new is False and create:
            cure = "make the image with qemu-img create, and copy to it with --no-create"
            raise UsageError(f"{path} is no file: no image is made in it", cure=cure)
        yield file_end(path, format=format, option="--format", contents=False, allow_backing=allow_backing)
        return
    if os.path.isfile(path) and os.stat(path).st_size and not (force or resume):
        raise exists(path)
    yield NewTarget(path=path, name=path, format=format, size=size, overwrite=force)


def _server(uri: str, format: str, *, writable: bool) -> End:
    from blkloom.copying.servers import server_end

    _check_raw(format)
    return server_end(uri, writable=writable)


@contextmanager
def _device(word: Word, info: DeviceInfo, client: Client, format: str, *, writable: bool) -> Iterator[End]:
    """A device, through its own socket; if that was removed, through a file."""
    from blkloom.copying.servers import server_end
    from blkloom.export.nbd.uri import unix_uri

    _check_raw(format)
    sockets = [state for state in info.exports if state.kind == "nbd" and state.unix and not state.of_node]
    usable = [state for state in sockets if not ((writable and state.read_only) or state.details)]  # TLS, rules
    if usable:
        client.status(info.name)  # a worker that does not answer is an error here, at once
        uri = unix_uri(usable[0].unix, usable[0].name)
        yield server_end(uri, name=word.text, writable=writable, identity={"device": _identity(info)})
        return
    with _file_of(info, client, writable=writable) as path:
        yield file_end(path, name=word.text, format="raw", contents=not writable, device=_identity(info))


@contextmanager
def _file_of(info: DeviceInfo, client: Client, *, writable: bool) -> Iterator[str]:
    """A path that leads to the contents of a device, in the block: a file of its own, which goes with the copy."""
    from tempfile import TemporaryDirectory  # a slow import

    with TemporaryDirectory(prefix="blkloom-copy-") as folder:
        path = os.path.join(folder, "device")
        try:
            yield client.export(info.name, kind="fuse", path=path, read_only=not writable).path
        finally:  # also of a call that a signal has interrupted
            with suppress(NoSuchDevice):  # it was removed meanwhile, and its exports with it
                for state in client.info(info.name)[0].exports:
                    if state.path == path:
                        client.unexport(info.name, state.id)


def _with_all_below(end: End, devices: list[DeviceInfo]) -> End:
    """The end with what is below it through devices of the supervisor, too."""
    found: set[Part] = set()
    left: list[Part] = [*end.itself, *end.below]
    while left:
        if (part := left.pop()) not in found:
            found.add(part)
            left += below(part) if isinstance(part, tuple) else ()
            left += [other for info in devices for other in _next_to(part, info)]
    return msgspec.structs.replace(end, below=frozenset(found - end.itself))


def _next_to(part: Part, info: DeviceInfo) -> Iterator[Part]:
    """The device, if a part is its node or on its FUSE file; of the device itself, its node and what it is on."""
    from blkloom.attach.hosting import numbers_of

    numbers = [tuple(map(int, number.split(":"))) for number in numbers_of(info.node, info.exports)]
    if isinstance(part, tuple):
        number = part[1] if part[0] < 0 else part[0]
        if (os.major(number), os.minor(number)) in numbers:
            yield _identity(info)
    elif part == STACKED + info.name:
        yield _identity(info)
    elif part == _identity(info):
        yield from ((-1, os.makedev(major, minor)) for major, minor in numbers if major)
        for dep in info.deps:
            if dep.startswith(STACKED):
                yield dep
            elif (found := number_at(dep)) is not None:
                yield found


def _identity(info: DeviceInfo) -> str:
    return info.uuid or info.name


def _check_raw(format: str) -> None:
    """Raises UsageError for a format that is not raw."""
    if format not in ("auto", "raw"):
        cure = f"make a device of the image: blkloom create NAME --table '0 SECTORS {format} PATH'"
        raise UsageError("a device has no format", cure=cure)
