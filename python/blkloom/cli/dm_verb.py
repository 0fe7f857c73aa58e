"""Command-line parser for the verbs of dmsetup: accepts the same options and operands as dmsetup.

Every verb accepts and ignores dmsetup's options that have no meaning here (`IGNORED`). Options that the verb does not
use are refused: if a selector were ignored, the verb would act on every device. A verb is a function of its `Session`,
its operands and its own options.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Set
from typing import Any, Final, TypeAlias

import click
from click.shell_completion import CompletionItem
from typing_extensions import override

from blkloom.cli.completing import complete_devices
from blkloom.cli.session import NAMING, Session
from blkloom.device_names import Mangling
from blkloom.dm.failing import NotACommandLine, Told, WrongCount
from blkloom.dm.options import IGNORED, LETTERS, LONG, read_words
from blkloom.errors import BlkloomError

_SHARED: Final = frozenset({"manglename", "verbose"})
"""Options of every verb; `Session` reads them."""
ONE: Final = frozenset({"uuid", "major", "minor"})
"""Selector options of a verb for one device; `Session` reads them."""
MANY: Final = ONE | {"select"}
"""Selector options of a verb for several devices; `Session` reads them."""

Completer: TypeAlias = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
"""Completes a word for a shell."""


class DmCommand(click.Command):
    """A verb. operands: least and greatest number of operands; None: no limit. selectors: options that select its
    devices.
    """

    def __init__(
        self,
        *args: Any,
        operands: tuple[int, int | None] = (0, None),
        selectors: frozenset[str] = frozenset(),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._least, self._most = operands
        self._selectors = selectors
        self._known = _SHARED | IGNORED | selectors
        taken = {name for param in self.params for name in param.opts}
        letters = {long: letter for letter, long in reversed(LETTERS.items())}
        for long, takes_value in LONG.items():
            if f"--{long}" in taken or long not in self._known:
                continue
            names = [f"--{long}", *([f"-{letters[long]}"] if long in letters else [])]
            shared = long not in IGNORED
            option = click.Option(
                names,
                expose_value=False,
                hidden=not shared or long in ("select",),
                help=_HELP.get(long),
                metavar=_METAVARS.get(long),
                callback=_store if shared else None,
                **({} if takes_value else {"count": True}),
            )
            self.params.append(option)

    @override
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        own = {
            name[2:]: not (param.is_flag or param.count)
            for param in self.get_params(ctx)
            if isinstance(param, click.Option)
            for name in param.opts
            if name.startswith("--")
        }
        own_letters = {
            opt[1]: next(name[2:] for name in param.opts if name.startswith("--"))
            for param in self.params
            for opt in param.opts
            if len(opt) == 2 and opt[1] not in LETTERS
        }
        words = read_words(args, own, own_letters)
        if "--help" in words.options:
            return super().parse_args(ctx, ["--help"])
        names = {option[2:].partition("=")[0] for option in words.options}
        _check(names, self._selectors)
        if useless := sorted(name for name in names if name not in own and name not in self._known):
            raise NotACommandLine(
                f"{ctx.info_name} does not take --{useless[0]}.",
                what=f"`blkloom {ctx.info_name} --help` lists its options",
            )
        if len(words.operands) < self._least or (self._most is not None and len(words.operands) > self._most):
            raise WrongCount(self.get_usage(ctx))
        try:
            rest = super().parse_args(ctx, [*words.options, "--", *words.operands])
        except click.UsageError as error:
            raise NotACommandLine(error.format_message()) from error
        _numbers(ctx)
        return rest

    @override
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (BlkloomError, OSError) as error:
            raise Told(error) from error


def verb(
    *operands: str,
    least: int = 0,
    most: int | None = None,
    complete: Completer | None = complete_devices,
    name: str | None = None,
    selectors: frozenset[str] = frozenset(),
) -> Callable[[Callable[..., None]], click.Command]:
    """Decorator: makes a verb from a function (session, operands, options...). operands: their text in the help.
    complete: completes the operands for shells, None: nothing does. selectors: ONE, MANY, or none.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(operands: tuple[str, ...], **options: Any) -> None:
            function(Session(click.get_current_context()), operands, **options)

        command = click.command(name, cls=DmCommand, operands=(least, most), selectors=selectors)(run)
        if operands or most != 0:
            argument = click.Argument(
                ["operands"],
                nargs=-1,
                metavar=" ".join(operands),
                shell_complete=complete,
            )
            command.params.insert(0, argument)
        else:
            command.params.insert(0, click.Argument(["operands"], nargs=-1, metavar=""))
        return command

    return decorate


_HELP: Final = {
    "uuid": "The device with this uuid.",
    "major": "Select the device by number, with -m (the major number is 0).",
    "minor": "Select the device by number, with -j.",
    "manglename": "How names are read and shown: auto, hex or none.",
    "verbose": "Also print the state of the device.",
    "select": "Only devices that match the selection, as in -S 'open>0'.",
}
_METAVARS: Final = {
    "uuid": "UUID",
    "major": "N",
    "minor": "N",
    "manglename": "MODE",
    "select": "SELECTION",
}


def _store(context: click.Context, param: click.Parameter, value: Any) -> Any:
    if value is not None and not context.resilient_parsing:
        if param.name == "manglename":
            try:
                value = Mangling(value.lower())
            except ValueError:
                raise NotACommandLine("Unknown name mangling mode.", what="auto, hex or none") from None
        context.meta.setdefault(NAMING, {})[param.name] = value
    return value


def _numbers(context: click.Context) -> None:
    given = context.meta.get(NAMING, {})
    if "minor" in given:
        given["numbers"] = (_integer(given["major"]), _integer(given["minor"]))


def _integer(text: str) -> int:
    """Parses a number like atoi: text without a number is 0. A number that is too large stays too large: with atoi it
    would wrap around to the number of another device.
    """
    begin = re.match(r"\s*([+-]?[0-9]{1,4000})", text, re.ASCII)  # int refuses more digits
    return int(begin[1]) if begin else 0


def _check(names: Set[str], selectors: frozenset[str]) -> None:
    """Refuses the options that dmsetup refuses for every verb, and two selectors for the same device."""
    if ("major" in names) != ("minor" in names):
        raise NotACommandLine(
            "Please specify both major number and minor number.", what="the major number is 0: -j 0 -m N"
        )
    if {"uuid", "minor"} <= names & selectors:
        raise NotACommandLine("-u names a device, and so do -j and -m.", what="name it in one way")
    if {"table", "notable"} <= names:
        raise NotACommandLine("--table and --notable are incompatible.")
    if {"addnodeonresume", "addnodeoncreate"} <= names:
        raise NotACommandLine("--addnodeonresume and --addnodeoncreate are incompatible.")
