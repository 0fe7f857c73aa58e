"""`blkloom supervisor`: runs the supervisor in the foreground."""

from __future__ import annotations

from typing import Any

import click

from blkloom.cli.session import RUN_DIR
from blkloom.supervisor.command import supervisor as _process


@click.pass_context
def _run(context: click.Context, /, run_dir: str | None, **options: Any) -> None:
    assert _process.callback is not None, "it is a function's command"
    _process.callback(run_dir=run_dir or context.meta.get(RUN_DIR), **options)


supervisor = click.Command("supervisor", callback=_run, params=_process.params, help=_process.help)
