"""`blkloom copy`: copies a whole device, file or image to another."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import click

from blkloom import open_files
from blkloom.cli.completing import complete_copied
from blkloom.cli.copy_signals import EndedBySignals
from blkloom.cli.session import RUN_DIR
from blkloom.cli.tables import allow_backing_option
from blkloom.copying.running import CHECKPOINT, REQUEST_SIZE, REQUESTS, SPARSE, Copying, Result, Settings
from blkloom.errors import BusyError, UsageError
from blkloom.image.registry import FORMATS
from blkloom.units import SECTOR, Bytes, format_size, parse_size

if TYPE_CHECKING:
    from blkloom.copying.running import Progress

_LARGEST_REQUEST: Final = 32 << 20
_SMALLEST: Final = 4096
"""Bytes of a request, if the rate is very low."""
_SHARES: Final = 4
"""With a rate, what is in flight is this part of what it passes in a second."""


class SizeOption(click.ParamType[Bytes]):
    """A number of bytes with a suffix. least, most: limits."""

    name = "size"

    def __init__(self, least: int = 0, most: int = 1 << 62) -> None:
        self._least = least
        self._most = most

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Bytes:
        """Raises click.BadParameter."""
        try:
            found = parse_size(str(value))
        except ValueError as error:
            raise click.BadParameter(str(error)) from error
        if not self._least <= found <= self._most:
            raise click.BadParameter(f"'{value}' is not from {self._least} to {self._most} bytes")
        return found


@click.command()
@click.argument("source", metavar="SRC", shell_complete=complete_copied)
@click.argument("target", metavar="DST", shell_complete=complete_copied)
@click.option(
    "-f",
    "--source-format",
    type=click.Choice(["auto", *FORMATS]),
    default="auto",
    show_default=True,
    help="Format of SRC; auto: by its name.",
)
@click.option(
    "-O",
    "--format",
    "target_format",
    type=click.Choice(["auto", *FORMATS]),
    default="auto",
    show_default=True,
    help="Format of DST; auto: by its name.",
)
@click.option("--force", is_flag=True, help="Replace DST, a file that is not empty.")
@click.option("-n", "--no-create", is_flag=True, help="Write to DST as it is: it keeps its size and format.")
@click.option("--resume", is_flag=True, help="Continue a copy that was interrupted.")
@click.option(
    "--state",
    default="",
    type=click.Path(readable=False),
    metavar="PATH",
    help="Where to note how much is copied; otherwise beside DST, if that is a file.",
)
@click.option("--verify", is_flag=True, help="Then read both from the disk, and compare.")
@click.option("--rate", type=SizeOption(1), metavar="SIZE", help="Read at most so many bytes of SRC a second.")
@click.option(
    "-S",
    "--sparse",
    type=SizeOption(),
    metavar="SIZE",
    help="Blocks of zeros that become holes (4K); 0: only holes of SRC.",
)
@click.option("--allocated", is_flag=True, help="Zeros take space in DST, too.")
@click.option(
    "--requests", type=click.IntRange(1, 1024), default=REQUESTS, show_default=True, help="Requests in flight."
)
@click.option("--request-size", type=SizeOption(512, _LARGEST_REQUEST), metavar="SIZE", help="Of a request (256K).")
@click.option("--checkpoint", type=SizeOption(1), metavar="SIZE", help="How often to note the state (256M).")
@click.option("--direct-io", is_flag=True, help="Bypass the page cache (O_DIRECT) where the file system can.")
@click.option("--shared", is_flag=True, help="Do not lock the files: other programs may use them.")
@click.option("--no-flush", is_flag=True, help="Do not wait until DST is on the disk. Nothing is noted then.")
@allow_backing_option
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
@click.option("--json", "as_json", is_flag=True, help="Print what was copied, as JSON.")
@click.pass_context
def copy(
    context: click.Context,
    source: str,
    target: str,
    source_format: str,
    target_format: str,
    force: bool,
    no_create: bool,
    resume: bool,
    state: str,
    verify: bool,
    rate: int | None,
    sparse: int | None,
    allocated: bool,
    requests: int,
    request_size: int | None,
    checkpoint: int | None,
    direct_io: bool,
    shared: bool,
    no_flush: bool,
    allow_backing: Sequence[str],
    quiet: bool,
    as_json: bool,
) -> None:
    """Copy all of SRC to DST: files, block devices, images, devices of the supervisor, or NBD servers.

    \b
    blkloom copy disk.img copy.img                   # holes stay holes, blocks of zeros become holes
    blkloom copy disk.img disk.qcow2                 # makes an image
    blkloom copy disk.qcow2 /dev/sdb --verify        # overwrites the block device
    blkloom copy blkloom:disk backup.img --rate 100M
    blkloom copy nbd://host/disk disk.img            # from an NBD server
    blkloom copy disk.img backup.img --resume        # continues after ^C, a kill or a crash

    A new DST is a file of the size of SRC. An existing file is replaced with --force only; a block device, a device
    or a server is overwritten, unless it is in use or smaller than SRC. SRC must not change meanwhile: copy a
    snapshot of a device in use.

    Exit status: 0 copied, 1 SRC and DST differ (--verify), 64 usage, 65 an image or state that cannot be used, 66 a
    file that cannot be used, 74 a read, write or flush that failed, 75 a file in use, 130 interrupted.
    """
    from blkloom.cli import copy_ends
    from blkloom.cli.connecting import look, with_holders

    if force + no_create + resume > 1:
        raise UsageError("--force, --no-create and --resume exclude each other", cure="--resume knows how it began")
    if no_flush and (state or resume):
        raise UsageError("--no-flush goes without --state and --resume", cure="only what is flushed can be continued")
    open_files.raise_limit()
    size = _request_size(request_size or REQUEST_SIZE, rate)
    settings = Settings(
        requests=requests if rate is None else max(1, min(requests, rate // _SHARES // size)),
        request_size=size,
        rate=rate or 0,
        sparse=SPARSE if sparse is None else sparse,
        allocated=allocated,
        direct_io=direct_io,
        shared=shared,
        flush=not no_flush,
        verify=verify,
        resume=resume,
        state=state,
        checkpoint=checkpoint or CHECKPOINT,
    )
    run_dir = context.meta.get(RUN_DIR)
    try:
        with EndedBySignals() as ending, look(run_dir) as client:
            words = copy_ends.meanings(source, target, client)
            with (
                copy_ends.source(words[0], client, source_format, allow_backing) as begins,
                copy_ends.target(
                    words[1],
                    client,
                    target_format,
                    begins.size,
                    force=force,
                    create=not no_create,
                    resume=resume,
                    allow_backing=allow_backing,
                ) as ends,
                _bar(begins.size, hidden=quiet or not sys.stderr.isatty()) as (progress, ticking),
                Copying(begins, settings, progress, ticking=ticking) as copying,
            ):
                ending.advice = partial(_advice, copying, begins.size)
                try:
                    result = copying.to(ends)
                except BaseException:
                    click.echo(ending.advice(), err=True, nl=False)
                    raise
    except BusyError as error:
        raise with_holders(error, run_dir) from error
    _report(result, as_json=as_json, names=(source, target))


def _request_size(size: int, rate: int | None) -> int:
    """The size of requests: with a low rate, they are small, so that it is even."""
    if rate is not None:
        size = min(size, max(rate // _SHARES, _SMALLEST))
    return size // _SMALLEST * _SMALLEST or size // SECTOR * SECTOR


@contextmanager
def _bar(size: int, *, hidden: bool) -> Iterator[tuple[Progress, bool]]:
    """(callback, whether it is to be called several times a second) for progress on a terminal."""
    if hidden:
        yield (lambda _what, _done: None), False
        return
    with click.progressbar(length=max(size, 1), file=sys.stderr, width=0, show_eta=True) as bar:

        def show(what: str, done: int) -> None:
            if bar.label != what:  # another pass over the bytes
                bar.label, bar.pos, bar.finished = what, 0, False
            bar.update(done - bar.pos)

        yield show, True


def _advice(copying: Copying, size: int) -> str:
    """How an unfinished copy can be continued."""
    if not copying.journal_path or not copying.position:
        return ""
    done = f"{format_size(copying.position)} of {format_size(size)}"
    return (
        f"blkloom: {done} are copied; the same command with --resume, without --force or --no-create, continues there\n"
    )


def _report(result: Result, *, as_json: bool, names: tuple[str, str]) -> None:
    if as_json:
        from blkloom.json_text import encode

        values = {
            "source": names[0],
            "target": names[1],
            "size": result.size,
            "data": result.data,
            "zeroes": result.zeroes,
            "resumed_at": result.start,
            "verified": result.verified,
        }
        click.echo(encode(values).decode("ascii", "surrogateescape"))
