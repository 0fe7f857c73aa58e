"""The lint of module docstrings: which first words it accepts, and which not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "docstrings.py"


@pytest.fixture(scope="module")
def complaint() -> Callable[[str], str]:
    """The check of one module's source."""
    spec = importlib.util.spec_from_file_location("docstrings", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[str], str] = module.complaint
    return found


@pytest.mark.parametrize(
    "first", ["Error counters of one image.", "Opens images.", "In-process I/O.", "`python -m blkloom`.", "One export."]
)
def test_a_noun_or_verb_phrase_passes(complaint: Callable[[str], str], first: str) -> None:
    assert complaint(f'"""{first}\n\nWhat it does.\n"""\n') == ""


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ('"""What goes wrong with an image."""', "begins with 'What'"),
        ('"""Who is there?"""', "begins with 'Who'"),
        ('"""Of one image: counters."""', "begins with 'Of'"),
        ('""" """', "is missing"),
        ("value = 1", "is missing"),
    ],
)
def test_a_first_line_that_refers_elsewhere_does_not(complaint: Callable[[str], str], source: str, wrong: str) -> None:
    assert wrong in complaint(source)
