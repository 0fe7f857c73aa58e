"""Declarations of target arguments, and the parser, printer, syntax line and completion derived from them.

A target spec declares its arguments in `arguments`, in their order: required arguments, then optional ones, then the
options (`<#opts> <opts...>`). Each argument sets a field of the spec. An omitted argument leaves the field at its
default.

    arguments = (word("path"), options(flag("read_only"), size("cache")))

Pure; any thread. May fail: TableError, with the word and the allowed values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from blkloom.table.arguments import Arguments, decimal
from blkloom.units import DEVICE_LIMIT, Bytes, parse_size

if TYPE_CHECKING:
    from blkloom.targets.spec import TargetSpec

_LARGEST: Final = Bytes(1 << 40)


class Argument(NamedTuple):
    """One or more words of a table line. syntax: their form in the syntax line. fields: the fields that they set. read:
    takes the words and returns a value for each field (raises TableError). write: returns the words of these values.
    optional: it may be omitted, together with all later arguments, if the fields are at their defaults. is_path: the
    first word is the path of a file.
    """

    syntax: str
    fields: tuple[str, ...]
    read: Callable[[Arguments], Sequence[Any]]
    write: Callable[..., Sequence[str]]
    optional: bool = False
    is_path: bool = False

    def parse(self, arguments: Arguments) -> dict[str, Any]:
        """Reads the words; returns the values by field."""
        return dict(zip(self.fields, self.read(arguments), strict=True))

    def format(self, spec: TargetSpec) -> Sequence[str]:
        """The words of the spec's fields."""
        return self.write(*[getattr(spec, field) for field in self.fields])

    def is_default(self, spec: TargetSpec) -> bool:
        """Whether the argument can be omitted: it is optional, and its fields are at their defaults."""
        if not self.optional:
            return False
        defaults = _defaults(spec)
        return all(getattr(spec, field) == defaults[field] for field in self.fields)


class Option(NamedTuple):
    """An option of a target. word: its name in tables. field: of the spec. value: the part after `=` in the syntax
    line, "" for a flag. read: converts the text after `=` to the field's value (or raises ValueError). write: converts
    it back. many: it may be given more than once, and the field is a tuple.
    """

    word: str
    field: str
    value: str
    read: Callable[[str], object]
    write: Callable[[Any], str] = str
    many: bool = False

    @property
    def syntax(self) -> str:
        """The option in the syntax line."""
        return f"[{self.word}{self.value and f'={self.value}'}]{'...' if self.many else ''}"

    @property
    def words(self) -> tuple[str, ...]:
        """The word for completion, up to the value."""
        return (f"{self.word}{self.value and '='}",)


class Words(NamedTuple):
    """Options that exclude each other. The field is the given word, or "" for none. syntax: all of them in the syntax
    line.
    """

    field: str
    words: tuple[str, ...]
    syntax: str


class Options(NamedTuple):
    """The options at the end of a line: `<#opts> <opts...>`. options: in the order in which they are printed."""

    options: tuple[Option | Words, ...]
    optional: bool = True
    is_path: bool = False

    @property
    def syntax(self) -> str:
        """All options in the syntax line."""
        return f"<#opts> {' '.join(option.syntax for option in self.options)}"

    def parse(self, arguments: Arguments) -> dict[str, Any]:
        """Reads the rest of the line; returns the values by field. Raises TableError for a wrong count, an unknown
        option, a wrong value, an option given twice or options that exclude each other.
        """
        found: dict[str, Any] = {}
        for word in arguments.options():
            option = self._option_of(word)
            if option is None:
                known = ", ".join(word for option in self.options for word in option.words)
                raise arguments.error("unknown option", value=word, cure=f"options are: {known}")
            if isinstance(option, Words):
                _check_alone(arguments, found.get(option.field, ""), word)
                found[option.field] = word
                continue
            if option.field in found and not option.many:
                raise arguments.error("option given twice", value=word, cure="give it once")
            try:
                read = option.read(word.partition("=")[2])
            except ValueError as error:
                raise arguments.error(f"Invalid {option.word}: {error}", value=word) from error
            found[option.field] = (*found.get(option.field, ()), read) if option.many else read
        return found

    def format(self, spec: TargetSpec) -> Sequence[str]:
        """The number of options that are not at their defaults, and their words."""
        defaults = _defaults(spec)
        words: list[str] = []
        for option in self.options:
            value = getattr(spec, option.field)
            if value == defaults[option.field]:
                continue
            if isinstance(option, Words):
                words.append(value)
            else:
                values = value if option.many else (value,)
                words += (f"{option.word}={option.write(one)}" if option.value else option.word for one in values)
        return [str(len(words)), *words]

    def is_default(self, spec: TargetSpec) -> bool:
        """Whether all options are at their defaults."""
        defaults = _defaults(spec)
        return all(getattr(spec, option.field) == defaults[option.field] for option in self.options)

    def _option_of(self, word: str) -> Option | Words | None:
        name, equals, _ = word.partition("=")
        for option in self.options:
            if isinstance(option, Words):
                if word in option.words:
                    return option
            elif option.word == name and bool(option.value) == bool(equals):
                return option
        return None


Syntax: TypeAlias = tuple[Argument | Options, ...]
"""The arguments of one target, in the order of the words."""


# Kinds of arguments


def argument(
    field: str,
    syntax: str,
    read: Callable[[Arguments], Any],
    write: Callable[[Any], str] = str,
    *,
    optional: bool = False,
) -> Argument:
    """An argument of one word. read: takes it from `Arguments`, and may raise TableError."""
    return Argument(
        syntax, (field,), lambda arguments: (read(arguments),), lambda value: (write(value),), optional=optional
    )


def word(field: str, *, is_path: bool = False) -> Argument:
    """`<field>`, any word."""
    return argument(field, f"<{field}>", lambda arguments: arguments.word(field))._replace(is_path=is_path)


def integer(field: str, *, least: int = 0, most: int = DEVICE_LIMIT - 1) -> Argument:
    """`<field>`, a whole number."""
    return argument(field, f"<{field}>", lambda arguments: arguments.integer(field, least=least, most=most))


def words(field: str, name: str = "word") -> Argument:
    """`[<word>...]`, all words of the line; the field is a tuple, by default an empty one."""

    def read(arguments: Arguments) -> tuple[tuple[str, ...]]:
        return (tuple(arguments.word(name) for _ in range(arguments.remaining)),)

    return Argument(f"<{name}>...", (field,), read, lambda value: value, optional=True)


# Kinds of options


def options(*each: Option | Words) -> Options:
    """`[<#opts> <opts...>]`."""
    return Options(each)


def flag(word: str) -> Option:
    """Without a value: the field is True."""
    return Option(word, word, "", lambda _value: True, lambda _value: "")


def choice(word: str, *values: str, field: str = "") -> Option:
    """`<word>=<one of the values>`."""

    def read(value: str) -> str:
        if value not in values:
            raise ValueError(f"must be {' or '.join(values)}")
        return value

    return Option(word, field or word, "|".join(values), read)


def switch(word: str) -> Option:
    """`<word>=off`, for a setting that is on by default."""
    on_or_off = choice(word, "on", "off").read
    return Option(word, word, "off", lambda value: on_or_off(value) == "on", lambda on: "on" if on else "off")


def size(word: str) -> Option:
    """`<word>=<size>`, bytes with an optional suffix."""

    def read(value: str) -> Bytes:
        if (found := parse_size(value)) > _LARGEST:
            raise ValueError(f"{found} bytes are more than any machine has; {_LARGEST} are most")
        return found

    return Option(word, word, "<size>", read)


def number(
    word: str, value: str = "<number>", *, least: int = 0, most: int = DEVICE_LIMIT - 1, among: Sequence[int] = ()
) -> Option:
    """`<word>=<value>`, a whole number from `least` to `most`, or one of `among`."""

    def read(text: str) -> int:
        found = decimal(text)
        if among and found not in among:
            raise ValueError(f"must be {', '.join(map(str, among[:-1]))} or {among[-1]}")
        if found is None or not least <= found <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return found

    return Option(word, word, value, read)


def text(word: str, value: str, *, check: Callable[[str], str] = str, many: bool = False) -> Option:
    """`<word>=<value>`, any text that is not empty. check: returns it, or raises ValueError."""

    def read(found: str) -> str:
        if not found:
            raise ValueError("nothing behind the =")
        return check(found)

    return Option(word, word, value, read, many=many)


# What the list gives


def syntax_line(syntax: Syntax) -> str:
    """The arguments in the form of the documentation: `<path> [<offset> [<#opts> [read_only]]]`."""
    parts = [f"[{item.syntax}" if item.optional else item.syntax for item in syntax]
    return " ".join(parts) + "]" * sum(item.optional for item in syntax)


def parse_arguments(arguments: Arguments, syntax: Syntax) -> dict[str, Any]:
    """Parses the words of a line; returns the values by field. Raises TableError."""
    found: dict[str, Any] = {}
    for item in syntax:
        if item.optional and not arguments.remaining:
            break
        found.update(item.parse(arguments))
    arguments.finish()
    return found


def format_arguments(spec: TargetSpec, syntax: Syntax) -> list[str]:
    """The words of the fields of `spec`: `parse_arguments` reads them back."""
    found: list[str] = []
    for item in reversed(syntax):
        if found or not item.is_default(spec):
            found[:0] = item.format(spec)
    return found


def next_words(syntax: Syntax, given: Sequence[str]) -> tuple[list[str], bool]:
    """Completion after the words `given`: the possible options, and whether a path is possible."""
    at = 0
    for item in syntax:
        if isinstance(item, Options):
            return _next_options(item, given[at:]), False
        if at == len(given):
            return [], item.is_path
        at += item.syntax.count("<")
    return [], False


def _next_options(options: Options, given: Sequence[str]) -> list[str]:
    """Options that can still be given; none before their count is given."""
    if not given:
        return []
    known = [option for option in options.options if not _excluded(option, given[1:])]
    return [word for option in known for word in option.words]


def _excluded(option: Option | Words, given: Sequence[str]) -> bool:
    many = isinstance(option, Option) and option.many
    return not many and any(
        one.startswith(word) if word.endswith("=") else one == word for one in given for word in option.words
    )


def _defaults(spec: TargetSpec) -> dict[str, Any]:
    """The default values of the spec's fields, by name."""
    kind = type(spec)
    return dict(zip(reversed(kind.__struct_fields__), reversed(kind.__struct_defaults__), strict=False))


def _check_alone(arguments: Arguments, former: str, word: str) -> None:
    """Refuses `word` if an option that excludes it was given."""
    if former == word:
        raise arguments.error("option given twice", value=word, cure="give it once")
    if former:
        raise arguments.error("options exclude each other", value=f"{former} and {word}", cure="give one of them")
