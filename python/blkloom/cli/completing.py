"""What a shell may put where a device is named."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from blkloom.dm.names import Mangling, show_name
from blkloom.errors import BlkloomError


def complete_devices(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of devices; none where there is no supervisor: a shell's Tab must not start one."""
    from blkloom.cli.connecting import connect
    from blkloom.cli.session import RUN_DIR

    try:
        with connect(context.find_root().params.get("run_dir") or context.meta.get(RUN_DIR), start=False) as client:
            names = [show_name(info.name, Mangling.NONE) for info in client.info()]
    except (BlkloomError, OSError):
        return []  # A shell has no place for our errors.
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
