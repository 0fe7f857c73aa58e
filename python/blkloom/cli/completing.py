"""Shell completion of the names of devices and verbs."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from blkloom.device_names import STACKED, Mangling, show_name
from blkloom.errors import BlkloomError


def complete_devices(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the devices. Empty if no supervisor runs: completion must not start one."""
    from blkloom.cli.connecting import connect
    from blkloom.cli.session import RUN_DIR

    try:
        with connect(context.find_root().params.get("run_dir") or context.meta.get(RUN_DIR), start=False) as client:
            names = [show_name(info.name, Mangling.NONE) for info in client.info()]
    except (BlkloomError, OSError):
        return []  # A shell cannot show errors during completion.
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_copied(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the devices with their prefix, and files."""
    devices = complete_devices(context, parameter, "") if "/" not in incomplete else []
    names = [STACKED + item.value for item in devices]
    found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return [*found, CompletionItem(incomplete, type="file")]


def complete_verbs(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the verbs."""
    root = context.find_root()
    assert isinstance(root.command, click.Group), "blkloom is a group of verbs"
    return [CompletionItem(name) for name in root.command.list_commands(root) if name.startswith(incomplete)]
