"""`blkloom targets`, `target-version`: lists the installed targets and their versions."""

from __future__ import annotations

import json

import click

from blkloom.cli.dm_verb import verb
from blkloom.cli.session import Session
from blkloom.cli.table_completion import complete_targets
from blkloom.dm.failing import IoctlFailed
from blkloom.errors import UnknownTarget
from blkloom.targets.registry import all_targets
from blkloom.targets.spec import TargetSpec
from blkloom.version import VERSION


@verb(most=0)
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
def targets(session: Session, operands: tuple[str, ...], as_json: bool) -> None:
    """List the targets for tables, built-in and installed ones; with -v also their arguments."""
    classes = sorted(all_targets(), key=lambda target: target.name)
    if as_json:
        listed = [{"name": t.name, "syntax": t.syntax, "summary": t.summary, "singleton": t.singleton} for t in classes]
        click.echo(json.dumps(listed, indent=2))
    elif session.verbose:
        _explain(classes)
    else:
        for target in classes:
            click.echo(_line(target))


@verb("TARGET...", least=1, complete=complete_targets, name="target-version")
def target_version(session: Session, operands: tuple[str, ...]) -> None:
    """Print the versions of targets; built-in targets have the version of blkloom."""
    for name in operands:
        try:
            click.echo(_line(all_targets().find(name)))
        except UnknownTarget as error:
            raise IoctlFailed("target-version", error.errno or 0, name=name, what=f"{error.what}: '{name}'") from error


def _line(target: type[TargetSpec]) -> str:
    """Name and version in the form of dmsetup."""
    return f"{target.name:<16} v{VERSION}"


def _explain(classes: list[type[TargetSpec]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("target", "arguments", "what it is"):
        table.add_column(heading, overflow="fold")
    for target in classes:
        only = " (the only line of its table)" if target.singleton else ""
        table.add_row(target.name, target.syntax.replace("[", "\\["), target.summary + only)
    Console(highlight=False).print(table)
