"""The `blkloom` command: runs the verb, sets up the log, turns errors into exit codes.

Only the command line reads the environment and prints; all other modules raise exceptions.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from typing import Any, NoReturn

import click

from blkloom.cli.session import RUN_DIR
from blkloom.cli.verbs import Verbs
from blkloom.dm.failing import VerbFailed
from blkloom.errors import BlkloomError
from blkloom.printing import LineFormatter, described, log_to_stderr, printable_lines
from blkloom.version import VERSION

_EX_OSERR = 71


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(VERSION)
@click.option(
    "--run-dir",
    envvar="BLKLOOM_RUN_DIR",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Where the supervisor and its devices are ($BLKLOOM_RUN_DIR); if neither says: root's are in /run/blkloom, "
    "another user's in $XDG_RUNTIME_DIR/blkloom.",
)
@click.option("-v", "--verbose", count=True, help="Log more: -v logs connections, -vv everything.")
@click.option("-q", "--quiet", is_flag=True, help="Log errors only.")
@click.pass_context
def blkloom(context: click.Context, run_dir: str | None, verbose: int, quiet: bool) -> None:
    """Virtual block devices in user space, made from parts of files, memory and other devices.

    \b
    blkloom create disk --table '0 2048 loop disk.img'   make a device; it stays until it is removed
    blkloom ls --tree                                    print the tree of devices
    blkloom info -c -o name,size,open,socket             show the socket for NBD clients
    blkloom remove disk                                  drain, flush and remove it
    blkloom serve disk.img                               serve a file without a supervisor, until ^C
    blkloom targets -v                                   list the targets of tables

    The verbs of dmsetup have the same options, output and exit status as in dmsetup: 0, or 1 after an error.
    `blkloom VERB --help` describes each verb.

    Exit status of serve: 0 success, 64 usage, 65 a bad table, 66 a file that cannot be used,
    69 a socket that cannot be listened on, 71 the system lacks something, 74 data that was written may
    be lost, 75 a file in use.
    """
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    if context.invoked_subcommand != "supervisor":  # the log goes to the journal, if there is one
        log_to_stderr(LineFormatter("blkloom: %(levelname)s: %(message)s"), level)
    context.meta[RUN_DIR] = run_dir


def main() -> NoReturn:
    """Runs the command and exits with its status."""
    gc.disable()  # until the modules of the verb are loaded (`Verbs.get_command`): imports make no garbage
    try:
        _run()
    finally:
        gc.freeze()  # otherwise the interpreter runs a full collection before it ends
        gc.enable()


def _run() -> NoReturn:
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        _any_bytes(stream)
    try:
        blkloom(prog_name="blkloom", standalone_mode=False)
    except VerbFailed as error:
        _end(printable_lines(error.text()), 1)
    except BlkloomError as error:
        _end(f"blkloom: {error}", error.exit_code)
    except click.exceptions.Abort:
        _end("blkloom: interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(64 if isinstance(error, click.UsageError) else error.exit_code)
    except BrokenPipeError:
        # The reader of our output has closed the pipe: no error message at exit for that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _end(f"blkloom: {described(error)}", _EX_OSERR)
    sys.exit(0)


def _open_closed_streams() -> None:
    """Opens /dev/null for closed standard streams: otherwise a file opened later would become one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor
            if number:
                os.set_inheritable(number, True)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _any_bytes(stream: Any) -> None:
    """Prints names of files unchanged, even if they are not UTF-8."""
    stream.reconfigure(errors="surrogateescape")


def _end(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    click.echo(message, err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
