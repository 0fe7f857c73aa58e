"""The verbs: what each is for, and where it is found. Importing this imports none of them.

`blkloom ls` is to be as quick as a command can be, so a verb's module, and what it needs, is loaded when
the verb is used; help comes from the table here. Options in front of a verb of dmsetup's are taken as if
they stood behind it, as dmsetup does.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Final, NamedTuple

import click
from typing_extensions import override

from blkloom.dm.failing import VerbFailed
from blkloom.dm.options import LETTERS, LONG


class Verb(NamedTuple):
    """module: its file here. summary: for the help. dmsetup: whether dmsetup's options go with it."""

    module: str
    summary: str
    dmsetup: bool = True


SECTIONS: Final[Mapping[str, Mapping[str, Verb]]] = {
    "Serve in the foreground": {
        "serve": Verb("serve", "Serve files, memory or tables over NBD until interrupted.", dmsetup=False),
    },
    "Make and change devices": {
        "loop": Verb("loop", "Set up files as devices, as losetup does.", dmsetup=False),
        "create": Verb("create", "Make a device, from a table or empty."),
        "load": Verb("load", "Put a table into a device's inactive slot."),
        "reload": Verb("load", "The same as load."),
        "clear": Verb("load", "Empty the inactive slot."),
        "suspend": Verb("suspend", "Finish requests, flush, and let new ones wait."),
        "resume": Verb("suspend", "Swap the inactive table in and go on."),
        "rename": Verb("rename", "Give a device another name, or a uuid."),
        "message": Verb("message", "Say something to a target."),
        "remove": Verb("remove", "Remove devices that nobody uses."),
        "remove_all": Verb("remove", "Remove every device that nobody uses."),
        "wipe_table": Verb("remove", "Put an error table in: every request fails."),
    },
    "Look at devices": {
        "ls": Verb("ls", "List devices, or draw how they stand on each other."),
        "info": Verb("info", "Tell the state of devices; -c makes columns of your choice."),
        "table": Verb("table", "Print tables."),
        "status": Verb("table", "Print what the targets say of themselves."),
        "deps": Verb("deps", "Tell what devices stand on."),
        "wait": Verb("wait", "Wait for a device's next event."),
        "stats": Verb("stats", "Counters and latencies, as text, JSON or for Prometheus.", dmsetup=False),
        "top": Verb("top", "Watch devices at work.", dmsetup=False),
        "targets": Verb("targets", "List what tables are made of."),
        "target-version": Verb("targets", "Tell the versions of targets."),
        "version": Verb("version", "Tell the versions of this command and of the supervisor."),
    },
    "Ways in": {
        "export": Verb("exporting", "Let NBD clients in by another socket, port or name."),
        "unexport": Verb("exporting", "Close one way in."),
    },
    "The supervisor": {
        "supervisor": Verb("supervisor", "Run the supervisor in the foreground.", dmsetup=False),
        "upgrade": Verb("supervising", "Replace supervisor and workers while devices go on."),
        "reap": Verb("supervising", "Remove what belongs to nobody."),
        "stop": Verb("supervising", "Drain, flush and remove all devices, and end the supervisor."),
    },
    "For scripts and shells": {
        "mknodes": Verb("nodes", "Nothing to do here: sockets come and go with their devices."),
        "mangle": Verb("rename", "Nothing to do here: names are kept as they are meant."),
        "udevcreatecookie": Verb("nodes", "Nothing to wait for: there is no udev in it."),
        "udevreleasecookie": Verb("nodes", "The same."),
        "udevcomplete": Verb("nodes", "The same."),
        "udevcomplete_all": Verb("nodes", "The same."),
        "udevcookies": Verb("nodes", "The same."),
        "help": Verb("helping", "Print this help; with -c also the fields of info -c."),
        "completion": Verb("completion", "Print the completion script of a shell.", dmsetup=False),
    },
}

VERBS: Final = {name: verb for verbs in SECTIONS.values() for name, verb in verbs.items()}


class UnknownVerb(VerbFailed):
    """A word that is no verb; dmsetup's line and what to do."""

    last = ""

    def __init__(self, word: str) -> None:
        import difflib  # Only this error pays for it.

        near = difflib.get_close_matches(word, VERBS, 1)
        super().__init__(
            "Unknown command.",
            "Usage: blkloom [OPTIONS] VERB [ARGUMENTS]...",
            what=f"{word!r} is no verb; " + (f"{near[0]}?" if near else "blkloom --help lists them"),
        )


class Verbs(click.Group):
    """A group that knows its verbs by the table above."""

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    @override
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if (verb := VERBS.get(cmd_name)) is None:
            return None
        command = getattr(import_module(f"blkloom.cli.{verb.module}"), cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command), "a verb's module has a command of the verb's name"
        gc.freeze()
        gc.enable()
        return command

    @override
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not ctx.resilient_parsing:
            raise UnknownVerb(args[0])
        return super().resolve_command(ctx, args)

    @override
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if ctx.resilient_parsing else verb_first(args, self._own(ctx)))

    @override
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, verbs in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, verb.summary) for name, verb in verbs.items()])

    def _own(self, ctx: click.Context) -> dict[str, bool]:
        """Options of the group itself, and whether they take a value."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        return {name: not (o.is_flag or o.count) for o in options for name in o.opts}


def verb_first(arguments: Sequence[str], own: Mapping[str, bool]) -> list[str]:
    """The command line with dmsetup's options moved behind a verb of dmsetup's.

    own: options of the group, which stay in front. Without such a verb nothing is moved.
    """
    front: list[str] = []
    moved: list[str] = []
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] not in ("-", "--"):
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        takes_value = own.get(name)
        behind = name == "-v" or (takes_value is None and _of_dmsetup(name))
        (moved if behind else front).append(word)
        if takes_value if takes_value is not None else _wants_value(word, bool(equals)):
            (moved if behind else front).extend(rest[:1] if not equals else [])
            rest = rest[1:] if not equals else rest
    if not rest or rest[0] not in VERBS or not VERBS[rest[0]].dmsetup:
        return list(arguments)
    return [*front, rest[0], *moved, *rest[1:]]


def _of_dmsetup(name: str) -> bool:
    if name.startswith("--"):
        return any(long.startswith(name[2:]) for long in LONG)
    return name[1] in LETTERS


def _wants_value(word: str, equals: bool) -> bool:
    """Whether an option of dmsetup's has its value in the next word."""
    if word.startswith("--"):
        if equals:
            return False
        if word[2:] in LONG:
            return LONG[word[2:]]
        matches = [long for long in LONG if long.startswith(word[2:])]
        return len(matches) == 1 and LONG[matches[0]]
    for at, letter in enumerate(word[1:], 2):
        if LONG.get(LETTERS.get(letter, ""), False):
            return at == len(word)
    return False
