"""The server's replies in the NBD handshake, option by option.

The table in test_nbd_handshake_musts.py maps each MUST of the specification to the tests here.
"""

from __future__ import annotations

import struct

import pytest

from blkloom.errors import UsageError
from blkloom.export.nbd.codes import NBD_MAGIC, OPTION_MAGIC, ClientFlag, Info, Option, Reply
from blkloom.export.nbd.codes import TransmissionFlag as Flag
from blkloom.export.nbd.events import Aborted, Disconnected, Dropped, Transmission
from blkloom.export.nbd.handshake import OPTION_LIMIT, SKIP_LIMIT, Handshake
from blkloom.export.nbd.offer import BlockSizes, Catalogue, Offer
from blkloom.export.nbd.state import ProtocolError, State
from handshake_client import (
    DISK,
    FIXED,
    NO_ZEROES,
    OTHER,
    Client,
    Said,
    client,
    contexts,
    export_request,
    extended,
    flags_of,
    infos,
    replies,
    string,
    structured,
)

NO_DATA = [Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS]
MALFORMED_REQUESTS = {
    "empty": b"",
    "short length": b"\0\0\0",
    "name beyond the data": struct.pack(">I", 5) + b"disk\0\0",
    "name of 4 GiB": struct.pack(">I", 0xFFFFFFFF) + b"disk\0\0",
    "no count": string("disk") + b"\0",
    "fewer requests than announced": string("disk") + struct.pack(">HH", 2, 0),
    "more requests than announced": string("disk") + struct.pack(">HHH", 1, 0, 1),
    "half a request": string("disk") + struct.pack(">HB", 1, 0),
    "name with NUL": string("di\0sk") + b"\0\0",
    "name not UTF-8": struct.pack(">I", 2) + b"\xff\xfe\0\0",
    "name too long": string("x" * 4097) + b"\0\0",
}
MALFORMED_CONTEXTS = {
    "empty": b"",
    "name beyond the data": struct.pack(">I", 50) + b"disk",
    "no count": string("disk"),
    "query length beyond the data": string("disk") + struct.pack(">II", 1, 99) + b"base:",
    "four thousand million queries": string("disk") + struct.pack(">I", 0xFFFFFFFF),
    "fewer queries than announced": string("disk") + struct.pack(">I", 2) + string("base:"),
    "data behind the last query": contexts("disk", "base:") + b"x",
    "query with NUL": contexts("disk", "base:\0"),
    "query not UTF-8": string("disk") + struct.pack(">II", 1, 1) + b"\xff",
    "query too long": contexts("disk", "base:" + "x" * 4096),
    "query without a namespace": contexts("disk", "allocation"),
}


# greeting and client flags


def test_greeting_sets_fixed_newstyle_and_no_zeroes_and_nothing_else() -> None:
    assert client().greeting == struct.pack(">QQH", NBD_MAGIC, OPTION_MAGIC, 3)


@pytest.mark.parametrize("bit", range(2, 32))
def test_unknown_client_flag_drops_the_connection(bit: int) -> None:
    asking = Client()
    asking.send(b"")
    with pytest.raises(ProtocolError, match="unknown client flags"):
        asking.send(struct.pack(">I", 1 << bit | FIXED))
    assert asking.handshake.state is State.CLOSED


def test_client_that_does_not_claim_fixed_newstyle_gets_its_export() -> None:
    (event,) = client(0).option(Option.EXPORT_NAME, b"disk")
    assert isinstance(event, Transmission)


def test_option_with_wrong_magic_drops_the_connection() -> None:
    asking = client()
    with pytest.raises(ProtocolError, match="IHAVEOPT"):
        asking.send(bytes(8))


# options in general


@pytest.mark.parametrize("option", [0, 4, 12, 99, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("length", [0, 1, 100_000])
def test_unknown_option_is_unsupported_and_the_next_one_is_understood(option: int, length: int) -> None:
    asking = client()
    (said,) = asking.ask(option, bytes(length))
    assert (said.option, said.kind) == (option, Reply.ERR_UNSUP)
    assert asking.answer(Option.LIST) == Reply.ACK


@pytest.mark.parametrize("option", NO_DATA)
def test_data_with_an_option_that_takes_none_is_invalid_and_survived(option: Option) -> None:
    asking = client()
    assert asking.answer(option, b"data") == Reply.ERR_INVALID
    assert asking.answer(Option.LIST) == Reply.ACK
    assert not asking.go().structured


@pytest.mark.parametrize("option", [Option.INFO, Option.GO, Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_oversized_option_is_too_big_and_survived(option: Option) -> None:
    asking = structured()
    assert asking.answer(option, bytes(OPTION_LIMIT + 1)) == Reply.ERR_TOO_BIG
    assert asking.answer(Option.LIST) == Reply.ACK


@pytest.mark.parametrize("option", [*Option, 99])
def test_option_announcing_an_absurd_length_is_hung_up_on(option: int) -> None:
    with pytest.raises(ProtocolError):
        client().option(option, length=SKIP_LIMIT + 1)


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
@pytest.mark.parametrize("data", MALFORMED_REQUESTS.values(), ids=MALFORMED_REQUESTS)
def test_malformed_info_and_go_are_invalid_and_survived(option: Option, data: bytes) -> None:
    asking = client()
    assert asking.answer(option, data) == Reply.ERR_INVALID
    assert asking.go("disk").offer == DISK


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
@pytest.mark.parametrize("data", MALFORMED_CONTEXTS.values(), ids=MALFORMED_CONTEXTS)
def test_malformed_context_options_are_invalid_and_survived(option: Option, data: bytes) -> None:
    asking = structured()
    assert asking.answer(option, data) == Reply.ERR_INVALID
    assert asking.go().offer == DISK


def test_every_error_carries_a_string_of_the_protocol() -> None:
    asking = client()
    for option in (*Option, 77):
        if option not in {Option.EXPORT_NAME, Option.ABORT}:
            for said in asking.ask(option, b"\xff" * 9):
                text = said.data.decode()
                assert said.kind.is_error
                assert 0 < len(said.data) <= 4096
                assert "\0" not in text


@pytest.mark.parametrize("name", ["a\0b", "x" * 4097, "\ud800"])
def test_names_that_are_no_strings_cannot_be_offered(name: str) -> None:
    with pytest.raises(UsageError):
        Offer(name, 0)
    with pytest.raises(UsageError):
        Offer("", 0, description=name)


def test_longest_names_and_unicode_go_both_ways() -> None:
    offers = [Offer("ü" * 2048, 1), Offer("喰 / ?", 2)]
    asking = client(FIXED, *offers)
    listed = [said.data[4:].decode() for said in asking.ask(Option.LIST)[:-1]]
    assert listed == [offer.name for offer in offers]
    assert asking.go("ü" * 2048).offer.size == 1


# ends


@pytest.mark.parametrize("data", [b"", b"ignored", bytes(100_000)])
def test_abort_is_acknowledged_and_its_data_ignored(data: bytes) -> None:
    asking = client()
    (event,) = asking.option(Option.ABORT, data)
    assert isinstance(event, Aborted)
    assert replies(event.data) == [Said(Option.ABORT, Reply.ACK, b"")]
    assert asking.handshake.state is State.CLOSED


def test_shutting_down_every_option_but_abort_gets_err_shutdown() -> None:
    asking = structured()
    asking.handshake.refuse(Reply.ERR_SHUTDOWN, "bye")
    for option in (Option.LIST, Option.GO, Option.SET_META_CONTEXT, Option.STARTTLS, 99):
        assert asking.answer(option, b"") == Reply.ERR_SHUTDOWN
    assert asking.answer(Option.ABORT) == Reply.ACK


def test_shutting_down_an_export_name_drops() -> None:
    asking = client()
    asking.handshake.refuse(Reply.ERR_SHUTDOWN, "bye")
    assert asking.option(Option.EXPORT_NAME, b"disk") == [Dropped("bye")]


@pytest.mark.parametrize("sent", [b"", b"I", b"IHAVEOPT", struct.pack(">QII", OPTION_MAGIC, 99, 5) + b"abc"])
def test_client_that_goes_away_ends_the_handshake(sent: bytes) -> None:
    asking = client()
    asking.send(sent)
    asking.handshake.receive_data(b"")
    assert asking.handshake.next_event() == Disconnected(midway=bool(sent))


# TLS


@pytest.mark.parametrize("flags", [0, FIXED])
def test_starttls_is_unsupported(flags: int) -> None:
    assert client(flags).answer(Option.STARTTLS) == Reply.ERR_UNSUP


def test_no_option_is_ever_answered_with_tls_required() -> None:
    for option in (*Option, 77):
        for data in (b"", b"x", export_request("nosuch"), contexts("nosuch")):
            for asking in (client(0), client(), structured(), extended()):
                if option != Option.EXPORT_NAME:
                    assert asking.answer(option, data) != Reply.ERR_TLS_REQD


# EXPORT_NAME


@pytest.mark.parametrize(("flags", "padding"), [(0, 124), (FIXED, 124), (ClientFlag.NO_ZEROES, 0), (NO_ZEROES, 0)])
def test_export_name_sends_zeroes_unless_no_zeroes_was_agreed(flags: int, padding: int) -> None:
    (event,) = client(flags).option(Option.EXPORT_NAME, b"disk")
    assert isinstance(event, Transmission)
    assert event.data == struct.pack(">QH", DISK.size, DISK.flags(structured=False)) + bytes(padding)


def test_export_name_of_an_unknown_export_ends_the_session() -> None:
    asking = client()
    (event,) = asking.option(Option.EXPORT_NAME, b"nosuch")
    assert isinstance(event, Dropped)
    assert "nosuch" in event.reason
    assert asking.handshake.state is State.CLOSED


@pytest.mark.parametrize("name", [b"\xff", b"a\0", b"x" * 4097])
def test_export_name_that_is_no_string_ends_the_session(name: bytes) -> None:
    with pytest.raises(ProtocolError):
        client().option(Option.EXPORT_NAME, name)


def test_export_name_after_extended_headers_ends_the_session() -> None:
    with pytest.raises(ProtocolError, match="extended"):
        extended().option(Option.EXPORT_NAME, b"disk")


def test_empty_name_is_the_default_export_everywhere() -> None:
    (event,) = client().option(Option.EXPORT_NAME, b"")
    assert isinstance(event, Transmission)
    assert event.offer == DISK
    assert client().go("").offer == DISK
    assert client(NO_ZEROES, DISK, Offer("", 1)).go("").offer.size == 1
    asking = Client(Handshake(Catalogue.of())).greet()
    assert asking.answer(Option.GO, export_request("")) == Reply.ERR_UNKNOWN


@pytest.mark.parametrize("exports", [1, 2000])
def test_options_are_bounded_and_a_client_may_ask_about_every_export(exports: int) -> None:
    offers = [Offer(f"disk{number}", 4096) for number in range(exports)]
    client = Client(Handshake(Catalogue.of(*offers))).greet()
    for _ in range(4096 + 8 * exports):
        assert client.answer(99) == Reply.ERR_UNSUP
    with pytest.raises(ProtocolError, match=f"more than {4096 + 8 * exports} options"):
        client.option(99)


# LIST, INFO, GO


def test_list_names_every_export_and_ends_with_ack() -> None:
    assert client().ask(Option.LIST) == [
        Said(Option.LIST, Reply.SERVER, string("disk") + b"the system disk"),
        Said(Option.LIST, Reply.SERVER, string("other")),
        Said(Option.LIST, Reply.ACK, b""),
    ]


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_info_and_go_tell_the_export_and_what_was_asked(option: Option) -> None:
    said = client().ask(option, export_request("", *Info))
    assert said[-1] == Said(option, Reply.ACK, b"")
    told = infos(said)
    assert len(told) == len(said) - 1
    assert told == {
        Info.EXPORT: struct.pack(">HQH", Info.EXPORT, DISK.size, DISK.flags(structured=False)),
        Info.NAME: struct.pack(">H", Info.NAME) + b"disk",
        Info.DESCRIPTION: struct.pack(">H", Info.DESCRIPTION) + b"the system disk",
        Info.BLOCK_SIZE: struct.pack(">HIII", Info.BLOCK_SIZE, 1, 4096, 33554432),
    }


def test_info_export_is_told_unasked_and_has_twelve_bytes() -> None:
    told = infos(client().ask(Option.INFO, export_request("disk")))
    assert {kind: len(data) for kind, data in told.items()} == {Info.EXPORT: 12}


def test_unknown_and_repeated_information_requests_are_ignored() -> None:
    asked = (9, Info.EXPORT, 0xFFFF, Info.NAME, Info.NAME)
    said = client().ask(Option.INFO, export_request("disk", *asked))
    assert [one.kind for one in said] == [Reply.INFO, Reply.INFO, Reply.ACK]
    assert infos(said).keys() == {Info.EXPORT, Info.NAME}


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_unknown_export_is_unknown_without_information(option: Option) -> None:
    asking = client()
    assert [said.kind for said in asking.ask(option, export_request("nosuch", 0, 3))] == [Reply.ERR_UNKNOWN]
    assert asking.go().offer == DISK


def test_go_sends_nothing_behind_its_ack() -> None:
    for flags in (0, FIXED, NO_ZEROES):
        assert replies(client(flags).go().data)[-1].kind == Reply.ACK


def test_go_right_after_info_tells_the_same_even_if_the_size_changed() -> None:
    sizes = iter(range(512, 512 * 20, 512))
    asking = Client(Handshake(Catalogue({"disk": lambda: Offer("disk", next(sizes))}))).greet()
    before = infos(asking.ask(Option.INFO, export_request("disk", 0, 3)))
    assert infos(replies(asking.go("disk", 0, 3).data)) == before


def test_go_after_another_option_tells_the_size_of_now() -> None:
    sizes = iter(range(512, 512 * 20, 512))
    asking = Client(Handshake(Catalogue({"disk": lambda: Offer("disk", next(sizes))}))).greet()
    before = infos(asking.ask(Option.INFO, export_request("disk")))
    asking.ask(Option.STRUCTURED_REPLY)
    assert infos(replies(asking.go("disk").data)) != before


def test_default_size_constraints_never_require_asking_for_them() -> None:
    assert client().go("disk").offer.block_sizes == BlockSizes(1, 4096, 33554432)


@pytest.mark.parametrize(
    "sizes", [(0, 4096, 8192), (3, 4096, 8192), (131072, 131072, 131072), (1, 256, 8192), (4096, 512, 8192),
              (1, 5000, 8192), (1, 4096, 4095), (1, 4096, 1 << 32)]
)  # fmt: skip
def test_impossible_size_constraints_cannot_be_offered(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError):
        BlockSizes(*sizes)


def test_size_constraints_other_than_the_default_are_told_when_asked() -> None:
    sizes = BlockSizes(512, 65536, 1000000)
    told = infos(client(NO_ZEROES, Offer("a", 0, block_sizes=sizes)).ask(Option.INFO, export_request("a", 3)))
    assert told[Info.BLOCK_SIZE] == struct.pack(">HIII", 3, 512, 65536, 1000000)


# transmission flags


def test_flags_of_a_writable_export() -> None:
    assert flags_of(client().ask(Option.INFO, export_request("disk"))) == (
        Flag.HAS_FLAGS
        | Flag.SEND_FLUSH
        | Flag.SEND_FUA
        | Flag.SEND_TRIM
        | Flag.SEND_WRITE_ZEROES
        | Flag.SEND_FAST_ZERO
        | Flag.SEND_CACHE
        | Flag.CAN_MULTI_CONN
    )


def test_flags_of_a_read_only_export_offer_no_way_to_write() -> None:
    flags = flags_of(client().ask(Option.INFO, export_request("other")))
    assert flags & (Flag.HAS_FLAGS | Flag.READ_ONLY) == Flag.HAS_FLAGS | Flag.READ_ONLY
    assert not flags & (Flag.SEND_TRIM | Flag.SEND_WRITE_ZEROES | Flag.SEND_FAST_ZERO)


def test_flags_offer_df_only_with_structured_or_extended_replies() -> None:
    assert not flags_of(client().ask(Option.INFO, export_request("disk"))) & Flag.SEND_DF
    for asking in (structured(), extended()):
        assert flags_of(asking.ask(Option.INFO, export_request("disk"))) & Flag.SEND_DF


def test_fast_zero_never_comes_without_write_zeroes() -> None:
    for offer in (DISK, OTHER):
        flags = offer.flags(structured=True)
        assert (Flag.SEND_FAST_ZERO in flags) == (Flag.SEND_WRITE_ZEROES in flags)


def test_multi_conn_is_not_promised_for_an_export_that_cannot() -> None:
    assert Flag.CAN_MULTI_CONN not in Offer("a", 0, multi_conn=False).flags(structured=True)


def test_flags_nothing_implements_are_never_set() -> None:
    for asking in (client(), structured(), extended()):
        flags = flags_of(asking.ask(Option.INFO, export_request("disk")))
        assert not flags & (Flag.BLOCK_STATUS_PAYLOAD | Flag.SEND_RESIZE | Flag.ROTATIONAL)


# structured replies and extended headers


def test_replies_are_simple_unless_structured_were_asked_for() -> None:
    event = client().go()
    assert (event.structured, event.extended) == (False, False)
    event = structured().go()
    assert (event.structured, event.extended) == (True, False)


def test_extended_headers_need_no_structured_replies_and_imply_them() -> None:
    event = extended().go()
    assert (event.structured, event.extended) == (True, True)
    asking = structured()
    assert asking.answer(Option.EXTENDED_HEADERS) == Reply.ACK
    assert asking.go().extended


def test_structured_reply_after_extended_headers_says_so() -> None:
    asking = extended()
    assert asking.answer(Option.STRUCTURED_REPLY) == Reply.ERR_EXT_HEADER_REQD
    assert asking.go().extended


def test_asking_again_for_what_is_agreed_is_acknowledged() -> None:
    asking = structured()
    assert asking.answer(Option.STRUCTURED_REPLY) == Reply.ACK
    asking = extended()
    assert asking.answer(Option.EXTENDED_HEADERS) == Reply.ACK
