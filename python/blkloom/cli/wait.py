"""`blkloom wait`: waits for the next event of a device."""

from __future__ import annotations

import errno

import click

from blkloom.cli.dm_verb import ONE, verb
from blkloom.cli.session import Session
from blkloom.dm.failing import IoctlFailed, VerbFailed


@verb("DEVICE", "[EVENT_NUMBER]", most=2, selectors=ONE)
@click.option("--noflush", is_flag=True, help="Accepted and ignored: wait does not flush.")
def wait(session: Session, operands: tuple[str, ...], noflush: bool) -> None:
    """Wait until the device's event number is another than EVENT_NUMBER (0, if not given).

    The number increases when the device is renamed or removed, when its size changes, when it fails, and
    when a target reports an event. `info` prints the number; with -v this command does too.

    \b
    blkloom wait disk "$(blkloom info -c --noheadings -o events disk)"
    """
    if not operands and not session.elsewhere:
        raise VerbFailed("No device specified.")
    named = session.named(None if session.elsewhere else operands[0])
    words = operands if session.elsewhere else operands[1:]
    event = int(words[-1]) if words and words[-1].isascii() and words[-1].isdigit() else 0
    if session.info(named, "waitevent").event == event:
        try:
            with session.ioctl(named, "waitevent"):
                session.client.wait(named.wire, event)
        except IoctlFailed as error:
            if error.errno != errno.ENXIO:
                raise
            return  # The removal is the event.
    session.tell(named)
