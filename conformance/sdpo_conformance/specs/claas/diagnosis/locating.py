"""Where a loss is wrong, without a name for it: from what is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdpo_conformance.specs.claas.diagnosis.observed import GRADIENT, Observed, ObservedLoss, expectation_of

PARTS = {
    "mean_is_ratio": "the importance ratio",
    "kl_reg": "the anchor",
}
"""Results that stand for one part of the loss, whatever else is wrong."""


def located(observed: Sequence[Observed], held: Sequence[str]) -> str:
    """The parts that are wrong and those that are right on the failing inputs, as one sentence; empty where nothing
    can be said."""
    wrong: dict[str, int] = {}
    seen: dict[str, int] = {}
    for one in observed:
        if not one.numeric:
            continue
        for name, got in one.values.items():
            truth = expectation_of(one.truth, name)
            if truth is None or got.shape != truth.value.shape:
                continue
            key = GRADIENT if name.startswith(GRADIENT) else name
            seen[key] = seen.get(key, 0) + 1
            wrong[key] = wrong.get(key, 0) + bool((truth.excess(got) > 1).any())
    bad: list[str] = []
    good: list[str] = []
    for key, words in PARTS.items():
        if seen.get(key):
            (bad if wrong[key] else good).append(words)
    distance = on_policy(observed)
    if distance is not None:
        (bad if distance else good).append("the divergence")
    values = [key for key in ("loss", "distill_loss") if seen.get(key)]
    if not bad and values and not any(wrong[key] for key in values) and wrong.get(GRADIENT):
        return "every value is right, the gradient is wrong"
    if not bad:
        return ""
    verb = "is" if len(bad) == 1 else "are"
    clear = f"; {' and '.join(good)} {'is' if len(good) == 1 else 'are'} right" if good else ""
    return f"{' and '.join(bad)} {verb} wrong{clear}"


def on_policy(observed: Sequence[Observed]) -> bool | None:
    """Whether distill_loss is wrong where the ratio is 1, so that the divergence alone makes it; None: not seen."""
    found: bool | None = None
    for one in observed:
        if not isinstance(one, ObservedLoss):
            continue
        truth, got = one.truth.results.get("distill_loss"), one.values.get("distill_loss")
        ratio = one.case.truth.ratio
        if truth is None or got is None or got.shape != truth.value.shape or not ratio.numel():
            continue
        mean = one.values.get("mean_is_ratio")
        reported = one.truth.results.get("mean_is_ratio")
        if mean is not None and reported is not None and bool((reported.excess(mean) > 1).any()):
            continue
        if bool(torch.isclose(ratio, torch.ones_like(ratio), atol=1e-3).all()):
            found = bool(found) or bool((truth.excess(got) > 1).any())
    return found
