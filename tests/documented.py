"""Code blocks of the documents, for tests that run them as they are written."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str, title: str = "") -> list[str]:
    """The code blocks of a page in a language, in order. page: from the root of the project. title: of a section; only
    its blocks.
    """
    text = (ROOT / page).read_text()
    if title:
        (text,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert found, f"{page} has no blocks of {language} {title}"
    return found
