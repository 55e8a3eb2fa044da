"""The rule that names a cause fails for its own sake, and the rules that fail because of it do not."""

from __future__ import annotations

from typing import Any

import pytest
from tests.evidence.spec_scores import known_defects, verdict, wrong

from sdpo_conformance.specs import find_spec


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "defect", "others"), [
    ("lasgroup", "lasgroup-count-with-epsilon", ("LAS-DIV-1", "LAS-TOK-1")),
    ("trl", "trl-lengths-with-epsilon", ("TRL-DIV-1", "TRL-TOK-1")),
])  # fmt: skip
def test_an_epsilon_beside_the_count_leads(name: str, defect: str, others: tuple[str, ...], seed: int) -> None:
    spec = find_spec(name)
    found = known_defects(spec)[defect].at(1e-8)
    assert verdict(spec, wrong(found), found.violates[0], seed, "quick", spec.dtypes)[0] == "failed"
    for id in others:
        assert verdict(spec, wrong(found), id, seed, "quick", spec.dtypes)[0] in ("secondary", "passed"), id


@pytest.mark.parametrize(("name", "defect"), [
    ("lasgroup", "lasgroup-tail-clamped-elsewhere"),
    ("trl", "trl-tail-clamped-elsewhere"),
    ("ms-swift", "ms-swift-pairs-reversed"),
    ("lasgroup", "lasgroup-divergence-scaled"),
])  # fmt: skip
def test_each_seed_names_the_cause(name: str, defect: str) -> None:
    spec = find_spec(name)
    found: Any = known_defects(spec)[defect]
    for seed in range(10):
        assert verdict(spec, wrong(found), found.violates[0], seed, "quick", spec.dtypes)[0] == "failed", seed
