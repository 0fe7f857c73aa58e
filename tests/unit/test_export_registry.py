"""The registry of export kinds, and states of former versions, which had one kind."""

from __future__ import annotations

import msgspec
import pytest

from blkloom.control.states import ExportState, Label, export_key, export_label
from blkloom.errors import UsageError
from blkloom.export.registry import DEFAULT, endpoints, export_server


def test_an_export_that_a_former_version_wrote_down_is_nbd() -> None:
    written = b'{"id":"auto","name":"disk","unix":"/run/blkloom/dev/disk","automatic":true}'
    export = msgspec.json.decode(written, type=ExportState)
    assert (export.kind, export.address) == ("nbd", "/run/blkloom/dev/disk")


def test_a_listening_socket_is_found_under_the_label_of_a_former_version() -> None:
    label = Label(device=3, load=0, role="listen", key="e1")
    assert export_label(3, "e1", endpoints("nbd").role, "") == label
    assert export_key(label) == ("e1", "")


def test_descriptors_of_an_endpoint_are_told_apart_by_their_keys() -> None:
    labels = {export_label(3, "e1", "listen", key) for key in ("", "a", "b/c")}
    assert {export_key(label) for label in labels} == {("e1", ""), ("e1", "a"), ("e1", "b/c")}


def test_a_kind_that_there_is_not_is_an_error_which_names_those_there_are() -> None:
    for find in (endpoints, export_server):
        with pytest.raises(UsageError, match=f"there are no exports of kind 'tape'; there are: {DEFAULT}"):
            find("tape")
