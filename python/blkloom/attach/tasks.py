"""Main program of a task process: `python -m blkloom.attach.tasks TASK`. See `process.py`.

Prints an empty line when it has started, because time limits are for the device, not for the start of Python. Reads the
arguments as JSON from standard input; prints the result or the failure as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from blkloom.attach import block_export, freezing, loop_device, partition_nodes
from blkloom.control.failures import to_failure

TASKS: Final[Mapping[str, Callable[..., Any]]] = {
    "attach": loop_device.attach,
    "detach": loop_device.detach,
    "refresh": loop_device.refresh,
    "freeze": freezing.freeze,
    "thaw": freezing.thaw,
    "write_back": freezing.write_back,
    "set_read_only": loop_device.set_read_only,
    "use_no_scheduler": block_export.use_no_scheduler,
    "update_partitions": partition_nodes.update_partitions,
    "remove_partitions": partition_nodes.remove_partitions,
}


def main() -> None:
    """Runs the task that the command line names."""
    print(flush=True)
    try:
        answer = {"result": TASKS[sys.argv[1]](**json.load(sys.stdin))}
    except (OSError, ValueError) as error:
        answer = {"failure": msgspec.to_builtins(to_failure(0, error))}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
