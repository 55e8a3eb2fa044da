"""The specs beside CLaaS: right losses pass, and a sample of the catalogue is caught by the rule that names it."""

from __future__ import annotations

import importlib

import pytest
from tests.evidence.spec_scores import known_defects, verdict, wrong
from tests.specs.right import right_losses

from sdpo_conformance.specs import find_spec

NAMES = ("lasgroup", "trl", "ms-swift", "verl-topk")
SAMPLE = 9
"""Every ninth entry: the whole catalogue is ``tests.evidence.spec_scores``'s."""


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_names_a_rule(name: str) -> None:
    spec = find_spec(name)
    module = importlib.import_module(f"{spec.package}.defects")
    known = spec.requirements()
    for defect in (*known_defects(spec).values(), *module.DIALECTS):
        assert set(defect.violates) <= set(known), defect.name
        assert defect.touched, defect.name


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_caught(name: str) -> None:
    spec = find_spec(name)
    for defect in list(known_defects(spec).values())[::SAMPLE]:
        found = verdict(spec, wrong(defect), defect.violates[0], 0, "quick", spec.dtypes)
        assert found[0] == "failed", (defect.name, found)


@pytest.mark.parametrize("name", NAMES)
def test_right_losses_pass_the_sweep(name: str) -> None:
    spec = find_spec(name)
    sweep = spec.sweeps[0]
    for words, (function, dtypes) in right_losses(name).items():
        found = verdict(spec, function, sweep, 1, "quick", dtypes)
        assert found[0] == "passed", (words, found)
