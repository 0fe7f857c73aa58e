"""The supervisor's command line.

The zygote is started before the supervisor is imported: both take longer to import than all else a first `create`
waits for, and are imported at the same time.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Sequence
from typing import Final

import click

from blkloom.control.rundir import RunDir
from blkloom.errors import BlkloomError, ResourceError
from blkloom.memory import default_budget, parse_budget
from blkloom.printing import LineFormatter, described, log_to_stderr
from blkloom.supervisor.limits import Inherited, Limits
from blkloom.supervisor.zygote_process import ZygoteProcess, start_zygote
from blkloom.units import Bytes, format_size, parse_size

_log = logging.getLogger(__name__)
_LEVELS: Final = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _JournalFormatter(LineFormatter):
    """Log priorities, as in sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        return f"<{_LEVELS.get(record.levelno, 6)}>{super().format(record)}"


def _start_logging(level: int) -> None:
    if "JOURNAL_STREAM" in os.environ:
        log_to_stderr(_JournalFormatter("%(name)s: %(message)s"), level)
    else:
        log_to_stderr(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"), level)


def _parse_inherited(text: str) -> Inherited:
    return Inherited(*map(int, text.split(",")))


def _default_memory() -> int:
    """80 % of the memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 8 // 10


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--run-dir", type=click.Path(), help="Run directory of the supervisor (see blkloom --help).")
@click.option("--max-devices", type=click.IntRange(1), default=4096, show_default=True)
@click.option("--max-ram", metavar="SIZE", help="Memory for all RAM devices together (80 % of the machine's memory).")
@click.option(
    "--client-memory",
    metavar="SIZE",
    help="Memory of each worker for requests of its clients (an eighth of its memory limit, 64 MiB to 1 GiB).",
)
@click.option("--max-deaths", type=click.IntRange(0), default=5, show_default=True, help="Of a worker in a minute.")
@click.option(
    "--recovery-timeout",
    type=click.FloatRange(0),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="How long I/O waits for a new worker if the former one cannot end because storage hangs; then devices fail.",
)
@click.option(
    "--idle-timeout",
    type=click.FloatRange(0, 1e9),
    default=0,
    metavar="SECONDS",
    help="End after this time without devices and clients; 0: never.  [default: 0]",
)
@click.option(
    "--keep-devices",
    is_flag=True,
    help="SIGTERM ends the supervisor only: workers serve on, and systemd stores descriptors for the next supervisor.",
)
@click.option("-v", "--verbose", count=True, help="Log more.")
@click.option("--ready-fd", type=int, hidden=True)
@click.option("--inherited", hidden=True)
@click.pass_context
def supervisor(
    context: click.Context,
    run_dir: str | None,
    max_devices: int,
    max_ram: str | None,
    client_memory: str | None,
    max_deaths: int,
    idle_timeout: float,
    recovery_timeout: float,
    keep_devices: bool,
    verbose: int,
    ready_fd: int | None,
    inherited: str | None,
) -> None:
    """Run the supervisor of a run directory in the foreground.

    If there is no supervisor, other commands start one in the background. SIGTERM ends it: it drains, flushes
    and removes every device. After SIGKILL, and with --keep-devices also after SIGTERM, the workers continue to
    serve; the next supervisor takes them over.
    """
    _start_logging((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    where = RunDir.at(run_dir) if run_dir else RunDir.default(os.environ)
    try:
        memory: int = parse_size(max_ram) if max_ram else _default_memory()
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--max-ram") from error
    try:
        budget = parse_budget(client_memory) if client_memory else default_budget()
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--client-memory") from error
    again = [sys.executable, "-m", "blkloom.supervisor", "--run-dir", str(where.path)]
    again += [f"--max-devices={max_devices}", f"--max-ram={memory}", f"--max-deaths={max_deaths}"]
    again += [f"--idle-timeout={idle_timeout}", f"--recovery-timeout={recovery_timeout}"]
    again += [f"--client-memory={budget}", *["--keep-devices"] * keep_devices, *["-v"] * verbose]
    limits = Limits(max_devices, memory, max_deaths, idle_timeout, recovery_timeout, budget, keep_devices)
    _log.info("RAM devices may have %s together", format_size(Bytes(memory)))
    kept = _parse_inherited(inherited) if inherited else None
    zygote: ZygoteProcess = context.obj or start_zygote()
    try:
        from blkloom.supervisor.main import run  # while the zygote starts up

        gc.freeze()
        gc.enable()
        status = run(where, limits, zygote, ready_fd=ready_fd, inherited=kept, again=again)
    finally:
        zygote.end()  # if the supervisor did not come as far as to do so
    sys.exit(status)


def main(arguments: Sequence[str], zygote: ZygoteProcess) -> int:
    """`python -m blkloom.supervisor`, which has started its zygote. Returns the exit status."""
    try:
        supervisor.main(list(arguments), prog_name="blkloom supervisor", standalone_mode=False, obj=zygote)
    except click.ClickException as error:
        error.show()
        return 64
    except BlkloomError as error:
        print(f"blkloom: {described(error)}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"blkloom: {described(error)}", file=sys.stderr)
        return ResourceError.exit_code
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        zygote.end()  # if the supervisor did not come as far as to do so
    return 0
