"""Escapes text from files, images and clients, so that it is safe for terminals and logs."""

from __future__ import annotations

import errno
import logging
import os

from typing_extensions import override


def printable(text: str) -> str:
    r"""The text in one line without control characters: what cannot be printed is written as `\xNN`, byte by byte.
    What is printable stays as it is.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else escaped(one) for one in text)


def printable_lines(text: str) -> str:
    """The same for a text whose line ends are meant."""
    return "\n".join(map(printable, text.split("\n")))


def quoted(data: bytes) -> str:
    """Bytes of a client or a file, as text in quotes for a message."""
    return f"'{printable(data.decode('utf-8', 'surrogateescape'))}'"


def described(error: BaseException) -> str:
    """An exception, for users: of the system's what it says and about which file, of blkloom's its text, of a bug the
    class, too.
    """
    if isinstance(error, OSError) and error.strerror is not None:
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        about = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) and error.filename else ""
        said = error.strerror if name in error.strerror else f"{error.strerror} ({name})"
        return printable(f"{about}{said}")
    if type(error).__module__.startswith("blkloom."):
        return str(error)
    return printable(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def escaped(character: str) -> str:
    r"""`\xNN` for each of its bytes."""
    try:
        encoded = character.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, which stands for no byte
        encoded = character.encode("utf-8", "surrogatepass")
    return "".join(f"\\x{byte:02x}" for byte in encoded)


def log_to_stderr(formatter: LineFormatter, level: int = logging.WARNING) -> None:
    """Starts the log of a process, on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler])


class LineFormatter(logging.Formatter):
    """Each record is one line, whatever its arguments hold; exceptions among them are `described`. A traceback follows
    in lines that are indented.
    """

    @override
    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            args = tuple(described(one) if isinstance(one, BaseException) else one for one in record.args)
            record = logging.makeLogRecord(record.__dict__ | {"args": args})
        plain = logging.makeLogRecord(record.__dict__ | {"msg": printable(record.getMessage()), "args": ()})
        first, *rest = super().format(plain).split("\n")
        return "\n".join([first, *(f"    {printable(line)}" for line in rest)])
