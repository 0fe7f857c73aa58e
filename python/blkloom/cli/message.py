"""`blkloom message`: sends a message to a target."""

from __future__ import annotations

import click

from blkloom.cli.dm_verb import ONE, verb
from blkloom.cli.session import Session
from blkloom.dm.failing import VerbFailed


@verb("DEVICE", "SECTOR", "MESSAGE...", least=2, selectors=ONE)
def message(session: Session, operands: tuple[str, ...]) -> None:
    """Send a message to the target of the segment that holds SECTOR, and print its answer.

    Messages that begin with @ go to the device itself.

    \b
    blkloom message disk 0 @cancel_deferred_remove   keep a device that `remove --deferred` marked
    """
    named = session.named(None if session.elsewhere else operands[0])
    words = operands if session.elsewhere else operands[1:]
    if not (words[0].isascii() and words[0].isdigit()) or int(words[0]) >= 1 << 64:
        raise VerbFailed("Invalid sector.", what=f"'{words[0]}': a whole number of sectors")
    if len(words) < 2:
        raise VerbFailed("No message supplied.")
    with session.ioctl(named, "message"):
        answer = session.client.message(named.wire, int(words[0]), " ".join(words[1:]))
    if answer is not None:
        click.echo(answer, nl=not answer.endswith("\n"))
