"""The diagnosis of a run by a spec beside CLaaS: which entry of its catalogue returns what was returned.

Each entry is run in float64 on the failing inputs; one that comes with a number has the number fitted to the first
failing input and judged on all. A name is said where it explains more than half of what values can explain.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sdpo_conformance.judging.call import ImplementationError, Outcome, evaluate
from sdpo_conformance.judging.cross_check import SURE, breaks_what_held, judged_in, left_standing
from sdpo_conformance.judging.expectation import Expectation
from sdpo_conformance.judging.likeness import MOST_ERROR, coarsest, largest, left, likeness, nearer, roundoff, share
from sdpo_conformance.judging.records import Record, Status, read_records
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.requirement import Level
from sdpo_conformance.specs.shared.autograd_rules import CHANGED, second_call
from sdpo_conformance.specs.shared.defect import SpecDefect, combine
from sdpo_conformance.specs.shared.micro_batch_rules import SHARES, steps
from sdpo_conformance.specs.shared.spec_case import CaseKind, SpecCase
from sdpo_conformance.specs.spec import Spec

GRADIENT = "gradient."

LOOKED_AT = 4
"""Failures on which every entry is tried; what fits one of them is tried on all."""

ENOUGH = 0.8
"""Share of the failures from which on a name is said: what explains less is mostly a neighbour of the cause."""

GRID = 24
"""Points between a parameter's ends that are tried before the best is refined."""

REFINEMENTS = 40
MOST_EQUIVALENTS = 3
MOST_PAIRS = 400

NO_MATCH = "no catalogued defect or dialect returns what this implementation returned"
MISSING = re.compile(r"has no attribute '(\w+)'")

FIELDS: Mapping[str, tuple[str, ...]] = {
    "teacher_indices": ("claas",),
    "base_logprobs": ("claas",),
    "old_student_logprobs": ("claas",),
    "old_log_probs": ("lasgroup",),
    "rollout_is_weights": ("lasgroup",),
    "rollout_log_probs": ("lasgroup",),
    "completion_ids": ("trl",),
    "completion_mask": ("trl",),
    "old_per_token_logps": ("trl",),
    "self_distillation_mask": ("lasgroup", "trl"),
    "labels": ("ms-swift",),
    "teacher_labels": ("ms-swift",),
    "teacher_ids": ("verl-topk",),
    "teacher_logits": ("lasgroup", "trl", "ms-swift"),
    "teacher_logprobs": ("claas", "verl-topk"),
    "response_ids": ("claas", "lasgroup"),
}
"""A field of the input -> the specs whose input has it."""


@dataclass(frozen=True)
class Candidate:
    """An entry, its number fitted, and the failures that it explains."""

    defect: SpecDefect
    explained: frozenset[int]
    error: float
    value: float | None = None

    @property
    def name(self) -> str:
        number = (
            f" ({self.defect.parameter.name} {self.value:.4g})"
            if self.value is not None and self.defect.parameter
            else ""
        )
        return f"{self.defect.name}{number}"


@dataclass(frozen=True)
class Fit:
    """Whether a failure is as predicted, and the largest relative deviation."""

    matched: bool
    error: float


@dataclass(frozen=True, eq=False)
class Observed:
    """One failure: the input and what came back, ``values`` by result key and ``gradient.<field>``, float64."""

    requirement: str
    case: SpecCase
    values: Mapping[str, Tensor]
    probe: str
    secondary: bool

    @classmethod
    def load(cls, path: Path, kind: CaseKind, record: Record) -> Observed:
        """Read what a run left of a failure."""
        values = {
            name.removeprefix("got."): tensor.double()
            for name, tensor in load_file(path).items()
            if name.startswith("got.")
        }
        probe, secondary = str(record.failure.get("probe", "values")), bool(record.failure.get("secondary"))
        return cls(record.requirement, SpecCase.load(path, kind), values, probe, secondary)

    @cached_property
    def exact(self) -> SpecCase:
        """The same numbers in float64."""
        floats = {key: value.double() for key, value in self.case.tensors().items() if value.is_floating_point()}
        return self.case.with_fields(**floats)

    @property
    def numeric(self) -> bool:
        """Whether the failure is one plain call that returned other numbers."""
        return self.probe == "values" and bool(self.values)

    @cached_property
    def to_be_refused(self) -> bool:
        """Whether the input is one that has to be refused: there are no right numbers to compare with."""
        try:
            self.case.expectations  # noqa: B018
        except ValueError:
            return True
        return False

    @property
    def tells(self) -> bool:
        """Whether entries can be held against it: a call that had to be refused tells no numbers."""
        if self.probe == "refusal":
            return True
        return (self.numeric or self.probe in PROBES) and not self.to_be_refused

    def truth(self, name: str) -> Expectation | None:
        """The oracle's value under a name of ``values``."""
        expected = self.case.expectations
        if name.startswith(GRADIENT):
            return expected.gradients.get(name.removeprefix(GRADIENT))
        return expected.results.get(name)


def values_of(outcome: Outcome) -> dict[str, Tensor]:
    """An outcome in the form of ``Observed.values``."""
    found = {key: outcome.number(key) for key in outcome.result}
    return found | {GRADIENT + key: one for key, one in outcome.gradients.items() if one is not None}


def deviation(got: Tensor, predicted: Tensor, bound: Tensor, eps: float) -> tuple[bool, float]:
    """Whether ``got`` is ``predicted`` up to rounding, and the largest deviation in parts of the largest number, or of
    the bound where that is more: of numbers that cancel to nothing no digit is known."""
    close, off = likeness(got, predicted, bound, eps)
    return close, share(off, largest(predicted.abs(), bound)) if predicted.numel() else off


def fit(predicted: Mapping[str, Tensor], observed: Observed) -> Fit:
    """Every number, wrong ones and right ones, as predicted; a wrong one must be predicted to be wrong."""
    eps = roundoff(coarsest(observed.case))
    error, wrong, foreseen = 0.0, 0, 0
    for name, got in observed.values.items():
        truth = observed.truth(name)
        if truth is None:
            continue
        if name not in predicted:
            return Fit(False, math.inf)
        close, off = deviation(got, predicted[name], truth.bound, eps)
        if not close:
            return Fit(False, math.inf)
        if got.shape == truth.value.shape and bool((truth.excess(got) > 1).any()):
            wrong += 1
            foreseen += bool((truth.excess(predicted[name]) > 0.5).any()) and (
                off <= MOST_ERROR and nearer(left(got, predicted[name], truth.value), eps)
            )
            error = max(error, off)
    return Fit(wrong == foreseen > 0, error)


def asks_for_another_spec(failed: Sequence[Record], own: Spec) -> str:
    """One line where the implementation asks for a field that another spec's input has, and this one's has not."""
    for record in failed:
        found = MISSING.search(str(record.failure.get("summary", "")))
        if found and found.group(1) in FIELDS and own.name not in FIELDS[found.group(1)]:
            names = FIELDS[found.group(1)]
            has = f"loss_input.{found.group(1)}, a field of the input of {' and '.join(names)}"
            return f"it asks for {has}: judge it with --spec {' or '.join(names)}"
    return ""


def diagnose_spec_run(
    folder: Path, failed: Sequence[Record], spec: Spec, kind: CaseKind, entries: Sequence[SpecDefect]
) -> Mapping[str, Any] | None:
    """``lines`` for the terminal, ``matches`` for machines, ``usable_for`` for the verdict."""
    if hint := asks_for_another_spec(failed, spec):
        return {"lines": [hint], "usable_for": "", "matches": []}
    if all(record.failure.get("kind") == "error" for record in failed):
        return None
    observed = [
        Observed.load(folder / record.failure["observed"], kind, record)
        for record in failed
        if record.failure.get("observed") and record.level == "MUST"
    ]
    telling = [one for one in observed if one.tells]
    passed = {record.requirement for record in read_records(folder).values() if record.status is Status.PASSED}
    # An entry whose own rule held is not what went wrong: its sentence would be false of all other inputs.
    best = best_of(telling, [one for one in entries if one.dialect or one.violates[0] not in passed])
    if best and (len(best) > 1 or len(telling) < SURE):
        dtype = judged_in([one.case for one in telling])
        best = left_standing(best, lambda one: stands(one.defect, spec, passed, dtype), len(telling) >= SURE)
    if not best:
        return {"lines": [NO_MATCH] if telling else [], "usable_for": "", "matches": []}
    first = best[0]
    defect, of = first.defect, len(telling)
    said = f"explains {len(first.explained)} of {of} failures to {power(first.error)}"
    if defect.dialect:
        lines = [f"this computes {defect.dialect}, not {spec.title}'s: {said}"]
    else:
        lines = [f"{first.name}: {said}"]
    lines.append(f"{defect.sentence} Fix: {defect.fix}")
    if len(best) > 1:
        names = ", ".join(one.name for one in best[1 : 1 + MOST_EQUIVALENTS])
        lines.append(f"not to be told apart on these inputs: {names}")
    if len(first.explained) < of:
        lines.append(f"{of - len(first.explained)} failures remain unexplained: there is more wrong than this")
    musts = sum(record.level is Level.MUST for record in failed)
    alike = all(one.defect.usable_for == defect.usable_for for one in best)
    usable = defect.usable_for if alike and len(first.explained) == of == musts else ""
    named = [one for one in defect.violates if any(record.requirement == one for record in failed)]
    because = dict.fromkeys(telling[index].requirement for index in sorted(first.explained))
    return {
        "lines": lines,
        **({"first": named, "because": [one for one in because if one not in named]} if named else {}),
        "usable_for": f"Usable for: {usable[0].lower() + usable[1:] if not usable.startswith('-') else usable}"
        if usable
        else "",
        "matches": [
            {
                "entry": Capability.LOSS.value,
                "name": first.name,
                "kind": "dialect" if defect.dialect else "defect",
                "quality": first.error,
                "explained": len(first.explained),
                "of": of,
                "fix": defect.fix,
                "usable_for": usable,
                "equivalent": [one.name for one in best[1:]],
                "seen": [],
            }
        ],
    }


def stands(entry: SpecDefect, spec: Spec, held: Collection[str], dtype: str) -> bool:
    """Whether an entry breaks none of the rules that the implementation held."""
    suspect = SimpleNamespace(**{Capability.LOSS.value: entry.wrong})
    return breaks_what_held(suspect, entry.violates, Capability.LOSS, spec, held, dtype) is None


def best_of(observed: Sequence[Observed], entries: Sequence[SpecDefect]) -> list[Candidate]:
    """The best explanation and those that explain the same, or nothing."""
    if not observed:
        return []
    order = sorted(range(len(observed)), key=lambda index: (observed[index].secondary, not observed[index].numeric))
    first = [observed[index] for index in order[:LOOKED_AT]]
    found = [candidate for entry in entries if (candidate := judged(entry, first, observed)) is not None]
    found.sort(key=lambda one: rank(one, observed))
    if not found or len(found[0].explained) < len(observed):
        found = sorted([*found, *pairs(found, entries, observed)], key=lambda one: rank(one, observed))
    if not found or len(found[0].explained) < ENOUGH * len(observed):
        return []
    alike = [one for one in found if one.explained == found[0].explained and plain(one) == plain(found[0])]
    return alike if len(alike) <= 1 + MOST_EQUIVALENTS else []  # what fits that many names none


def plain(candidate: Candidate) -> bool:
    """One entry, not two."""
    return "+" not in candidate.defect.name


def rank(candidate: Candidate, observed: Sequence[Observed]) -> tuple[int, bool, bool, bool]:
    """Most failures first; then one entry before two, one whose rule fails before one whose does not, one without a
    fitted number before one with it."""
    broken = {one.requirement for one in observed}
    unnamed = candidate.defect.violates[0] not in broken and not candidate.defect.dialect
    return -len(candidate.explained), not plain(candidate), unnamed, candidate.value is not None


def pairs(
    singles: Sequence[Candidate], entries: Sequence[SpecDefect], observed: Sequence[Observed]
) -> Iterator[Candidate]:
    """Two entries at once, of which the first explains some failures alone."""
    tried = 0
    for single in singles[:3]:
        if "+" in single.defect.name:
            continue
        # an exception tells no numbers: what one half raises is no evidence for the other
        left = [one for index, one in enumerate(observed) if index not in single.explained and one.numeric][:2]
        base = single.defect
        for entry in entries:
            try:
                both = combine(base, entry)
            except ValueError:
                continue
            tried += 1
            if tried > MOST_PAIRS:
                return
            if any(matches(both, one).matched for one in left):
                whole = explained_by(both, observed)
                if len(whole[0]) > len(single.explained):
                    yield Candidate(both, whole[0], whole[1])


def judged(entry: SpecDefect, first: Sequence[Observed], observed: Sequence[Observed]) -> Candidate | None:
    """How much an entry explains, its number fitted where it has one."""
    if any(matches(entry, one).matched for one in first):
        explained, error = explained_by(entry, observed)
        value = entry.parameter.values[0] if entry.parameter else None
        if not entry.parameter or len(explained) == len(observed):
            return Candidate(entry, explained, error, value) if explained else None
    if entry.parameter is None:
        return None
    numeric = [one for one in first if one.numeric]
    best: Candidate | None = None
    for one in numeric[:2]:
        value = fitted(entry, one)
        if value is None:
            continue
        explained, error = explained_by(entry.at(value), observed)
        if explained and (best is None or len(explained) > len(best.explained)):
            best = Candidate(entry.at(value), explained, error, value)
    return best


def explained_by(entry: SpecDefect, observed: Sequence[Observed]) -> tuple[frozenset[int], float]:
    """The failures that are as the entry predicts, and the largest deviation among them."""
    fits = [matches(entry, one) for one in observed]
    explained = frozenset(index for index, one in enumerate(fits) if one.matched)
    return explained, max((fits[index].error for index in explained), default=0.0)


def predicted(entry: SpecDefect, observed: Observed, gradient: bool = True) -> Mapping[str, Any] | None:
    """What the entry returns on a failing input, in float64; None where it raises."""
    try:
        return values_of(evaluate(entry.wrong, Capability.LOSS, observed.exact, gradient=gradient))
    except ImplementationError:
        return None


def matches(entry: SpecDefect, observed: Observed) -> Fit:
    """Whether a failure is as the entry predicts."""
    if observed.probe in PROBES:
        alike = PROBES[observed.probe](entry, observed)
        return Fit(alike, 0.0)
    if not observed.numeric:
        return Fit(False, math.inf)
    wants = any(name.startswith("gradient.") for name in observed.values)
    found = predicted(entry, observed, gradient=wants)
    return Fit(False, math.inf) if found is None else fit(found, observed)


def refuses_nothing(entry: SpecDefect, observed: Observed) -> bool:
    """A call that had to be refused, and is not."""
    return predicted(entry, observed, gradient=False) is not None


def raises(entry: SpecDefect, observed: Observed) -> bool:
    """A call that had to be answered, and raises: no number in a formula makes it do so, and no other algorithm is told
    by it."""
    return entry.parameter is None and not entry.dialect and predicted(entry, observed) is None


def steps_alike(entry: SpecDefect, observed: Observed) -> bool:
    """A step of several calls: the entry's is as wrong."""

    def call(case: SpecCase) -> Outcome:
        return evaluate(entry.wrong, Capability.LOSS, case)

    try:
        found = steps(call, observed.exact, observed.probe)
    except ImplementationError:
        return False
    return any(fit(values_of(one), observed).matched for one in found)


def gives_none(entry: SpecDefect, observed: Observed) -> bool:
    """A call whose logits have to get a gradient of zeros, and get none."""
    try:
        found = evaluate(entry.wrong, Capability.LOSS, observed.exact)
    except ImplementationError:
        return False
    return found.gradients["student_logits"] is None


def evaluated_alike(entry: SpecDefect, observed: Observed) -> bool:
    """A call without gradients: the entry's value is the same."""
    with getattr(torch, observed.probe)():
        found = predicted(entry, observed, gradient=False)
    return found is not None and fit(found, observed).matched


def kept_alike(entry: SpecDefect, observed: Observed) -> bool:
    """A call after another in the same tensors or options object: the entry's is as wrong."""
    try:
        found = second_call(entry.wrong, observed.exact, observed.probe)
    except ImplementationError:
        return False
    return fit(values_of(found), observed).matched


PROBES: Mapping[str, Callable[[SpecDefect, Observed], bool]] = {
    "refusal": refuses_nothing,
    "raises": raises,
    "no_gradient": gives_none,
    "no_grad": evaluated_alike,
    "inference_mode": evaluated_alike,
    **dict.fromkeys(SHARES, steps_alike),
    **dict.fromkeys(CHANGED, kept_alike),
}


def fitted(entry: SpecDefect, observed: Observed) -> float | None:
    """The value of the entry's number that comes nearest to the wrong loss, or None where none comes near."""
    parameter = entry.parameter
    assert parameter is not None
    got, truth = observed.values.get("loss"), observed.truth("loss")
    if got is None or truth is None:
        return None

    def distance(value: float) -> float:
        found = predicted(entry.at(value), observed, gradient=False)
        if found is None or "loss" not in found:
            return math.inf
        _, off = deviation(got, found["loss"], truth.bound, 0.0)
        return off

    low, high = parameter.low, parameter.high
    logarithmic = low > 0

    def at(share: float) -> float:
        return low * (high / low) ** share if logarithmic else low + (high - low) * share

    grid = [*parameter.values, *(at(index / GRID) for index in range(GRID + 1))]
    best = min(grid, key=distance)
    if distance(best) <= 1e-9:
        return best
    position = math.log(best / low) / math.log(high / low) if logarithmic else (best - low) / (high - low)
    left, right = max(0.0, position - 1 / GRID), min(1.0, position + 1 / GRID)
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(REFINEMENTS):
        a, b = right - ratio * (right - left), left + ratio * (right - left)
        if distance(at(a)) <= distance(at(b)):
            right = b
        else:
            left = a
    value = at((left + right) / 2)
    return value if distance(value) <= 1e-2 else None


def power(error: float) -> str:
    """A relative error as a power of ten, rounded up."""
    return "the last bit" if error == 0 else f"1e{math.ceil(math.log10(error))}"
