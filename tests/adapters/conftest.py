"""Upstream's recorded runs, ready to be repeated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RUNS = Path(__file__).parents[2] / "cases" / "trainer"
MANIFEST = json.loads((RUNS / "manifest.json").read_text())


def recorded_model(case: dict[str, Any]) -> Any:
    """A recorded run's PEFT model with the adapter it started from."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    from safetensors.torch import load_file

    model = MANIFEST["model"]
    config_class = getattr(transformers, model["class"].removesuffix("ForCausalLM") + "Config")
    base = getattr(transformers, model["class"])(config_class(**model["config"])).double()
    base.load_state_dict(load_file(RUNS / model["weights"]))
    config = peft.LoraConfig(task_type="CAUSAL_LM", **case["lora"])
    wrapped = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    peft.set_peft_model_state_dict(wrapped, load_file(RUNS / case["adapter_before"]))
    return wrapped


def repeat_run(distill: Callable[..., Any], case: dict[str, Any], tolerance: float | None = None) -> Any:
    """The per-step metrics of ``distill`` on a recorded case; with a ``tolerance`` they, and every tensor of
    the final adapter, must be those recorded."""
    import torch
    from safetensors.torch import load_file

    from sdpo_conformance.protocol import Sample, TrainingConfig

    peft = pytest.importorskip("peft")
    model = recorded_model(case)
    samples = [Sample(**sample) for sample in case["samples"]]
    steps = distill(model, samples, TrainingConfig(**case["training"]), torch.optim.AdamW)["per_step_metrics"]
    if tolerance is not None:
        for step, want in zip(steps, case["expected"]["per_step_metrics"], strict=True):
            assert step == pytest.approx(want, rel=tolerance, abs=tolerance)
        adapter = peft.get_peft_model_state_dict(model)
        for name, want in load_file(RUNS / case["expected"]["adapter_after"]).items():
            assert (adapter[name] - want).abs().max() <= tolerance, name
    return steps


@pytest.fixture(params=MANIFEST["cases"], ids=lambda case: case["name"])
def recorded_run(request: pytest.FixtureRequest) -> Any:
    """Each recorded run's manifest entry."""
    return request.param


@pytest.fixture
def run_named() -> Callable[[str], dict[str, Any]]:
    """A recorded run's manifest entry by name."""
    return {case["name"]: case for case in MANIFEST["cases"]}.__getitem__


@pytest.fixture
def model_of() -> Callable[[dict[str, Any]], Any]:
    return recorded_model


@pytest.fixture
def repeat() -> Callable[..., Any]:
    return repeat_run
