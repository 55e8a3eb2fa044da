"""The number in a defect that makes it return what was observed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.diagnosis.observed import GRADIENT, Observed, expectation_of

PROMISING = 0.9
"""Of the distance between the truth and what was observed: a defect that does not come nearer is only refined where a
small step away from what does nothing comes nearer."""


def best_value(defect: Defect, observed: Observed, fits: Callable[[Defect, Observed], bool]) -> float | None:
    """The value at which ``fits`` holds, or None."""
    assert defect.parameter is not None
    value, _ = defect.parameter.fitted(lambda value: distance(defect.at(value), observed), PROMISING)
    return value if fits(defect.at(value), observed) else None


def distance(defect: Defect, observed: Observed) -> float:
    """How far the results are from those observed, where the truth is at a distance of 1; what the truth gets right
    has to stay so. Where every result is right the gradients tell, of a defect that leaves the results so."""
    try:
        results = apart(observed.predicted(defect, native=False, gradient=False), observed, gradients=False)
        if math.isfinite(results) or any(not name.startswith(GRADIENT) for name in observed.wrong):
            return results
        return apart(observed.predicted(defect, native=False, gradient=True), observed, gradients=True)
    except ImplementationError:
        return math.inf


def apart(predicted: Mapping[str, Tensor], observed: Observed, gradients: bool) -> float:
    """The distance of the results, or of the gradients; infinite where none of them is wrong, or a shape is."""
    wrong: list[float] = []
    spoilt = 0.0
    for name, got in observed.values.items():
        truth = expectation_of(observed.truth, name)
        if name.startswith(GRADIENT) is not gradients or truth is None or name not in predicted:
            continue
        if got.shape != predicted[name].shape or got.shape != truth.value.shape:
            return math.inf
        if not got.numel():
            continue
        off = (got - truth.value).abs().clamp(min=truth.bound)
        largest = float(((got - predicted[name]).abs() / off).nan_to_num(nan=math.inf).max())
        if name in observed.wrong:
            wrong.append(largest)
        else:
            spoilt += max(0.0, largest - 1)
    return (sum(wrong) / len(wrong) if wrong else math.inf) + spoilt
