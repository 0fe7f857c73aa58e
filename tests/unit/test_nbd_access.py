"""Rules about who may use an NBD export: what they refuse, and for whom an export is read-only."""

from __future__ import annotations

import pytest

from blkloom.export.nbd.access import AccessRules, Identity, Verdict, parse_address

MAPPED = ["::ffff:192.0.2.0/120", "::ffff:192.0.2.7", "::ffff:0.0.0.0/96"]


def test_a_client_that_leaves_out_tls_is_not_one_that_may_write() -> None:
    rules = AccessRules(read_only_for=("certificate=bob",))
    assert rules.verdict(Identity(names=("alice",))) == Verdict()
    assert rules.verdict(Identity(names=("bob",))) == Verdict(read_only=True)
    for client in (Identity(uid=0), Identity(address=parse_address("127.0.0.1"))):
        assert rules.verdict(client) == Verdict("this export needs a certificate")


@pytest.mark.parametrize("network", MAPPED)
def test_networks_of_mapped_addresses_are_those_of_ipv4(network: str) -> None:
    inside = [Identity(address=parse_address(text)) for text in ("192.0.2.7", "::ffff:192.0.2.7")]
    outside = Identity(address=parse_address("2001:db8::1"))
    for client in inside:
        assert AccessRules(addresses=(network,)).verdict(client) == Verdict()
        assert AccessRules(read_only_for=(f"address={network}",)).verdict(client) == Verdict(read_only=True)
    assert AccessRules(addresses=(network,)).verdict(outside).reason == "this export is not for your address"
    assert AccessRules(read_only_for=(f"address={network}",)).verdict(outside) == Verdict()
