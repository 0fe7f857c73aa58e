"""The `blkloom` command: its verbs, its log, and one exit code an error.

Below this module nothing reads the environment or prints; errors come up as exceptions.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

import click

from blkloom.cli.completion import completion
from blkloom.cli.serve import serve
from blkloom.cli.targets import targets
from blkloom.errors import BlkloomError

_EX_OSERR = 71


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="blkloom")
@click.option("-v", "--verbose", count=True, help="Log more: -v connections, -vv everything.")
@click.option("-q", "--quiet", is_flag=True, help="Log errors only.")
def blkloom(verbose: int, quiet: bool) -> None:
    """Virtual block devices in user space, woven from files, memory and each other.

    \b
    blkloom serve disk.img                    a file as a disk
    blkloom serve --ram 1G                    memory as a disk
    blkloom serve --table '0 2048 zero'       what a dmsetup table describes
    blkloom targets                           what tables are made of

    Exit status: 0 success, 64 usage, 65 a bad table, 66 a backing file that cannot be used, 69 a
    socket that cannot be listened on, 71 the system lacks something, 75 a backing file in use.
    """
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format="blkloom: %(levelname)s: %(message)s", stream=sys.stderr)


for verb in (serve, targets, completion):
    blkloom.add_command(verb)


def main() -> NoReturn:
    """Runs the command and exits with its status."""
    try:
        blkloom(standalone_mode=False)
    except BlkloomError as error:
        _fail(str(error), error.exit_code)
    except click.exceptions.Abort:
        _fail("interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(64 if isinstance(error, click.UsageError) else error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(str(error), _EX_OSERR)
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"blkloom: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
