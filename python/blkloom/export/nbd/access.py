"""Rules about who may use an export: addresses, users and certificates of clients; and what is known of a client.

Pure functions and values. A rule that is not given allows every client; of those given, each must allow it. A client
that a rule cannot judge (no address, no user, no certificate) is refused.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from blkloom.errors import UsageError
from blkloom.peer_credentials import peer_credentials

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class RefusedError(Exception):
    """A client may not use an export; the message may be sent to it."""


class Verdict(msgspec.Struct, frozen=True):
    """What a client may do with an export. reason: why it may not use it; None: it may."""

    reason: str | None = None
    read_only: bool = False


Admit = Callable[[str], Verdict]
"""The verdict about one client and the export of that name."""


class Identity(msgspec.Struct, frozen=True):
    """What is known of a client. address: of TCP. uid: of a Unix socket. names: those that its certificate or its
    pre-shared key proves: the distinguished name (it contains `=`), the common name, or the user of the key.
    """

    address: Address | None = None
    uid: int | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, connected: socket.socket) -> Identity:
        """The identity of the client of a connected socket, before TLS. Raises OSError."""
        if connected.family == socket.AF_UNIX:
            return cls(uid=peer_credentials(connected).uid)
        if connected.family in {socket.AF_INET, socket.AF_INET6}:
            return cls(address=parse_address(connected.getpeername()[0]))
        return cls()

    def with_tls(self, peer: tuple[Literal["certificate", "psk"], str, str | None] | None) -> Identity:
        """The same with what TLS has proved (`_engine.TlsSession.peer`)."""
        return msgspec.structs.replace(self, names=() if peer is None else names_of(*peer))

    @property
    def host(self) -> Address | int | None:
        """What connections are counted by: the address, or the user."""
        return self.uid if self.address is None else self.address


class AccessRules(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Rules of one export. Empty: no rule.

    addresses: networks such as `192.0.2.0/24`. users: numbers of users, on Unix sockets. certificates: common names,
    distinguished names (they contain `=`), or users of pre-shared keys. read_only_for: the same as words:
    `address=NETWORK`, `user=NUMBER`, `certificate=NAME`. Raises UsageError.
    """

    addresses: tuple[str, ...] = ()
    users: tuple[int, ...] = ()
    certificates: tuple[str, ...] = ()
    read_only_for: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for address in self.addresses:
            parse_network(address)
        for rule in self.read_only_for:
            self._matches(rule, Identity())

    def verdict(self, client: Identity) -> Verdict:
        """The verdict about a client."""
        reason = self.refused_address(client)
        if reason is None and self.users and client.uid not in self.users:
            reason = "this export is not for your user"
        if reason is None and self.certificates and not _is_named(client, self.certificates):
            reason = (
                "this export is not for your certificate or key" if client.names else "this export needs a certificate"
            )
        # Otherwise a client could write by leaving out TLS.
        if reason is None and not client.names and any(rule.startswith("certificate=") for rule in self.read_only_for):
            reason = "this export needs a certificate"
        if reason is not None:
            return Verdict(reason)
        return Verdict(read_only=any(self._matches(rule, client) for rule in self.read_only_for))

    def refused_address(self, client: Identity) -> str | None:
        """Why the address of a client is refused; None: it is not."""
        if not self.addresses or _is_within(client, map(parse_network, self.addresses)):
            return None
        return "this export is not for your address"

    def _matches(self, rule: str, client: Identity) -> bool:
        kind, _, value = rule.partition("=")
        match kind:
            case "address":
                return _is_within(client, [parse_network(value)])
            case "user" if value.isascii() and value.isdigit():
                return client.uid == int(value)
            case "certificate" if value:
                return _is_named(client, [value])
            case _:
                raise UsageError(
                    f"'{rule}' is no rule", cure="write address=192.0.2.0/24, user=1000 or certificate=NAME"
                )


def names_of(kind: Literal["certificate", "psk"], name: str, common_name: str | None) -> tuple[str, ...]:
    """The names of a certificate or key that rules may contain. A common name that looks like a distinguished name is
    none of them: whoever asks for a certificate chooses its common name.
    """
    if kind == "psk":
        return (name,)
    if common_name is None or "=" in common_name:
        return (name,)
    return (name, common_name)


def parse_network(text: str) -> Network:
    """A network or an address. Raises UsageError."""
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        cure = "write an address or a network without bits of hosts, as 192.0.2.0/24 or 2001:db8::/32"
        raise UsageError(f"'{text}' is no network: {error}", cure=cure) from error
    mapped = network.network_address.ipv4_mapped if isinstance(network, ipaddress.IPv6Network) else None
    if mapped is not None and network.prefixlen >= 96:  # as `parse_address` has the address of a client
        return ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    return network


def parse_address(text: str) -> Address:
    """The address of a peer, as IPv4 where it is mapped into IPv6."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _is_within(client: Identity, networks: Iterable[Network]) -> bool:
    address = client.address
    return address is not None and any(
        network.version == address.version and address in network for network in networks
    )


def _is_named(client: Identity, names: Iterable[str]) -> bool:
    return not set(client.names).isdisjoint(names)
