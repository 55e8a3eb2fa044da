"""CLaaS through its adapters against what CLaaS was recorded to do. Runs where CLaaS is importable."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip(
    "claas.training.sdpo_loss", reason="needs upstream's own code on PYTHONPATH: kfallah/CLaaS at e2331f7"
)

from sdpo_conformance.protocol import Sample, TrainingConfig
from sdpo_conformance.specs.claas.loss_case import recorded_cases
from sdpo_implementations.adapters import claas


@pytest.mark.parametrize("recorded", list(recorded_cases()), ids=lambda recorded: recorded[0].name)
def test_loss_returns_what_was_recorded(recorded: Any) -> None:
    case, entry = recorded
    logits = case.loss_input.student_logits.clone().requires_grad_()
    result = claas.compute_sdpo_loss(SimpleNamespace(**vars(case.loss_input) | {"student_logits": logits}))
    (gradient,) = torch.autograd.grad(result["loss"], logits)
    result["loss"] = result["loss"].item()
    assert result == pytest.approx(entry["expected"], rel=1e-12, abs=1e-15, nan_ok=True)
    largest = entry["gradient"].nan_to_num().abs().max().item()
    bound = 1e-15 + 1e-14 * largest
    torch.testing.assert_close(gradient, entry["gradient"], rtol=0, atol=bound, equal_nan=True)


def test_trainer_repeats_the_recorded_run(recorded_run: dict[str, Any], repeat: Any) -> None:
    storage = sys.modules.get("claas.training.storage")
    repeat(claas.distill, recorded_run, 1e-9)
    assert sys.modules.get("claas.training.storage") is storage, "the user's LoRA store was replaced"


def test_trainer_refuses_what_upstream_refuses(run_named: Any, model_of: Any) -> None:
    run = run_named("one_step_on_policy")
    training = TrainingConfig(**run["training"])
    silent = Sample(**{**run["samples"][0], "response_logprobs": None})
    short = Sample(**{**run["samples"][0], "response_logprobs": [-1.0]})
    for samples in ([], [silent], [short]):
        with pytest.raises(ValueError, match=r"samples|response_logprobs"):
            claas.distill(model_of(run), samples, training, torch.optim.AdamW)
