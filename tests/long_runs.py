"""Tests that take long: `make test` runs short versions of them, or none; `make survival` runs them whole."""

from __future__ import annotations

import os

import pytest

LONG = os.environ.get("BLKLOOM_LONG") == "1"
"""Whether the whole versions are wanted."""
only_long = pytest.mark.skipif(not LONG, reason="takes long (make survival)")
