"""`blkloom doctor`: what this machine can do for blkloom, and what to install or change for more."""

from __future__ import annotations

import json
import sys

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def doctor(as_json: bool) -> None:
    """Say what this machine and this user can do: each way to attach, kernel features, rights, limits; and what to
    install or change for more.

    \b
    yes      it works
    limited  it works, and something is missing
    no       it does not work

    Changes nothing, and needs no supervisor. The exit status is 1 if no way to attach works.
    """
    from blkloom.attach.machine import findings

    found = list(findings())
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in found], indent=2))
    else:
        width = max(len(finding.topic) for finding in found)
        for finding in found:
            click.echo(f"{finding.topic:<{width}}  {finding.state:<7}  {finding.text}")
            if finding.cure:
                click.echo(f"{'':<{width}}           {finding.cure}")
    if all(finding.state == "no" for finding in found if finding.topic.startswith("attach")):
        sys.exit(1)
