"""The text of a device file: a table, and before it lines with the options of `create`, `attach`, `export` and `loop`.

    create --read-only --uuid DATA
    attach --via loop
    0 2097152 loop /srv/disk.img

A line of options begins with the name of a command; the words are those of the command, without the device. Words are
quoted as in tables; `#` begins a comment. The device has the name of the file. Pure; errors are TableErrors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, cast

import msgspec

from blkloom.errors import Place, TableError
from blkloom.table import Table, parse_table
from blkloom.table.arguments import Word
from blkloom.table.printing import format_table
from blkloom.table.words import Places, join_words, skip_blanks, split_words
from blkloom.targets.registry import Targets


class CreateOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `create`. shared: its files are not locked. autoclear: removed after its last use. The others are
    those of its nodes, see `control.states.NodeOptions`.
    """

    uuid: str = ""
    read_only: bool = False
    shared: bool = False
    autoclear: bool = False
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    no_scan: bool = False


class AttachOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `attach`. on_failure, timeout, connections: "" and None for the default."""

    via: str = "auto"
    read_only: bool = False
    partscan: bool = False
    shared: bool = False
    on_failure: str = ""
    timeout: int | None = None
    connections: int | None = None


class ExportOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one `export`. listen: host and port as one word. fuse: as a file, at `path`, or in the run
    directory. vhost_user: as a socket there.
    """

    fuse: bool = False
    path: str = ""
    fuse_uring: bool = False
    allow_other: bool = False
    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    vhost_user: bool = False
    socket: str = ""
    socket_mode: int | None = None
    socket_owner: int | None = None
    socket_group: int | None = None
    listen: str = ""
    allow_remote: bool = False
    name: str = ""
    tls: str = ""
    tls_certificates: str = ""
    tls_verify_peer: bool = False
    tls_psk: str = ""
    allow_address: tuple[str, ...] = ()
    allow_user: tuple[str, ...] = ()
    allow_certificate: tuple[str, ...] = ()
    read_only_for: tuple[str, ...] = ()
    max_connections_per_peer: int = 0
    read_only: bool = False
    shared: bool = False

    @property
    def of_nbd(self) -> bool:
        """Whether an option that only NBD exports have is given."""
        tls = self.tls or self.tls_certificates or self.tls_verify_peer or self.tls_psk
        rules = (*self.allow_address, *self.allow_user, *self.allow_certificate, *self.read_only_for)
        limited = rules or self.max_connections_per_peer
        return bool(self.socket or self.listen or self.allow_remote or self.name or tls or limited)


class LoopOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `blkloom loop` notes about a device of its own; see `control.states.LoopNotes`."""

    sizelimit: int = 0
    partscan: bool = False
    partition: int = 0
    shared: bool = False


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """A device: its table and its options. fault: in the words of `blkloom fault`; "": none. attach: None where it is
    not attached; loop: None for other devices.
    """

    table: Table
    create: CreateOptions = CreateOptions()
    fault: str = ""
    attach: AttachOptions | None = None
    exports: tuple[ExportOptions, ...] = ()
    loop: LoopOptions | None = None


class _Option(NamedTuple):
    """One option. kind: "flag", "text", "number", "octal", "list" (text, repeatable), or "path" for an
    operand without a name.
    """

    field: str
    kind: str

    @property
    def word(self) -> str:
        return f"--{self.field.replace('_', '-')}"


_READ_ONLY: Final = _Option("read_only", "flag")
_SHARED: Final = _Option("shared", "flag")
_PERMISSIONS: Final = (_Option("uid", "number"), _Option("gid", "number"), _Option("mode", "octal"))
_OPTIONS: Final[dict[str, tuple[type[msgspec.Struct], tuple[_Option, ...]]]] = {
    "create": (
        CreateOptions,
        (
            _Option("uuid", "text"),
            _READ_ONLY,
            _SHARED,
            _Option("autoclear", "flag"),
            *_PERMISSIONS,
            _Option("no_scan", "flag"),
        ),
    ),
    "attach": (
        AttachOptions,
        (
            _Option("via", "text"),
            _READ_ONLY,
            _Option("partscan", "flag"),
            _SHARED,
            _Option("on_failure", "text"),
            _Option("timeout", "number"),
            _Option("connections", "number"),
        ),
    ),
    "export": (
        ExportOptions,
        (
            _Option("fuse", "flag"),
            _Option("path", "path"),
            _Option("fuse_uring", "flag"),
            _Option("allow_other", "flag"),
            *_PERMISSIONS,
            _Option("vhost_user", "flag"),
            _Option("socket", "text"),
            _Option("socket_mode", "octal"),
            _Option("socket_owner", "number"),
            _Option("socket_group", "number"),
            _Option("listen", "text"),
            _Option("allow_remote", "flag"),
            _Option("name", "text"),
            _Option("tls", "text"),
            _Option("tls_certificates", "text"),
            _Option("tls_verify_peer", "flag"),
            _Option("tls_psk", "text"),
            _Option("allow_address", "list"),
            _Option("allow_user", "list"),
            _Option("allow_certificate", "list"),
            _Option("read_only_for", "list"),
            _Option("max_connections_per_peer", "number"),
            _READ_ONLY,
            _SHARED,
        ),
    ),
    "loop": (
        LoopOptions,
        (_Option("sizelimit", "number"), _Option("partscan", "flag"), _Option("partition", "number"), _SHARED),
    ),
}
"""Commands, with the type and the options of each."""
_MOST: Final = (1 << 63) - 1
_FAULT: Final = "fault"


def parse(text: str, *, targets: Targets, source: str) -> Description:
    """The description in a text. source: for errors. Raises TableError."""
    options: dict[str, list[msgspec.Struct]] = {}
    fault = ""
    table: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        first = line[skip_blanks(line, 0, len(line)) :][:1]
        if not first.isalpha():
            table.append(line)
            continue
        table.append("")  # places in the table stay those of the file
        words, _ = split_words(line, 0, len(line), _places(source, number))
        command = words[0]
        if command.text == _FAULT and not fault:
            fault = " ".join(word.text for word in words[1:])
            if not fault:
                raise _error(command, "a fault without words", "write what `blkloom fault` prints: slow 10ms")
            continue
        if command.text not in _OPTIONS:
            what = "neither a line of a table nor of options"
            raise _error(command, what, f"options begin with {', '.join((*_OPTIONS, _FAULT))}; tables with a number")
        if command.text in options and command.text != "export":
            raise _error(command, "a second line of the same command", "write its options in one line")
        options.setdefault(command.text, []).append(_parse_options(command.text, words[1:]))
    found = parse_table("\n".join(table), targets=targets, source=source)
    return Description(
        table=found,
        create=cast("CreateOptions", next(iter(options.get("create", ())), CreateOptions())),
        fault=fault,
        attach=cast("AttachOptions | None", next(iter(options.get("attach", ())), None)),
        exports=cast("tuple[ExportOptions, ...]", tuple(options.get("export", ()))),
        loop=cast("LoopOptions | None", next(iter(options.get("loop", ())), None)),
    )


def format(description: Description, *, comments: Sequence[str] = ()) -> str:
    """The text, with comments in front: `parse(format(x)) == x`. Raises TableError for text that no line can hold."""
    lines = [f"# {comment}" for comment in comments]
    if description.create != CreateOptions():
        lines.append(_format_options("create", description.create))
    if description.fault:
        lines.append(join_words([_FAULT, *description.fault.split()], Place()))
    if description.loop is not None:
        lines.append(_format_options("loop", description.loop))
    lines += [_format_options("export", export) for export in description.exports]
    if description.attach is not None:
        lines.append(_format_options("attach", description.attach))
    return "\n".join([*lines, format_table(description.table), ""])


def _places(source: str, line: int) -> Places:
    return lambda at: Place(source, line, at + 1)


def _parse_options(command: str, words: Sequence[Word]) -> msgspec.Struct:
    kind, options = _OPTIONS[command]
    known = {option.word: option for option in options if option.kind != "path"}
    operand = next((option for option in options if option.kind == "path"), None)
    values: dict[str, Any] = {}
    pending: Iterator[Word] = iter(words)
    for word in pending:
        name, equals, value = word.text.partition("=")
        if not name.startswith("--") and operand is not None:
            option, value = operand, word.text
        elif name not in known:
            raise _error(word, f"no option of {command}", f"it has {', '.join(known)}")
        else:
            option = known[name]
            if option.kind == "flag" and equals:
                raise _error(word, "an option without a value has one", f"write {name}")
            if option.kind != "flag" and not equals:
                if (following := next(pending, None)) is None:
                    raise _error(word, "the value is missing", f"write {name} VALUE")
                word, value = following, following.text
        if option.kind == "list":
            values[option.field] = (*values.get(option.field, ()), _read(option, word, value))
            continue
        if option.field in values:
            raise _error(word, "given twice", "give it once")
        values[option.field] = _read(option, word, value)
    made = kind(**values)
    if isinstance(made, ExportOptions):
        _check_export(made, words)
    return made


def _read(option: _Option, word: Word, value: str) -> Any:
    if option.kind == "flag":
        return True
    if option.kind in {"text", "list", "path"}:
        if not value:
            raise _error(word, "an empty value", f"write {option.word} VALUE")
        return value
    try:
        number = int(value, 8 if option.kind == "octal" else 10) if value.isascii() and value.isdigit() else -1
    except ValueError:
        number = -1
    if not 0 <= number <= (0o777 if option.kind == "octal" else _MOST):
        allowed = "an octal number up to 777" if option.kind == "octal" else "a whole number"
        raise _error(word, f"{option.word} is no number", f"write {allowed}")
    return number


def _check_export(export: ExportOptions, words: Sequence[Word]) -> None:
    of_file = export.fuse_uring or export.allow_other
    of_file = of_file or any(value is not None for value in (export.uid, export.gid, export.mode))
    of_nbd = export.of_nbd
    of_socket = any(value is not None for value in (export.socket_mode, export.socket_owner, export.socket_group))
    if export.path and not (export.fuse or export.vhost_user):
        raise _error(words[0], "a path without a kind of export", "add --fuse or --vhost-user")
    if of_file and not export.fuse:
        raise _error(words[0], "these options are of a file", "add --fuse")
    if of_nbd and export.fuse:
        raise _error(words[0], "options of a file and of an NBD export", "write a line for each")
    if export.vhost_user and (of_nbd or export.fuse):
        raise _error(words[0], "options of --vhost-user and of another export", "write a line for each")
    if export.socket and export.listen:
        raise _error(words[0], "a socket and an address", "write a line for each")
    if of_socket and not (export.socket or export.vhost_user):
        raise _error(words[0], "these options are of a Unix socket", "add --socket PATH or --vhost-user")
    if not (export.fuse or export.vhost_user or export.socket or export.listen):
        cure = "add --socket PATH, --listen HOST:PORT, --fuse or --vhost-user"
        raise TableError("an export without an address", cure=cure)


def _format_options(command: str, value: msgspec.Struct) -> str:
    kind, options = _OPTIONS[command]
    defaults = kind()
    words = [command]
    for option in options:
        if (given := getattr(value, option.field)) == getattr(defaults, option.field):
            continue
        if option.kind == "list":
            words += [f"{option.word}={one}" for one in given]
            continue
        text = f"{given:o}" if option.kind == "octal" else str(given)
        words += {"flag": [option.word], "path": [text]}.get(option.kind, [f"{option.word}={text}"])
    return join_words(words, Place())


def _error(word: Word, what: str, cure: str) -> TableError:
    return TableError(what, place=word.place, value=word.text, cure=cure)
