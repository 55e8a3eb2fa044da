"""Writing a failing case as a program of plain PyTorch that shows it without this harness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.cases.case import Case, divergence_incoming
from sdpo_conformance.files import write_text
from sdpo_conformance.judging.expectation import Expectations
from sdpo_conformance.protocol import Capability
from sdpo_conformance.reproduction.program import filled, location
from sdpo_conformance.specs.requirement import Requirement
from sdpo_conformance.specs.spec import Spec


def docstring(requirement: Requirement, first: Sequence[str], needs: str) -> str:
    """What a program says about itself."""
    return "\n".join(
        [
            f"{requirement.id} ({requirement.level}): {requirement.statement}",
            "",
            *first,
            f"Source of the rule: {requirement.source}",
            "",
            f"{needs}; exits 1 while the defect is there, 0 once it is gone, 125 where it cannot run.",
        ]
    )


def write_reproduction(
    folder: Path,
    key: str,
    target: str,
    device: str,
    spec: Spec,
    requirement: Requirement,
    entry: Capability,
    failure: dict[str, Any],
    case: Case,
    other: Case | None = None,
) -> str:
    """Write ``key``.py and ``key``.safetensors into ``folder``; the name of the program."""
    words = [f"{target}, {entry.value}: {failure['summary']}", f"Input: {failure['words']}"]
    program = filled(
        "loss",
        docstring(requirement, words, f"Plain PyTorch and {key}.safetensors"),
        {
            "TARGET": location(target, spec),
            "ENTRY": entry.value,
            "DEVICE": device,
            "TRAINING": asdict(case.training),
            "OTHER_TRAINING": {} if other is None else asdict(other.training),
            "FIELDS": list(case.tensors()),
            "ABSENT": [name for name, value in vars(case.loss_input).items() if value is None],
            "DIFFERENTIABLE": list(case.differentiable),
            "LAYOUT": case.layout,
            "OUTPUT": "divergence" if entry is Capability.DIVERGENCE else "loss",
        },
        failure["probe"],
    )
    refused = failure["probe"] == "refusal"  # an input that has to be refused has no truth
    expected = Expectations({}, {}, False) if refused else spec.parts.expectations(case, entry)
    case.save(folder / f"{key}.safetensors", stored_truth(case, entry, expected, other))
    path = folder / f"{key}.py"
    write_text(path, program)
    return path.name


def stored_truth(case: Case, entry: Capability, expected: Expectations, other: Case | None) -> dict[str, Tensor]:
    """Truth and bounds, the incoming gradient, and the second input where there is one."""
    tensors = {}
    for kind, group in (("", expected.results), ("gradient.", expected.gradients)):
        for name, expectation in group.items():
            tensors[f"expected.{kind}{name}"] = expectation.value.clone()
            tensors[f"bound.{kind}{name}"] = expectation.bound.clone()
    divergence = entry is Capability.DIVERGENCE
    tensors["incoming"] = divergence_incoming(case) if divergence else torch.tensor(case.incoming)
    if other is not None:
        tensors.update({f"other.{name}": tensor.clone() for name, tensor in other.tensors().items()})
    return tensors
