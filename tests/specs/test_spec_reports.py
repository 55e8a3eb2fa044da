"""What a run under another spec leaves and says: refusals that are missing, names of the catalogue, generated pages."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from docs.pages.spec_page import updated
from tests.evidence.spec_scores import known_defects

from sdpo_conformance.inputs.choices import SeededSource
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.records import Record, Status
from sdpo_conformance.protocol import Capability
from sdpo_conformance.report.explaining import explanations
from sdpo_conformance.report.results import diagnosed
from sdpo_conformance.reproduction.failure import failure_of
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.rule_index import defect_index

NAMES = ("lasgroup", "trl", "ms-swift", "verl-topk")


@pytest.mark.parametrize("name", NAMES)
def test_the_catalogue_has_names(name: str) -> None:
    spec = find_spec(name)
    module = importlib.import_module(f"{spec.package}.defects")
    listed = {one.name for one in defect_index(spec)}
    assert {*known_defects(spec), *(one.name for one in module.DIALECTS)} == listed


def test_a_missing_refusal_leaves_a_program(tmp_path: Path) -> None:
    """An input that has to be refused has no truth to store."""
    spec = find_spec("lasgroup")
    corners = importlib.import_module(f"{spec.package}.corners")
    case_module: Any = importlib.import_module(f"{spec.package}.case")
    case = case_module.build(SeededSource("0"), corners.NEUTRAL.but(size="small"), [torch.float32])
    refused = case.with_training(full_logit_distillation=False, alpha=0.5)
    error = Disagreement("loss", "an error", "a number", case=refused, probe="refusal")
    requirement = spec.requirements()["LAS-TOK-3"]
    found = failure_of(tmp_path, "defect:lasgroup-no-tail", "cpu", spec, requirement, Capability.LOSS, error)
    assert (tmp_path / found["reproduction"]).is_file()
    assert (tmp_path / found["observed"]).is_file()
    record = Record(requirement.id, Capability.LOSS.value, requirement.level, Status.FAILED, failure=found)
    implementation: Any = SimpleNamespace(offered=[Capability.LOSS])
    said = diagnosed(tmp_path, [record], implementation, spec)
    assert said is not None
    assert not any("itself failed" in line for line in said["lines"])


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_current(name: str) -> None:
    path = Path(__file__).parents[2] / "docs" / f"spec-{name}.md"
    page = path.read_text(encoding="utf-8")
    assert updated(page, name) == page, f"run python -m docs.pages.spec_page docs/spec-{name}.md"


@pytest.mark.parametrize("name", ["LAS-TAIL-1", "TRL-SRV", "ms-swift-shift-across-rows"])
def test_names_of_other_specs_are_explained(name: str) -> None:
    """Without --spec: a report prints them."""
    assert explanations(name, find_spec("claas"))
