"""Comparing what an implementation returned with what is true, and saying where it first goes wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.cases.case import Case
from sdpo_conformance.judging.call import ImplementationError, Outcome
from sdpo_conformance.judging.expectation import Expectation, Expectations

GRADIENT = "gradient"

RATIO_METRICS = ("mean_is_ratio", "clip_fraction")


@dataclass
class Disagreement(AssertionError):
    """A rule is broken: ``aspect`` says of which quantity, ``expected`` and ``got`` are for people.

    ``case`` and ``outcome`` show it; ``probe`` names the kind of check, for the reproduction; ``detail`` is a
    sentence more, or empty; ``secondary``: the same quantity is wrong already on the control input, where the
    rule under test plays no part.
    """

    aspect: str
    expected: str
    got: str
    case: Case | None = None
    outcome: Outcome | None = None
    probe: str = "values"
    detail: str = ""
    secondary: bool = False
    excess: float = math.inf
    extra: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.aspect}: expected {self.expected}, got {self.got}"
        return f"{text} ({self.detail})" if self.detail else text


def number(value: float) -> str:
    """A float for people: seven significant digits."""
    return f"{value:.7g}"


def worst(expectation: Expectation, got: Tensor) -> tuple[float, tuple[int, ...]]:
    """The largest excess over the bound and where it is; 0 where there is none."""
    if bool(((got - expectation.value).abs() <= expectation.bound).all()):
        return 0.0, ()
    excess = expectation.excess(got)
    largest, flat = excess.reshape(-1).max(0)
    where, rest = [], int(flat)
    for size in reversed(excess.shape):
        rest, index = divmod(rest, size)
        where.append(index)
    return float(largest), tuple(reversed(where))


def scalar_disagreement(key: str, expectation: Expectation, outcome: Outcome) -> Disagreement | None:
    """Compare one result of the mapping."""
    got = outcome.number(key)
    if got.shape != expectation.value.shape:
        if got.numel() != 1 or expectation.value.dim() != 0:
            raise ImplementationError(f"{key} has shape {tuple(got.shape)}, expected {tuple(expectation.value.shape)}")
        got = got.reshape(())
    excess, where = worst(expectation, got)
    if excess <= 1:
        return None
    place = f"[{', '.join(map(str, where))}]" if where else ""
    return Disagreement(
        aspect=f"{key}{place}",
        expected=number(float(expectation.value[where] if where else expectation.value)),
        got=number(float(got[where] if where else got)),
        excess=excess,
    )


def rounded_once(key: str, expected: Expectations, outcome: Outcome) -> bool:
    """Whether a metric is a tensor whose distance from the truth is one rounding to the tensor's dtype."""
    given, expectation = outcome.result[key], expected.results[key]
    if not isinstance(given, Tensor) or not given.is_floating_point():
        return False
    distance = (outcome.number(key) - expectation.value).abs()
    allowed = expectation.bound + 0.5 * torch.finfo(given.dtype).eps * expectation.value.abs()
    return bool((distance <= allowed).all())


def gradient_disagreement(key: str, expectation: Expectation, outcome: Outcome) -> Disagreement | None:
    """Compare the gradient to one field, element by element."""
    got = outcome.gradients.get(key)
    if got is None:
        if not bool((expectation.value.abs() > expectation.bound).any()):
            return None
        largest = number(float(expectation.value.abs().max()))
        return Disagreement(f"gradient to {key}", f"entries up to {largest}", "no gradient at all")
    excess, where = worst(expectation, got)
    if excess <= 1:
        return None
    return Disagreement(
        aspect=f"gradient to {key}[{', '.join(map(str, where))}]",
        expected=number(float(expectation.value[where])),
        got=number(float(got[where])),
        excess=excess,
        detail=gradient_words(expectation.value, got),
    )


def gradient_words(expected: Tensor, got: Tensor) -> str:
    """How two gradients relate as a whole, when that says more than one element."""
    if not bool(torch.isfinite(got).all()):
        return "the gradient is not finite"
    if not bool(got.any()):
        return "the gradient is zero everywhere"
    scale = float((expected * got).sum() / (expected * expected).sum().clamp(min=1e-300))
    residue = float((got - scale * expected).norm() / got.norm())
    if residue < 1e-3 and abs(scale - 1) > 1e-3:
        return f"the whole gradient is {number(scale)} times the true one"
    return ""


def compare(case: Case, outcome: Outcome, aspects: Iterable[str], expected: Expectations) -> Disagreement | None:
    """The first disagreement among ``aspects`` (result keys, or "gradient"), or None.

    A metric that the result lacks, or that was rounded once to its own dtype, is the finding of a requirement of its
    own: both are passed over while another aspect is judged.
    """
    wanted = [aspect for aspect in aspects if aspect == GRADIENT or aspect in expected.results]
    judged = [aspect for aspect in wanted if aspect == GRADIENT or aspect in outcome.result]
    lenient = set(wanted) != set(RATIO_METRICS)
    for aspect in judged or wanted:
        if aspect == GRADIENT:
            found = [gradient_disagreement(key, value, outcome) for key, value in expected.gradients.items()]
        else:
            found = [scalar_disagreement(aspect, expected.results[aspect], outcome)]
            if lenient and aspect in RATIO_METRICS and rounded_once(aspect, expected, outcome):
                continue
        for disagreement in found:
            if disagreement is not None:
                disagreement.case, disagreement.outcome = case, outcome
                return disagreement
    return None
