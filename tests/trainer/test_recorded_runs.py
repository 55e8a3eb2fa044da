"""The float64 step loop against upstream's recorded runs: metrics and every adapter tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402

from sdpo_conformance.protocol import Sample, TrainingConfig  # noqa: E402
from sdpo_conformance.specs.claas.oracle.step_loop import step_loop  # noqa: E402

CASES = Path(__file__).parents[2] / "cases" / "trainer"
MANIFEST = json.loads((CASES / "manifest.json").read_text())
TOLERANCE = 1e-6
"""Upstream rounds refreshed behaviour log-probs to float32; measured effect below 1e-7."""


def recorded_model(case: dict[str, Any]) -> Any:
    model = MANIFEST["model"]
    config_class = getattr(transformers, model["class"].removesuffix("ForCausalLM") + "Config")
    base = getattr(transformers, model["class"])(config_class(**model["config"])).double()
    base.load_state_dict(load_file(CASES / model["weights"]))
    config = peft.LoraConfig(task_type="CAUSAL_LM", **case["lora"])
    wrapped = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    peft.set_peft_model_state_dict(wrapped, load_file(CASES / case["adapter_before"]))
    return wrapped.eval()


def test_manifest_follows_its_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(MANIFEST, json.loads((CASES / "schema.json").read_text()))


@pytest.mark.parametrize("case", MANIFEST["cases"], ids=lambda case: case["name"])
def test_oracle_reproduces_upstream(case: dict[str, Any]) -> None:
    model = recorded_model(case)
    samples = [Sample(**sample) for sample in case["samples"]]
    truth = step_loop(model, samples, TrainingConfig(**case["training"]))
    expected = case["expected"]
    assert len(truth.steps) == len(expected["per_step_metrics"])
    for got, want in zip(truth.per_step_metrics, expected["per_step_metrics"], strict=True):
        assert got == pytest.approx(want, rel=0, abs=TOLERANCE)
    adapter = peft.get_peft_model_state_dict(model)
    after = load_file(CASES / expected["adapter_after"])
    assert adapter.keys() == after.keys()
    before = load_file(CASES / case["adapter_before"])
    for name, want in after.items():
        assert (adapter[name] - want).abs().max() <= TOLERANCE, name
        assert (before[name] - want).abs().max() > 1000 * TOLERANCE, f"{name} did not move: nothing is tested"
