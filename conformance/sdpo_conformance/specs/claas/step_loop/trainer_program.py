"""Writing a finding about a trainer as a program of transformers, peft and PyTorch, without this harness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from sdpo_conformance.files import write_tensors, write_text
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.protocol import Sample
from sdpo_conformance.reproduction.loss_program import docstring
from sdpo_conformance.reproduction.program import filled, location
from sdpo_conformance.specs.claas import SPEC
from sdpo_conformance.specs.claas.oracle.step_loop import BETAS, EPSILON, WEIGHT_DECAY
from sdpo_conformance.specs.requirement import Requirement
from sdpo_conformance.trainer.models import (
    CHECKPOINTING,
    CLASSES,
    adapters_of,
    build,
    config_arguments,
)
from sdpo_conformance.trainer.scenarios import Scenario, samples_of


def write_reproduction(
    scenario: Scenario,
    disagreement: Disagreement,
    folder: Path,
    requirement: Requirement,
    target: str,
    device: str,
    samples: Sequence[Sample] | None = None,
) -> str:
    """Write ID.py and ID.safetensors into ``folder``; the name of the program.

    What it shows, ``extra["shows"]``: "gradient" and "metric" against stored truth, or "state", "update",
    "run" and "refusal", which need none.
    """
    extra = disagreement.extra
    model = build(scenario.model)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensors[f"model.{name}"] = tensor.detach().clone().contiguous()
    for name, truth in extra.get("gradient", {}).items():
        tensors[f"expected.gradient.{name}"] = truth.clone()
    config_class, model_class = CLASSES[scenario.model.family]
    given = samples_of(scenario) if samples is None else samples
    first = [f"{target}, distill: {disagreement}", f"Input: {extra.get('words', scenario.words)}"]
    program = filled(
        "trainer",
        docstring(requirement, first, f"transformers, peft, torch and {requirement.id}.safetensors"),
        {
            "TARGET": location(target, SPEC),
            "ENTRY": "distill",
            "DEVICE": device,
            "SEED": scenario.seed,
            "DTYPE": scenario.model.dtype,
            "CONFIG_CLASS": config_class,
            "MODEL_CLASS": model_class,
            "CONFIG": config_arguments(scenario.model),
            "ADAPTERS": adapters_of(scenario.model),
            "ADAPTER": scenario.model.adapter,
            "ATTENTION": scenario.model.attention,
            "CHECKPOINTING": CHECKPOINTING if scenario.model.checkpointing else {},
            "TRAINING": asdict(scenario.training),
            "SAMPLES": [asdict(sample) for sample in given],
            "HISTORY": list(scenario.history),
            "STEP": extra.get("step") or 0,
            "METRIC": extra.get("metric", ""),
            "TRUTH": extra.get("truth", 0.0),
            "BOUND": extra.get("bound", 0.0),
            "BOUNDS": extra.get("bounds", {}),
            "SETTINGS": {
                "lr": scenario.training.learning_rate,
                "betas": list(BETAS),
                "eps": EPSILON,
                "weight_decay": WEIGHT_DECAY,
                "amsgrad": False,
                "maximize": False,
            },
        },
        extra.get("shows", "run"),
    )
    write_tensors(folder / f"{requirement.id}.safetensors", tensors)
    path = folder / f"{requirement.id}.py"
    write_text(path, program)
    return path.name
