"""`blkloom completion`: completion scripts for shells."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    bash:  eval "$(blkloom completion bash)"              in ~/.bashrc
    zsh:   eval "$(blkloom completion zsh)"               in ~/.zshrc
    fish:  blkloom completion fish > ~/.config/fish/completions/blkloom.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, "the choices are those click has"
    click.echo(kind(context.find_root().command, {}, "blkloom", "_BLKLOOM_COMPLETE").source())
