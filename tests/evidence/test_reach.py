"""The scenarios reach what docs/evidence.md says, and a few conditional mutants of every kind are caught in quick."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tests.evidence import conditional_mutants, trainer_reach
from tests.evidence.predicates import CALLS, HEADS, INCOMING, LOSS, SAMPLES

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence.md"

QUICK = (
    ("trainer", "left behind: the adapter frozen", "STEP"),
    ("loss", "loss: zeros among fractions", "RED"),
    ("loss", "loss: is_clip is infinite", "IS"),
    ("loss", "gradient: 0.3 < alpha < 0.5", "GJS"),
    ("loss", "left behind: Python's random state seeded", "GRAD"),
    ("fused", "fused: the head is a parameter", "GRAD"),
    ("head", "top-k: k < 0", "TK"),
    ("head", "log-probs: a row of the head is 0", "LP"),
    ("head", "top-k: a token is certain", "TK"),
    ("head", "top-k: logits above 200", "TK"),
)
"""Kind, mutant, and the family that catches it."""


def test_the_page_states_the_reach() -> None:
    page = EVIDENCE.read_text(encoding="utf-8")
    missing = [line for line in trainer_reach.markdown().splitlines() if line not in page]
    assert not missing, "python -m tests.evidence.trainer_reach prints the table for docs/evidence.md"


def test_scenarios_reach_every_condition() -> None:
    assert [words for words, scenarios in trainer_reach.visits() if not scenarios] == []


def test_there_are_two_hundred_conditions() -> None:
    left = len(conditional_mutants.LEFT)
    assert len(CALLS) + len(SAMPLES) + len(LOSS) + len(INCOMING) + 2 * len(HEADS) + left >= 200


@pytest.mark.parametrize(("kind", "name", "family"), QUICK)
def test_conditional_mutant_is_caught_in_quick(kind: str, name: str, family: str) -> None:
    assert conditional_mutants.kill(kind, "quick", [name], (family,))[name] is not None
