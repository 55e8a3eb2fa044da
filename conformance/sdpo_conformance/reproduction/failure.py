"""A failure on disk: what was expected and got, the input in words, and the files that reproduce it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.cases.case import Case
from sdpo_conformance.judging.call import ImplementationError, Outcome
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.records import record_key
from sdpo_conformance.protocol import Capability
from sdpo_conformance.reproduction.loss_program import write_reproduction
from sdpo_conformance.specs.requirement import Requirement
from sdpo_conformance.specs.spec import Spec


def failure_of(
    folder: Path,
    target: str,
    device: str,
    spec: Spec,
    requirement: Requirement,
    entry: Capability,
    error: Disagreement | ImplementationError,
) -> dict[str, Any]:
    """The record's failure entry; writes the reproduction and what was observed beside it."""
    if isinstance(error, Disagreement):
        found = {
            "kind": "disagreement",
            "summary": str(error),
            "aspect": error.aspect,
            "expected": error.expected,
            "got": error.got,
            "detail": error.detail,
            "probe": error.probe,
            "secondary": error.secondary,
        }
        outcome = error.outcome
    else:
        found = {
            "kind": "error",
            "summary": error.summary,
            "aspect": entry.value,
            "expected": "a result",
            "got": error.summary,
            "detail": error.details,
            "probe": "raises",
            "secondary": False,
        }
        outcome = None
    case = error.case
    if case is not None:
        key = record_key(requirement.id, entry.value)
        found["words"] = spec.parts.describe(case)
        found["observed"] = save_observed(folder, key, case, outcome)
        other = error.extra.get("other") if isinstance(error, Disagreement) else None
        found["reproduction"] = write_reproduction(
            folder, key, target, device, spec, requirement, entry, found, case, other
        )
    else:
        found["words"] = error.extra.get("words", "") if isinstance(error, Disagreement) else ""
        if isinstance(error, Disagreement) and "reproduction" in error.extra:
            found["reproduction"] = error.extra["reproduction"](folder, requirement, target, device)
    return found


def save_observed(folder: Path, key: str, case: Case, outcome: Outcome | None) -> str:
    """The failing case with what the implementation returned on it, for the diagnosis; its file name."""
    extra: dict[str, Tensor] = {}
    if outcome is not None:
        for name in outcome.result:
            try:
                extra[f"got.{name}"] = outcome.number(name).clone()
            except ImplementationError:
                continue
        for name, gradient in outcome.gradients.items():
            if gradient is not None:
                extra[f"got.gradient.{name}"] = gradient.to(torch.float64).clone()
    path = folder / "observed" / f"{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    case.save(path, extra)
    return str(path.relative_to(folder))
