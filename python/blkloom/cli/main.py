"""The `blkloom` command: its verbs, its log, and one exit code an error.

Below the command line nothing reads the environment or prints; errors come up as exceptions.
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
@click.option("-v", "--verbose", count=True, help="Log more: -v connections, -vv everything.")
@click.option("-q", "--quiet", is_flag=True, help="Log errors only.")
@click.pass_context
def blkloom(context: click.Context, run_dir: str | None, verbose: int, quiet: bool) -> None:
    """Virtual block devices in user space, woven from files, memory and each other.

    \b
    blkloom create disk --table '0 2048 loop disk.img'   a device, live until it is removed
    blkloom ls --tree                                    what stands on what
    blkloom info -c -o name,size,open,socket             where NBD clients reach it
    blkloom remove disk                                  drained, flushed, gone
    blkloom serve disk.img                               without a supervisor, until ^C
    blkloom targets -v                                   what tables are made of

    Verbs of dmsetup's take its options, print what it prints and exit as it does: 0, or 1 when
    something failed. `blkloom VERB --help` tells more of each.

    Exit status of serve: 0 success, 64 usage, 65 a bad table, 66 a backing file that cannot be used,
    69 a socket that cannot be listened on, 71 the system lacks something, 74 data that was written may
    be lost, 75 a backing file in use.
    """
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    if context.invoked_subcommand != "supervisor":  # its log goes to the journal where there is one
        logging.basicConfig(level=level, format="blkloom: %(levelname)s: %(message)s", stream=sys.stderr)
    context.meta[RUN_DIR] = run_dir


def main() -> NoReturn:
    """Runs the command and exits with its status."""
    gc.disable()  # until the verb's modules are there (`Verbs.get_command`): importing makes no garbage
    try:
        _run()
    finally:
        gc.freeze()  # or the interpreter would look through everything once more before it ends
        gc.enable()


def _run() -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        _any_bytes(stream)
    try:
        blkloom(prog_name="blkloom", standalone_mode=False)
    except VerbFailed as error:
        _end(error.text(), 1)
    except BlkloomError as error:
        _end(f"blkloom: {error}", error.exit_code)
    except click.exceptions.Abort:
        _end("blkloom: interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(64 if isinstance(error, click.UsageError) else error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _end(f"blkloom: {error}", _EX_OSERR)
    sys.exit(0)


def _any_bytes(stream: Any) -> None:
    """Names of files need not be UTF-8, and are printed as they are."""
    stream.reconfigure(errors="surrogateescape")


def _end(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    click.echo(message, err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
