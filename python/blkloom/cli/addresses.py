"""Addresses on a command line."""

from __future__ import annotations

from typing import Final

import click

_DEFAULT_PORT: Final = "10809"


def host_port(text: str) -> tuple[str, int]:
    """HOST:PORT, HOST or :PORT; IPv6 addresses in brackets. Raises click.BadParameter."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, _DEFAULT_PORT
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise click.BadParameter(f"{text!r}: the port must be a number up to 65535, as in localhost:10809")
    return host.removeprefix("[").removesuffix("]"), int(port)
