"""Rules about a trainer's step that call the loss on parts of a batch: who meets them, who does not, what is left."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evidence.spec_scores import verdict
from tests.programs import Programs

from sdpo_conformance.running.options import RunOptions
from sdpo_conformance.running.process import run_with
from sdpo_conformance.specs import find_spec

CUT = {"lasgroup": "LAS-AGG-1", "trl": "TRL-AGG-1", "ms-swift": "MSS-AGG-2", "verl-topk": "VTK-AGG-1"}


def reference(name: str) -> Any:
    return importlib.import_module(find_spec(name).bundled["reference"]).compute_sdpo_loss


@pytest.mark.parametrize("name", CUT)
def test_the_reference_does_not_depend_on_the_cut(name: str) -> None:
    assert verdict(find_spec(name), reference(name), CUT[name], 3, "quick", ("float32", "float64"))[0] == "passed"


@pytest.mark.parametrize("name", CUT)
def test_a_loss_that_reports_nothing_else_is_not_accused(name: str) -> None:
    """No metric, no count: what is optional may be left out."""
    spec = find_spec(name)

    def alone(loss_input: Any) -> Any:
        return {"loss": reference(name)(loss_input)["loss"]}

    for id, rule in spec.requirements().items():
        if rule.family.endswith(("AGG", "MET")):
            assert verdict(spec, alone, id, 0, "quick", ("float32",))[0] == "passed", id


def test_its_own_mean_is_found_though_each_call_is_right() -> None:
    """verl#7200: right where the call is the whole batch, and not where it is a part."""
    spec = find_spec("verl-topk")

    def own_mean(loss_input: Any) -> Any:
        result = dict(reference("verl-topk")(loss_input))
        if loss_input.training.loss_agg_mode == "token-mean":
            tokens = loss_input.response_mask.double().sum().clamp(min=1.0)
            result["loss"] = result["loss"] * (loss_input.training.batch_num_tokens / tokens).to(torch.float64)
        return result

    found = verdict(spec, own_mean, "VTK-AGG-1", 0, "quick", ("float64",))
    assert found[0] == "failed", found


@pytest.mark.parametrize(
    ("spec", "defect", "rule"),
    [
        ("lasgroup", "lasgroup-counts-ignored", "LAS-AGG-1"),
        ("lasgroup", "lasgroup-logs-before-weights", "LAS-MET-1"),
        ("trl", "trl-row-lengths-kept", "TRL-AGG-1"),
        ("ms-swift", "ms-swift-count-kept", "MSS-AGG-1"),
    ],
)
def test_the_program_shows_it(spec: str, defect: str, rule: str, tmp_path: Path, programs: Programs) -> None:
    options = RunOptions(spec=spec, profile="quick", only=(rule,), jobs=1, out=tmp_path / "run")
    report = run_with(f"defect:{defect}", options)
    (record,) = report.results["records"]
    assert record["status"] == "failed"
    program = report.folder / record["failure"]["reproduction"]
    assert programs.run(program).returncode == 1


def test_a_family_may_be_named() -> None:
    RunOptions(spec="lasgroup", only=("LAS-AGG",))
