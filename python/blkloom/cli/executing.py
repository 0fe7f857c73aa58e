"""`--exec`: runs a command for each device."""

from __future__ import annotations

import subprocess
import sys

from blkloom.cli.connecting import directory
from blkloom.cli.session import Session
from blkloom.control.states import DeviceInfo
from blkloom.dm.failing import VerbFailed


def execute(command: str, session: Session, info: DeviceInfo) -> None:
    """Runs the command and waits for it. The command is split at white space, and the path of the device's socket is
    its last argument. Its exit status is ignored, as in dmsetup. Raises VerbFailed.
    """
    words = command.split()
    if not words:
        raise VerbFailed("--exec needs a command.")
    sys.stdout.flush()
    try:
        subprocess.run([*words, directory(session.run_dir).device(info.name)], check=False)
    except OSError as error:
        raise VerbFailed(f"{words[0]}: {error.strerror}") from error
