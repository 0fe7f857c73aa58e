"""`blkloom version`: prints the versions of this command and of the supervisor."""

from __future__ import annotations

import click

from blkloom.cli.dm_verb import verb
from blkloom.cli.session import Session
from blkloom.version import VERSION


@verb(most=0)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with limits and counts of the supervisor.")
def version(session: Session, operands: tuple[str, ...], as_json: bool) -> None:
    """Print the versions of this command ("library") and of the supervisor ("driver")."""
    told = session.client.version()
    if as_json:
        import json

        click.echo(json.dumps({"command": VERSION, **told}, indent=2))
        return
    click.echo(f"Library version:   {VERSION}")
    click.echo(f"Driver version:    {told['version']}")
