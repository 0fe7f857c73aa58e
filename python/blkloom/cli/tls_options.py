"""Options for TLS of NBD exports, with the words of nbdkit, and for who may use an export."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Final

import click

from blkloom.cli.socket_options import user_id

_MODES: Final = {"off": "off", "on": "allow", "allow": "allow", "require": "require"}
"""nbdkit says `on` for `allow`."""

_NAMES: Final = (
    "tls",
    "tls_certificates",
    "tls_verify_peer",
    "tls_psk",
    "allow_address",
    "allow_user",
    "allow_certificate",
    "read_only_for",
    "max_connections_per_peer",
)
_OPTIONS: Final = (
    click.option("--tls", type=click.Choice(list(_MODES)), default="off", help="TLS for NBD; allow: clients choose."),
    click.option(
        "--tls-certificates",
        type=click.Path(readable=False),
        metavar="DIR",
        help="Directory with server-cert.pem, server-key.pem, ca-cert.pem, ca-crl.pem.",
    ),
    click.option("--tls-verify-peer", is_flag=True, help="Clients must have a certificate of ca-cert.pem."),
    click.option(
        "--tls-psk", type=click.Path(readable=False), metavar="FILE", help="Pre-shared keys: lines of user:hexkey."
    ),
    click.option("--allow-address", multiple=True, metavar="CIDR", help="For clients of these addresses; repeatable."),
    click.option(
        "--allow-user", multiple=True, type=user_id, metavar="USER", help="For these users of a socket; repeatable."
    ),
    click.option(
        "--allow-certificate",
        multiple=True,
        metavar="NAME",
        help="For certificates with this common or distinguished name, or keys of this user; repeatable.",
    ),
    click.option(
        "--read-only-for",
        multiple=True,
        metavar="RULE",
        help="For reading only: address=CIDR, user=USER or certificate=NAME; repeatable.",
    ),
    click.option(
        "--max-connections-per-peer", type=click.IntRange(0), default=0, metavar="N", help="Of one address or user."
    ),
)


def tls_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the options, as one argument `nbd`: the options of an NBD export (`export.nbd.details`), without those
    that are not given.
    """

    @wraps(command)
    def with_details(*arguments: Any, **options: Any) -> Any:
        given = {name: options.pop(name) for name in _NAMES}
        return command(*arguments, nbd=_details(**given), **options)

    decorated: Callable[..., Any] = with_details
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


def _details(
    *,
    tls: str,
    tls_certificates: str | None,
    tls_verify_peer: bool,
    tls_psk: str | None,
    allow_address: Sequence[str],
    allow_user: Sequence[int],
    allow_certificate: Sequence[str],
    read_only_for: Sequence[str],
    max_connections_per_peer: int,
) -> dict[str, Any]:
    settings: dict[str, Any] = {} if tls == "off" else {"mode": _MODES[tls]}
    for key, path in (("certificates", tls_certificates), ("psk", tls_psk)):
        if path is not None:
            settings[key] = os.path.abspath(path)
    if tls_verify_peer:
        settings["verify_peer"] = True
    rules = {
        "addresses": [network for networks in allow_address for network in networks.split(",")],
        "users": list(allow_user),
        "certificates": list(allow_certificate),
        "read_only_for": [_numbered(rule) for rule in read_only_for],
    }
    given = {key: value for key, value in rules.items() if value}
    details: dict[str, Any] = {"tls": settings, "access": given, "per_host": max_connections_per_peer}
    return {key: value for key, value in details.items() if value}


def _numbered(rule: str) -> str:
    """A rule in which a user is a number."""
    kind, _, value = rule.partition("=")
    return f"user={user_id(value)}" if kind == "user" else rule
