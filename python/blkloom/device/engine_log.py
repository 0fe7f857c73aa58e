"""The engine's log in Python's logging, as loggers `blkloom.engine.<module of the engine>`.

The engine's threads never call Python. Their records wait in a queue of the engine, 256 at most. A record wakes the
mapper threads of the process; the first one passes all records on (`forward`). There is no thread for this alone.
When the interpreter or a worker ends, the last records are passed on, and later ones go to standard error.
A fork logs records of its own engines only.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Sequence
from typing import Final

from blkloom import _engine

_LOGGER: Final = "blkloom.engine"


def forward() -> None:
    """Forwards the engine's new log records. Any thread."""
    if _engine.has_log_records():
        pass_on(*_engine.log_records())


def end() -> None:
    """Forwards the last records. Later records go to standard error."""
    pass_on(*_engine.end_log())


def pass_on(records: Sequence[_engine._LogRecord], dropped: int) -> None:
    """Passes records to their loggers, and logs the number of dropped ones."""
    for level, module, text, file, line, thread, time in records:
        log = logging.getLogger(f"{_LOGGER}.{module.removeprefix('blkloom_').replace('::', '.')}")
        if log.isEnabledFor(level):
            record = log.makeRecord(log.name, level, file, line, text, (), None)
            record.created, record.msecs, record.threadName = time, time % 1 * 1000, thread
            log.handle(record)
    if dropped:
        what = "%d more messages were dropped: they came faster than they were logged"
        logging.getLogger(_LOGGER).warning(what, dropped)


# After devices that were left open have been closed, and before logging ends.
atexit.register(end)
