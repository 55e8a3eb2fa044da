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
    """The record's failure entry; writes the reproduction and what was observed beside it. An input that is no
    ``Case`` comes with its own ways to be written, in ``extra``."""
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
            "probe": error.probe,
            "secondary": False,
            "where": error.where,
        }
        outcome = None
    case = error.case
    if case is not None:
        key = record_key(requirement.id, entry.value)
        found["words"] = "; ".join(filter(None, [spec.parts.describe(case), not_finite(case, outcome)]))
        found["observed"] = save_observed(folder, key, case, outcome)
        other = error.extra.get("other") if isinstance(error, Disagreement) else None
        found["reproduction"] = write_reproduction(
            folder, key, target, device, spec, requirement, entry, found, case, other
        )
    else:
        found["words"] = error.extra.get("words", "")
        kept = ("shows", "mistake", "evidence", "metrics", "scenario", "step", "seed")
        found.update({key: error.extra[key] for key in kept if error.extra.get(key) is not None})
        if "observed" in error.extra:
            name = observed_path(record_key(requirement.id, entry.value))
            error.extra["observed"](folder / name)
            found["observed_head"] = name
        if "reproduction" in error.extra:
            found["reproduction"] = error.extra["reproduction"](folder, requirement, target, device)
    return found


def not_finite(case: Case, outcome: Outcome | None) -> str:
    """Which tensors hold NaN or infinities, and where first: inputs, then results and gradients."""
    tensors: dict[str, Tensor] = dict(case.tensors())
    if outcome is not None:
        tensors |= {f"result {name}": value for name, value in outcome.result.items() if isinstance(value, Tensor)}
        tensors |= {f"gradient to {name}": value for name, value in outcome.gradients.items() if value is not None}
    found = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        kinds = {"NaN": tensor.isnan(), "-inf": tensor == -torch.inf, "inf": tensor == torch.inf}
        for kind, mask in kinds.items():
            if bool(mask.any()):
                places = mask.nonzero()
                first = f" at ({', '.join(map(str, places[0].tolist()))})" if tensor.dim() else ""
                more = f" and {len(places) - 1} more" if len(places) > 1 else ""
                found.append(f"{kind} in {name}{first}{more}")
    return ", ".join(found)


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
    name = observed_path(key)
    case.save(folder / name, extra)
    return name


def observed_path(key: str) -> str:
    """Where a run's folder keeps what was observed of a failure."""
    return f"observed/{key}.safetensors"
