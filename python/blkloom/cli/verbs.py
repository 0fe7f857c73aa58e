"""The table of verbs: a summary and a module for each. Importing this module imports no verb.

The module of a verb and its dependencies are loaded when the verb is used, so that `blkloom ls` starts fast; the help
is made from this table. As in dmsetup, options may also come before the verb.
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
    """A verb. module: in this package. summary: for the help. dmsetup: whether it takes dmsetup's options."""

    module: str
    summary: str
    dmsetup: bool = True


SECTIONS: Final[Mapping[str, Mapping[str, Verb]]] = {
    "Serve in the foreground": {
        "serve": Verb("serve", "Serve files, memory or tables over NBD until interrupted.", dmsetup=False),
    },
    "Copy": {
        "copy": Verb("copying", "Copy a file, block device, image, device or NBD export.", dmsetup=False),
    },
    "Make and change devices": {
        "loop": Verb("loop", "Set up files as devices, as losetup does.", dmsetup=False),
        "create": Verb("create", "Make a device, with a table or without one."),
        "load": Verb("load", "Load a table into the inactive slot of a device."),
        "reload": Verb("load", "The same as load."),
        "clear": Verb("load", "Empty the inactive slot."),
        "suspend": Verb("suspend", "Finish requests and flush; new requests wait."),
        "resume": Verb("suspend", "Make the inactive table active and continue I/O."),
        "rename": Verb("rename", "Change the name of a device, or set its uuid."),
        "message": Verb("message", "Say something to a target."),
        "fault": Verb("faulting", "Make a device failing, slow, throttled or read-only, and well again."),
        "snapshot": Verb("snapshotting", "Make, list, merge and delete writable snapshots of a live device."),
        "replay": Verb("replay", "Write what a log of writes has to a device, and check it on the way.", dmsetup=False),
        "remove": Verb("remove", "Remove devices that are not in use."),
        "remove_all": Verb("remove", "Remove every device that is not in use."),
        "wipe_table": Verb("remove", "Load an error table: every request fails."),
    },
    "Look at devices": {
        "ls": Verb("ls", "List devices, or print them as a tree."),
        "info": Verb("info", "Print the state of devices; -c selects columns."),
        "table": Verb("table", "Print tables."),
        "status": Verb("table", "Print the status of targets."),
        "deps": Verb("deps", "List the devices and files below devices."),
        "wait": Verb("wait", "Wait for the next event of a device."),
        "stats": Verb("stats", "Print counters and latencies, as text, JSON or for Prometheus.", dmsetup=False),
        "top": Verb("top", "Watch devices at work.", dmsetup=False),
        "targets": Verb("targets", "List the targets for tables."),
        "target-version": Verb("targets", "Print the versions of targets."),
        "version": Verb("version", "Print the versions of this command and of the supervisor."),
        "doctor": Verb("doctor", "Say what this machine can do, and what to change for more.", dmsetup=False),
    },
    "Ways in": {
        "export": Verb("exporting", "Add an NBD export, or a file."),
        "unexport": Verb("exporting", "Remove an export."),
        "attach": Verb("attaching", "Make a node of a device: a block device, or a file."),
        "detach": Verb("attaching", "Remove the nodes of devices."),
        "partitions": Verb("partitioning", "Print partitions of a device, or make them nodes or devices."),
    },
    "The supervisor": {
        "supervisor": Verb("supervisor", "Run the supervisor in the foreground.", dmsetup=False),
        "upgrade": Verb("supervising", "Replace supervisor and workers while devices stay in use."),
        "reap": Verb("supervising", "Remove stale sockets and state files."),
        "save": Verb("saving", "Write devices to files, for the next boot."),
        "restore": Verb("saving", "Make the devices that files describe."),
        "stop": Verb("supervising", "Drain, flush and remove all devices, and end the supervisor."),
    },
    "For scripts and shells": {
        "mknodes": Verb("nodes", "Make the stable names of attached devices again."),
        "mangle": Verb("rename", "Do nothing: names are stored unmangled."),
        "udevcreatecookie": Verb("nodes", "Do nothing: there is no udev to wait for."),
        "udevreleasecookie": Verb("nodes", "The same."),
        "udevcomplete": Verb("nodes", "The same."),
        "udevcomplete_all": Verb("nodes", "The same."),
        "udevcookies": Verb("nodes", "The same."),
        "help": Verb("helping", "Print this help; with -c also the fields of info -c."),
        "completion": Verb("completion", "Print the completion script of a shell.", dmsetup=False),
    },
}

VERBS: Final = {name: verb for verbs in SECTIONS.values() for name, verb in verbs.items()}


_OFTEN_USED: Final = [name for name, verb in VERBS.items() if verb.module != "nodes"]
"""Names to suggest for a mistyped verb."""
_ALSO_CALLED: Final = {
    "delete": "remove", "del": "remove", "rm": "remove", "destroy": "remove",
    "list": "ls", "show": "info", "add": "create", "new": "create", "start": "create",
    "losetup": "loop", "mount": "attach", "map": "attach", "connect": "export", "kill": "stop", "shutdown": "stop",
    "convert": "copy", "cp": "copy", "dd": "copy", "clone": "copy",
}  # fmt: skip
"""Names of verbs in other tools."""


class UnknownVerb(VerbFailed):
    """The error for an unknown verb: dmsetup's line and advice."""

    last = ""

    def __init__(self, word: str) -> None:
        import difflib  # imported only for this error

        near = [_ALSO_CALLED[word]] if word in _ALSO_CALLED else difflib.get_close_matches(word, _OFTEN_USED, 1)
        super().__init__(
            "Unknown command.",
            "Usage: blkloom [OPTIONS] VERB [ARGUMENTS]...",
            what=f"'{word}' is no verb; " + (f"{near[0]}?" if near else "blkloom --help lists them"),
        )


class Verbs(click.Group):
    """A click group that finds its verbs in the table above."""

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
    """Moves dmsetup's options from before a dmsetup verb to after it.

    own: options of the group, which stay in front. Without a dmsetup verb nothing is moved.
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
    """Whether the value of a dmsetup option is the next argument."""
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
