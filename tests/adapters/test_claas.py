"""CLaaS through its adapters against what CLaaS was recorded to do. Runs where CLaaS is importable."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("claas.training.sdpo_loss")

from safetensors.torch import load_file
from sdpo_conformance.cases import recorded_cases
from sdpo_conformance.protocol import Sample, TrainingConfig
from sdpo_implementations.adapters import claas

RUNS = Path(__file__).parents[2] / "cases" / "trainer"
MANIFEST = json.loads((RUNS / "manifest.json").read_text())


@pytest.mark.parametrize("recorded", list(recorded_cases()), ids=lambda recorded: recorded[0].name)
def test_loss_returns_what_was_recorded(recorded: Any) -> None:
    case, entry = recorded
    logits = case.loss_input.student_logits.clone().requires_grad_()
    result = claas.compute_sdpo_loss(SimpleNamespace(**vars(case.loss_input) | {"student_logits": logits}))
    (gradient,) = torch.autograd.grad(result["loss"], logits)
    result["loss"] = result["loss"].item()
    assert result == pytest.approx(entry["expected"], rel=1e-12, abs=1e-15, nan_ok=True)
    largest = entry["gradient"].nan_to_num().abs().max().item()
    torch.testing.assert_close(gradient, entry["gradient"], rtol=0, atol=1e-15 + 1e-14 * largest, equal_nan=True)


def recorded_model(case: dict[str, Any]) -> Any:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = MANIFEST["model"]
    config_class = getattr(transformers, model["class"].removesuffix("ForCausalLM") + "Config")
    base = getattr(transformers, model["class"])(config_class(**model["config"])).double()
    base.load_state_dict(load_file(RUNS / model["weights"]))
    config = peft.LoraConfig(task_type="CAUSAL_LM", **case["lora"])
    wrapped = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    peft.set_peft_model_state_dict(wrapped, load_file(RUNS / case["adapter_before"]))
    return wrapped


@pytest.mark.parametrize("case", MANIFEST["cases"], ids=lambda case: case["name"])
def test_trainer_repeats_the_recorded_run(case: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    model = recorded_model(case)
    storage = sys.modules.get("claas.training.storage")
    samples = [Sample(**sample) for sample in case["samples"]]
    got = claas.distill(model, samples, TrainingConfig(**case["training"]), torch.optim.AdamW)
    assert sys.modules.get("claas.training.storage") is storage, "the user's LoRA store was replaced"
    for step, want in zip(got["per_step_metrics"], case["expected"]["per_step_metrics"], strict=True):
        assert step == pytest.approx(want, rel=1e-9, abs=1e-12)
    adapter = peft.get_peft_model_state_dict(model)
    for name, want in load_file(RUNS / case["expected"]["adapter_after"]).items():
        torch.testing.assert_close(adapter[name], want, rtol=0, atol=1e-12)


def test_trainer_refuses_what_upstream_refuses() -> None:
    case = MANIFEST["cases"][0]
    training = TrainingConfig(**case["training"])
    sample = Sample(**{**case["samples"][0], "response_logprobs": None})
    short = Sample(**{**case["samples"][0], "response_logprobs": [-1.0]})
    for samples in ([], [sample], [short]):
        with pytest.raises(ValueError):
            claas.distill(recorded_model(case), samples, training, torch.optim.AdamW)
