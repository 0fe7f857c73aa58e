"""TLS in the handshake: NBD_OPT_STARTTLS in the three modes of the specification, and what it forgets."""

from __future__ import annotations

import struct

import pytest

from blkloom.export.nbd.access import Verdict
from blkloom.export.nbd.codes import BASE_ALLOCATION, OPTION_MAGIC, ClientFlag, Option, Reply, TransmissionFlag
from blkloom.export.nbd.events import Aborted, Answered, Dropped, Secured, StartTls, Transmission
from blkloom.export.nbd.handshake import Handshake
from blkloom.export.nbd.offer import Catalogue
from blkloom.export.nbd.state import ProtocolError, State
from blkloom.export.nbd.tls import TlsMode
from handshake_client import DISK, FIXED, NO_ZEROES, OTHER, Client, contexts, export_request, select

STARTTLS = struct.pack(">QII", OPTION_MAGIC, Option.STARTTLS, 0)
TLS_MODES: list[TlsMode] = ["allow", "require"]


def client(tls: TlsMode, flags: int = NO_ZEROES) -> Client:
    return Client(Handshake(Catalogue.of(DISK, OTHER), tls=tls)).greet(flags)


def secured(tls: TlsMode, flags: int = NO_ZEROES) -> Client:
    asking = client(tls, flags)
    start(asking)
    return asking


def start(asking: Client) -> None:
    (event,) = asking.option(Option.STARTTLS)
    assert isinstance(event, StartTls)
    assert event.data == struct.pack(">QIII", 0x0003E889045565A9, Option.STARTTLS, Reply.ACK, 0)
    asking.handshake.secured()
    assert asking.send(b"") == [Secured()]


@pytest.mark.parametrize("tls", TLS_MODES)
def test_starttls_is_acknowledged_and_the_negotiation_begins_again(tls: TlsMode) -> None:
    asking = secured(tls)
    assert asking.answer(Option.LIST) == Reply.ACK
    assert asking.go("disk").offer == DISK


@pytest.mark.parametrize("tls", TLS_MODES)
def test_a_second_starttls_is_invalid(tls: TlsMode) -> None:
    asking = secured(tls)
    assert asking.answer(Option.STARTTLS) == Reply.ERR_INVALID
    assert asking.answer(Option.LIST) == Reply.ACK


@pytest.mark.parametrize("tls", TLS_MODES)
def test_starttls_with_data_is_invalid_and_survived(tls: TlsMode) -> None:
    asking = client(tls)
    assert asking.answer(Option.STARTTLS, b"data") == Reply.ERR_INVALID
    start(asking)


def test_forced_tls_refuses_every_option_but_starttls_and_abort() -> None:
    for option in (*Option, 77):
        if option in {Option.STARTTLS, Option.ABORT, Option.EXPORT_NAME}:
            continue
        for data in (b"", b"x", export_request("disk"), export_request("nosuch"), bytes(100_000)):
            asking = client("require")
            assert asking.answer(option, data) == Reply.ERR_TLS_REQD
            start(asking)
    assert isinstance(client("require").option(Option.ABORT)[0], Aborted)


def test_forced_tls_ends_the_session_after_an_export_name() -> None:
    for name in (b"disk", b"nosuch", b""):
        asking = client("require")
        (event,) = asking.option(Option.EXPORT_NAME, name)
        assert isinstance(event, Dropped)
        assert asking.handshake.state is State.CLOSED


@pytest.mark.parametrize("tls", TLS_MODES)
def test_nothing_requires_tls_that_has_begun(tls: TlsMode) -> None:
    for option in (*Option, 77):
        for data in (b"", b"x", export_request("nosuch"), contexts("nosuch")):
            if option != Option.EXPORT_NAME:
                assert secured(tls).answer_or_abort(option, data) != Reply.ERR_TLS_REQD


def test_selective_tls_serves_clients_without_it() -> None:
    for option in (*Option, 77):
        for data in (b"", b"x", export_request("disk"), export_request("nosuch")):
            if option not in {Option.EXPORT_NAME, Option.STARTTLS}:
                assert client("allow").answer_or_abort(option, data) != Reply.ERR_TLS_REQD
    assert client("allow").go("disk").offer == DISK


@pytest.mark.parametrize("flags", [0, ClientFlag.NO_ZEROES])
def test_clients_without_fixed_newstyle_get_no_tls_and_hear_nothing_of_it(flags: int) -> None:
    for tls in TLS_MODES:
        assert client(tls, flags).answer(Option.STARTTLS) == Reply.ERR_POLICY
    assert client("require", flags).answer(Option.GO, export_request("disk")) == Reply.ERR_POLICY
    assert client("allow", flags).go("disk").offer == DISK


def test_nothing_that_was_negotiated_before_tls_counts_after_it() -> None:
    asking = client("allow")
    assert asking.answer(Option.STRUCTURED_REPLY) == Reply.ACK
    assert select(asking, BASE_ALLOCATION)[-1].kind == Reply.ACK
    start(asking)
    begun = asking.go("disk")
    assert (begun.structured, begun.extended, begun.contexts) == (False, False, ())

    asking = client("allow")
    assert asking.answer(Option.EXTENDED_HEADERS) == Reply.ACK
    start(asking)
    assert select(asking, BASE_ALLOCATION)[-1].kind == Reply.ERR_INVALID
    (event,) = asking.option(Option.EXPORT_NAME, b"disk")
    assert isinstance(event, Transmission)
    assert not event.extended


def test_the_flags_of_the_client_count_after_tls() -> None:
    for flags, padding in ((FIXED, 124), (NO_ZEROES, 0)):
        (event,) = secured("require", flags).option(Option.EXPORT_NAME, b"disk")
        assert isinstance(event, Transmission)
        assert len(event.data) == 10 + padding


@pytest.mark.parametrize("tls", TLS_MODES)
@pytest.mark.parametrize("injected", [b"\x16", struct.pack(">QII", OPTION_MAGIC, Option.LIST, 0)])
def test_plain_bytes_after_starttls_end_the_session(tls: TlsMode, injected: bytes) -> None:
    asking = client(tls)
    with pytest.raises(ProtocolError, match="bytes after NBD_OPT_STARTTLS, before its reply"):
        asking.send(STARTTLS + injected)
    assert asking.handshake.state is State.CLOSED


def test_bytes_during_the_tls_handshake_are_not_taken() -> None:
    asking = client("require")
    asking.option(Option.STARTTLS)
    with pytest.raises(ProtocolError):
        asking.handshake.receive_data(b"plain")
    assert asking.handshake.next_event() is None


def test_tls_that_was_not_agreed_is_an_error() -> None:
    with pytest.raises(ProtocolError):
        client("require").handshake.secured()


def test_a_refused_client_gets_no_tls() -> None:
    asking = client("require")
    asking.handshake.refuse(Reply.ERR_POLICY, "full")
    assert asking.answer(Option.LIST) == Reply.ERR_TLS_REQD
    assert asking.answer(Option.STARTTLS) == Reply.ERR_POLICY


# Rules of access


def admit(name: str) -> Verdict:
    return Verdict("not for you") if name == "other" else Verdict(read_only=True)


def admitted() -> Client:
    return Client(Handshake(Catalogue.of(DISK, OTHER), admit=admit)).greet()


def test_an_export_that_rules_refuse_is_a_matter_of_policy_and_not_listed() -> None:
    for option, data in (
        (Option.INFO, export_request("other")),
        (Option.GO, export_request("other")),
        (Option.SET_META_CONTEXT, contexts("other", BASE_ALLOCATION)),
    ):
        asking = admitted()
        assert asking.answer(Option.STRUCTURED_REPLY) == Reply.ACK
        said = asking.ask(option, data)
        assert (said[-1].kind, said[-1].data) == (Reply.ERR_POLICY, b"not for you")
        assert asking.handshake.refused == "not for you"
    assert [one.data[4:8] for one in admitted().ask(Option.LIST)[:-1]] == [b"disk"]
    (event,) = admitted().option(Option.EXPORT_NAME, b"other")
    assert event == Dropped("not for you")


def test_an_export_is_for_reading_only_where_a_rule_says_so() -> None:
    begun = admitted().go("disk")
    assert begun.read_only
    assert begun.offer.flags(structured=False) & TransmissionFlag.READ_ONLY
    (event,) = admitted().option(Option.INFO, export_request("disk"))
    assert isinstance(event, Answered)
    assert int.from_bytes(event.data[30:32]) & TransmissionFlag.READ_ONLY
