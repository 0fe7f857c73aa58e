"""`blkloom targets`, `target-version`: what a table may name, as installed here."""

from __future__ import annotations

import json

import click

from blkloom.cli.dm_verb import verb
from blkloom.cli.session import Session
from blkloom.dm.failing import IoctlFailed
from blkloom.errors import UnknownTarget
from blkloom.target.base import Target
from blkloom.target.registry import all_targets
from blkloom.version import VERSION


@verb(most=0)
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
def targets(session: Session, operands: tuple[str, ...], as_json: bool) -> None:
    """List the targets tables are made of, built in and installed; with -v their arguments too."""
    classes = sorted(all_targets(), key=lambda target: target.name)
    if as_json:
        listed = [{"name": t.name, "syntax": t.syntax, "summary": t.summary, "singleton": t.singleton} for t in classes]
        click.echo(json.dumps(listed, indent=2))
    elif session.verbose:
        _explain(classes)
    else:
        for target in classes:
            click.echo(_line(target))


@verb("TARGET...", least=1, complete=False, name="target-version")
def target_version(session: Session, operands: tuple[str, ...]) -> None:
    """Tell the versions of targets; a built-in one's is blkloom's."""
    for name in operands:
        try:
            click.echo(_line(all_targets().find(name)))
        except UnknownTarget as error:
            raise IoctlFailed("target-version", error.errno or 0, name=name, what=f"{error.what}: {name!r}") from error


def _line(target: type[Target]) -> str:
    """dmsetup's: name and version."""
    return f"{target.name:<16} v{VERSION}"


def _explain(classes: list[type[Target]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("target", "arguments", "what it is"):
        table.add_column(heading, overflow="fold")
    for target in classes:
        only = " (the only line of its table)" if target.singleton else ""
        table.add_row(target.name, target.syntax.replace("[", "\\["), target.summary + only)
    Console(highlight=False).print(table)
