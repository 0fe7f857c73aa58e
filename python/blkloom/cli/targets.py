"""`blkloom targets`: what a table may name, as installed here."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

from blkloom.target.registry import all_targets


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
def targets(as_json: bool) -> None:
    """List the targets tables are made of, built in and installed."""
    classes = sorted(all_targets(), key=lambda target: target.name)
    if as_json:
        listed = [{"name": t.name, "syntax": t.syntax, "summary": t.summary, "singleton": t.singleton} for t in classes]
        click.echo(json.dumps(listed, indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("target", "arguments", "what it is"):
        table.add_column(heading, overflow="fold")
    for target in classes:
        only = " (the only line of its table)" if target.singleton else ""
        table.add_row(target.name, target.syntax.replace("[", "\\["), target.summary + only)
    Console(highlight=False).print(table)
