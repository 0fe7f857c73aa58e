"""The choice of a way to attach."""

from __future__ import annotations

import pytest

from blkloom.attach.registry import choose
from blkloom.errors import CannotAttach


def test_a_way_over_another_export_than_the_caller_serves_is_refused() -> None:
    with pytest.raises(CannotAttach, match="ublk: only devices of a supervisor"):
        choose("ublk", export="fuse")
