"""Writing a finding about a trainer as a program of transformers, peft and PyTorch, without this harness."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from sdpo_conformance.files import write_tensors, write_text
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.protocol import Sample
from sdpo_conformance.reproduction.program import location
from sdpo_conformance.specs import DEFAULT, find_spec
from sdpo_conformance.specs.claas.oracle.step_loop import BETAS, EPSILON, WEIGHT_DECAY
from sdpo_conformance.specs.requirement import Requirement
from sdpo_conformance.trainer.models import CLASSES, build, config_arguments, lora_arguments
from sdpo_conformance.trainer.scenarios import Scenario, samples_of


def environment() -> Environment:
    """Templates of this package; an undefined name is an error."""
    return Environment(
        loader=PackageLoader("sdpo_conformance.reproduction"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


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
    program = (
        environment()
        .get_template("trainer_reproduction.py.jinja")
        .render(
            requirement=requirement,
            target=target,
            disagreement=disagreement,
            words=extra.get("words", scenario.words),
            stem=requirement.id,
            device=device,
            config_class=config_class,
            model_class=model_class,
            config=literal(config_arguments(scenario.model)),
            lora=literal(lora_arguments(scenario.model)),
            dtype=scenario.model.dtype,
            samples=[literal(asdict(sample)) for sample in (samples_of(scenario) if samples is None else samples)],
            training=literal(asdict(scenario.training)),
            seed=scenario.seed,
            history=scenario.history,
            shows=extra.get("shows", "run"),
            step=extra.get("step") or 0,
            bounds=literal(extra.get("bounds", {})),
            metric=extra.get("metric", ""),
            truth=repr(extra.get("truth", 0.0)),
            bound=repr(extra.get("bound", 0.0)),
            settings=literal(
                {
                    "lr": scenario.training.learning_rate,
                    "betas": BETAS,
                    "eps": EPSILON,
                    "weight_decay": WEIGHT_DECAY,
                    "amsgrad": False,
                    "maximize": False,
                }
            ),
            **location(target, find_spec(DEFAULT)),
        )
    )
    write_tensors(folder / f"{requirement.id}.safetensors", tensors)
    path = folder / f"{requirement.id}.py"
    write_text(path, program)
    return path.name


def literal(value: object) -> str:
    """A Python literal of plain data, an entry of a mapping per line."""
    text = json.dumps(value, default=str)
    if not text.startswith("{"):
        return python(text)
    entries = [f"    {json.dumps(key)}: {literal(item)}," for key, item in json.loads(text).items()]
    return "\n".join(["{", *entries, "}"]) if entries else "{}"


def python(text: str) -> str:
    """JSON without mappings as a Python literal; NaN and infinity as float("...")."""
    words = {"null": "None", "true": "True", "false": "False"}
    words |= {name: f'float("{name}")' for name in ("-Infinity", "Infinity", "NaN")}
    strings = re.compile(r'"(?:[^"\\]|\\.)*"|-?\b[A-Za-z]+\b')
    return strings.sub(lambda found: words.get(found.group(), found.group()), text)
