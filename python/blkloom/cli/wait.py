"""`blkloom wait`: until something happens to a device."""

from __future__ import annotations

import errno

import click

from blkloom.cli.dm_verb import ONE, verb
from blkloom.cli.session import Session
from blkloom.dm.failing import IoctlFailed, VerbFailed


@verb("DEVICE", "[EVENT_NUMBER]", most=2, selectors=ONE)
@click.option("--noflush", is_flag=True, help="Taken as given: nothing is flushed for it.")
def wait(session: Session, operands: tuple[str, ...], noflush: bool) -> None:
    """Wait until the device's event number is another than EVENT_NUMBER (0, if not given).

    It grows when the device is renamed or removed, when its size changes, when it fails, and when a
    target has news. info tells it; with -v this does too.

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
            return  # That it was removed is what happened.
    session.tell(named)
