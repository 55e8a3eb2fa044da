"""Writing implementations as a user would, outside the repository, and judging them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from sdpo_conformance import Report, run

Judge = Callable[..., Report]

RIGHT = """
from sdpo_implementations.reference.loss import compute_sdpo_loss as right
"""


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    """``judge(source, only=[...])``: write the module, run the suite on it, return the report."""
    monkeypatch.chdir(tmp_path)

    def call(source: str, **options: object) -> Report:
        path = tmp_path / "mine.py"
        path.write_text(RIGHT + textwrap.dedent(source))
        return run(str(path), **{"profile": "quick", "jobs": 1, **options})  # type: ignore[arg-type]

    return call
