"""`blkloom version`: which one this is, and which one holds the devices."""

from __future__ import annotations

import click

from blkloom.cli.dm_verb import verb
from blkloom.cli.session import Session
from blkloom.version import VERSION


@verb(most=0)
@click.option("--json", "as_json", is_flag=True, help="With the supervisor's limits and counts, as JSON.")
def version(session: Session, operands: tuple[str, ...], as_json: bool) -> None:
    """Tell the versions of this command ("library") and of the supervisor ("driver")."""
    told = session.client.version()
    if as_json:
        import json

        click.echo(json.dumps({"command": VERSION, **told}, indent=2))
        return
    click.echo(f"Library version:   {VERSION}")
    click.echo(f"Driver version:    {told['version']}")
