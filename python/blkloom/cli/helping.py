"""`blkloom help`."""

from __future__ import annotations

import click

from blkloom.cli.completing import complete_verbs
from blkloom.cli.dm_verb import verb
from blkloom.cli.session import Session
from blkloom.dm.report import list_fields


@verb("[VERB]", most=1, complete=complete_verbs)
@click.option("-c", "-C", "--columns", is_flag=True, help="The fields of info -c too.")
def help(session: Session, operands: tuple[str, ...], columns: bool) -> None:
    """Print the help of the command, or of a verb."""
    root = click.get_current_context().find_root()
    assert isinstance(root.command, click.Group)
    if operands:
        _, command, _ = root.command.resolve_command(root, list(operands))
        assert command is not None, "an unknown verb is an error"
        click.echo(command.get_help(click.Context(command, info_name=operands[0], parent=root)))
        return
    click.echo(root.get_help())
    if columns:
        click.echo("\n".join(["", *list_fields()]))
