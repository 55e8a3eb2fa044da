"""What a known defect returns on a failing input, and how near that is to what was returned.

Predictions are made in float64 on the very inputs: the number that an implementation with this defect
approximates. Where that explains too little, and where the observed is not finite, they are made in the input's
own dtypes, which a defect may need to show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.forking import shared_out
from sdpo_conformance.judging.likeness import MOST_ERROR, largest, left, likeness, nearer, share
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.diagnosis.observed import GRADIENT, FitKey, Observed, expectation_of

Asked = TypeVar("Asked")

FORESEEN = 0.5
"""Share of the bound by which a prediction has to miss the truth itself, to explain a number that is wrong: in half
precision a defect that does nothing on an input would else explain what is slightly off there."""


@dataclass(frozen=True)
class Fit:
    """``matched``: every number that the implementation got wrong, and every other, is as predicted.
    ``error``: the largest relative deviation; ``aspects``: the wrong numbers that are as predicted; ``left``: what the
    prediction leaves of their distance from the truth."""

    matched: bool
    error: float
    aspects: frozenset[str]
    left: float = 0.0


NO_FIT = Fit(False, math.inf, frozenset())


def deviation(got: Tensor, predicted: Tensor, bound: Tensor, eps: float) -> tuple[bool, float]:
    """Whether ``got`` is ``predicted`` up to rounding, and the largest deviation in parts of the largest number
    predicted, or of what is lost beside the bound where all that is predicted is less."""
    close, off = likeness(got, predicted, bound, eps)
    return close, share(off, max(largest(predicted.abs()), eps * largest(bound))) if predicted.numel() else off


def fit(predicted: Mapping[str, Tensor], observed: Observed) -> Fit:
    """Compare a prediction with what was observed."""
    eps = observed.roundoff
    matched, error, aspects, wrong, rest = True, 0.0, set(), 0, 0.0
    for name, got in observed.values.items():
        truth = expectation_of(observed.truth, name)
        if truth is None:
            continue
        if name not in predicted:
            return NO_FIT
        close, off = deviation(got, predicted[name], truth.bound, eps)
        is_wrong = got.shape == truth.value.shape and bool((truth.excess(got) > 1).any())
        wrong += is_wrong
        foreseen = is_wrong and bool((truth.excess(predicted[name]) > FORESEEN).any())
        remaining = math.inf
        if foreseen and close:
            at = truth.excess(got) > 1  # beside a few wrong elements wide bounds may hide more in others
            remaining = left(got[at], predicted[name][at], truth.value[at])
        if close and off <= MOST_ERROR and nearer(remaining, eps):
            aspects.add(name)
            error, rest = max(error, off), max(rest, remaining)
        matched = matched and close
    return Fit(matched and len(aspects) == wrong > 0, error, frozenset(aspects), rest)


def best_fit(defect: Defect, observed: Observed, native: bool) -> Fit:
    """The fit in float64, or, with ``native``, in the input's own dtypes. The results come first: a backward is
    only run for a defect whose results are as observed."""
    wants_gradient = any(name.startswith(GRADIENT) for name in observed.values)
    try:
        if wants_gradient and not agree(observed.predicted(defect, native, gradient=False), observed):
            return NO_FIT
        return fit(observed.predicted(defect, native, gradient=wants_gradient), observed)
    except ImplementationError:
        return NO_FIT


@dataclass(frozen=True)
class Effect:
    """``changes`` a wrong result; ``spoils`` a right one; ``predicted``: how many of the wrong results are as the
    defect predicts."""

    changes: bool
    spoils: bool
    predicted: int


def effect(defect: Defect, observed: Observed) -> Effect:
    """What a defect alone does to the results of a failing input, gradients aside."""
    try:
        forward = observed.predicted(defect, native=False, gradient=False)
    except ImplementationError:
        return Effect(False, False, 0)
    changes, spoils, predicted = False, False, 0
    eps = observed.roundoff
    for name, got in observed.values.items():
        truth = expectation_of(observed.truth, name)
        if truth is None or name.startswith(GRADIENT) or name not in forward:
            continue
        wrong = got.shape != truth.value.shape or bool((truth.excess(got) > 1).any())
        changed = not deviation(forward[name], truth.value, truth.bound, eps)[0]
        changes = changes or (wrong and changed)
        spoils = spoils or (changed and not wrong)
        predicted += wrong and deviation(got, forward[name], truth.bound, eps)[0]
    return Effect(changes, spoils, predicted)


def agree(predicted: Mapping[str, Tensor], observed: Observed) -> bool:
    """Whether the results are as predicted, gradients aside."""
    eps = observed.roundoff
    for name, got in observed.values.items():
        truth = expectation_of(observed.truth, name)
        if truth is None or name.startswith(GRADIENT):
            continue
        if name not in predicted or not deviation(got, predicted[name], truth.bound, eps)[0]:
            return False
    return True


class Predictor:
    """Fits of defects to failures, each computed once, whoever asks; ``native`` as for ``best_fit``."""

    def __init__(self, native: bool) -> None:
        self.native = native

    def fit(self, defect: Defect, observed: Observed) -> Fit:
        """The fit, from the observation's memory where it was computed before."""
        native = observed.numeric and (self.native or observed.not_finite)
        key = (defect.name, defect.value, native)
        if key not in observed.fits:
            if observed.numeric:
                observed.fits[key] = best_fit(defect, observed, native)
            else:
                from sdpo_conformance.specs.claas.diagnosis.replay import replayed

                observed.fits[key] = replayed(defect, observed)
        return observed.fits[key]

    def foresee(self, asked: Sequence[Asked], observed: Sequence[Observed], ask: Callable[[Asked], object]) -> None:
        """Remember the fits that ``ask`` wants of the predictor for each that is ``asked``; found by several
        processes."""
        known = [set(one.fits) for one in observed]

        def found(part: Sequence[Asked]) -> list[dict[FitKey, Fit]]:
            for one in part:
                ask(one)
            return [
                {key: one.fits[key] for key in one.fits.keys() - before}
                for one, before in zip(observed, known, strict=True)
            ]

        for fits in shared_out(found, asked):
            for one, new in zip(observed, fits, strict=True):
                one.fits.update(new)


__all__ = ["NO_FIT", "Fit", "Predictor", "best_fit"]
