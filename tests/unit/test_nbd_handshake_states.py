"""The table of state transitions: it is complete and documented, and the handshake follows it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from blkloom.export.nbd.codes import Reply
from blkloom.export.nbd.events import Event, Greeting
from blkloom.export.nbd.handshake import Handshake
from blkloom.export.nbd.offer import Catalogue
from blkloom.export.nbd.state import TRANSITIONS, ProtocolError, State, transitions_as_markdown


def test_every_state_has_a_row_and_every_event_a_place() -> None:
    assert set(TRANSITIONS) == set(State)
    assert {event for row in TRANSITIONS.values() for event in row} == {*get_args(Event), ProtocolError}


def test_every_state_is_reached() -> None:
    assert {after for row in TRANSITIONS.values() for after in row.values()} == set(State) - {State.GREETING}


def test_documentation_shows_the_table_as_it_is() -> None:
    documentation = Path(__file__).parents[2] / "docs" / "nbd.md"
    assert transitions_as_markdown() in documentation.read_text()


def test_handshake_that_is_over_takes_no_more_data() -> None:
    handshake = Handshake(Catalogue.of())
    assert isinstance(handshake.next_event(), Greeting)
    handshake.receive_data(b"\xff\xff\xff\xff")
    with pytest.raises(ProtocolError):
        handshake.next_event()
    assert handshake.next_event() is None
    with pytest.raises(ProtocolError, match="over"):
        handshake.receive_data(b"more")


def test_errors_are_the_replies_with_bit_31() -> None:
    assert {reply for reply in Reply if reply.is_error} == {reply for reply in Reply if reply.name.startswith("ERR_")}
