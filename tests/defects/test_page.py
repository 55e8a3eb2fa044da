"""docs/diagnosis.md is what the catalogue says today."""

from __future__ import annotations

from pathlib import Path

import pytest
from docs.pages.diagnosis_page import page

PAGE = Path(__file__).parents[2] / "docs" / "diagnosis.md"


def test_the_page_is_current() -> None:
    if not PAGE.is_file():
        pytest.skip("no docs beside the tests")
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m docs.pages.diagnosis_page docs/diagnosis.md"
