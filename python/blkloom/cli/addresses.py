"""Parses TCP addresses on the command line."""

from __future__ import annotations

from typing import Final

import click

_DEFAULT_PORT: Final = "10809"


def host_port(text: str) -> tuple[str, int]:
    """HOST:PORT, HOST, or a port of localhost (:PORT, PORT); IPv6 addresses in brackets. Raises
    click.BadParameter.
    """
    host, colon, port = text.rpartition(":")
    if text.endswith("]") or not (colon or text.isdigit()):
        host, port = text, _DEFAULT_PORT
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise click.BadParameter(f"'{text}': the port must be a number up to 65535, as in localhost:10809")
    bracketed = host.startswith("[") and host.endswith("]")
    if ":" in host and not bracketed:
        raise click.BadParameter(f"'{text}': write an IPv6 address in brackets, as in [::1]:10809")
    return (host[1:-1] if bracketed else host) or "localhost", int(port)


listen_option: Final = click.option(
    "--listen",
    type=host_port,
    metavar="[HOST:]PORT",
    help="Listen on TCP (on localhost without HOST); port 0 selects a free port.",
)
allow_remote_option: Final = click.option(
    "--allow-remote",
    is_flag=True,
    help="Allow --listen on an address that other hosts can reach without TLS that proves who clients are.",
)
