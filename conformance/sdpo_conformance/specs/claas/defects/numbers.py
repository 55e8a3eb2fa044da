"""The numbers that catalogued losses have in them, so that another value is the same defect and is fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from sdpo_conformance.specs.claas.defects.defect import Change, around, both, replacing
from sdpo_conformance.specs.claas.defects.loss_parts import (
    LOG_ZERO,
    RATIO_LOG_CLAMP,
    Work,
    jensen_shannon,
    logits,
    renormalise,
)
from sdpo_conformance.specs.claas.defects.parameter import Parameter, logarithmic, whole_numbers
from sdpo_conformance.specs.claas.defects.wrong_anchor import second_order_below
from sdpo_conformance.specs.claas.defects.wrong_divergence import added_to_mass
from sdpo_conformance.specs.claas.defects.wrong_factors import smoothed
from sdpo_conformance.specs.claas.defects.wrong_fused import counted_twice, filtered, head_of_last_tile, overlapping
from sdpo_conformance.specs.claas.defects.wrong_hidden_states import tiled
from sdpo_conformance.specs.claas.defects.wrong_reduction import floored_by_chunk

TEMPERATURES = logarithmic(0.25, 4.0, 17)
CAPS = logarithmic(0.2, 64.0, 17)


TILES = whole_numbers(2**power for power in range(2, 13))
POWERS_OF_TWO = tuple(2.0**-power for power in range(6, 21))


def difference(w: Work) -> Tensor:
    """new - old without its clamp."""
    return (w.chosen - w.old).detach()


def chosen_at(temperature: float, w: Work) -> Tensor:
    """l[y] at a temperature."""
    return torch.log_softmax(w.z / temperature, -1).gather(-1, w.y.unsqueeze(-1)).squeeze(-1)


def clipped_terms(limit: float) -> Change:
    """Every entry's contribution to D clipped."""

    def divergence(w: Work) -> Tensor:
        on_teacher = w.log_p.exp() * (w.log_p - w.log_m)
        on_student = w.log_q.exp() * (w.log_q - w.log_m)
        return (w.alpha * on_teacher + (1 - w.alpha) * on_student).clamp(max=limit).sum(-1)

    return replacing(jensen_shannon=divergence)


def logged_with(epsilon: float) -> Change:
    """Epsilon added inside every logarithm."""

    def divergence(w: Work) -> Tensor:
        p, q, m = w.log_p.exp(), w.log_q.exp(), w.log_m.exp()
        log_m = torch.log(m + epsilon)
        on_teacher = (p * (torch.log(p + epsilon) - log_m)).sum(-1)
        on_student = (q * (torch.log(q + epsilon) - log_m)).sum(-1)
        return w.alpha * on_teacher + (1 - w.alpha) * on_student

    return replacing(jensen_shannon=divergence)


def softened(temperature: float) -> Change:
    """Both sides at a temperature, on the support."""
    return both(
        around("student_at_support", lambda before, w: (before(w) / temperature).clamp(min=LOG_ZERO)),
        around("teacher_distribution", lambda before, w: renormalise(before(w) / temperature)),
    )


def mixed_with(epsilon: float) -> Change:
    """Epsilon added to the mixture inside its logarithm."""
    return around("mixture", lambda before, w: torch.log(before(w).exp() + epsilon))


def added_to(mass: float) -> Change:
    """A number added to the support's mass."""
    return replacing(
        teacher_distribution=lambda w: added_to_mass(w.tau.clamp(min=LOG_ZERO), mass),
        student_distribution=lambda w: added_to_mass(w.l_k, mass),
    )


def floored(mass: float) -> Change:
    """Another floor of the support's mass."""
    return replacing(
        teacher_distribution=lambda w: renormalise(w.tau.clamp(min=LOG_ZERO), mass),
        student_distribution=lambda w: renormalise(w.l_k, mass),
    )


def absent(floor: float) -> Change:
    """Another log-prob for responses outside the support."""

    def teacher_at_response(w: Work) -> Tensor:
        match = w.support == w.y.unsqueeze(-1)
        return torch.where(match.any(-1), torch.where(match, w.tau, 0.0).sum(-1), floor)

    return replacing(teacher_at_response=teacher_at_response)


def clamped(low: Callable[[float], float]) -> Callable[[float], Change]:
    """The log-ratio clamped to [low(c), c]."""
    return lambda c: replacing(log_ratio=lambda w: difference(w).clamp(low(c), c))


def uncapped_above(c: float) -> Change:
    """Ratios above a number set to it, whatever is_clip."""
    return replacing(ratio=lambda w: w.log_ratio.exp().clamp(max=c))


def ratio_at(temperature: float) -> Change:
    """The ratio's current log-prob at a temperature."""
    return replacing(
        log_ratio=lambda w: (chosen_at(temperature, w) - w.old).detach().clamp(-RATIO_LOG_CLAMP, RATIO_LOG_CLAMP)
    )


NUMBERS: Mapping[str, Parameter] = MappingProxyType(
    {
        "terms-clipped": Parameter("clip", clipped_terms, logarithmic(1e-3, 1.0, 19), "0.05"),
        "epsilon-in-logarithm": Parameter("epsilon", logged_with, logarithmic(1e-12, 1e-1, 23), "1e-5"),
        "temperature-on-both": Parameter("temperature", softened, TEMPERATURES, "temperature 2"),
        "temperature-on-student": Parameter(
            "temperature", lambda t: around("student_at_support", lambda before, w: before(w) / t), TEMPERATURES, "0.8"
        ),
        "temperature-on-teacher": Parameter(
            "temperature",
            lambda t: around("teacher_distribution", lambda before, w: renormalise(before(w) / t)),
            TEMPERATURES,
            "temperature of 2",
        ),
        "divergence-offset": Parameter(
            "offset",
            lambda c: replacing(jensen_shannon=lambda w: jensen_shannon(w) + c),
            (*(-c for c in logarithmic(1e-9, 1.0, 19)[::-1]), *logarithmic(1e-9, 1.0, 19)),
            "1e-5",
        ),
        "mass-floor-too-high": Parameter("floor", floored, logarithmic(1e-16, 1e-1, 31), "1e-6"),
        "divergence-scaled": Parameter(
            "factor",
            lambda c: around("per_token", lambda before, w: c * before(w)),
            (*(-c for c in logarithmic(1 / 64, 64.0, 13)[::-1]), *logarithmic(1 / 64, 64.0, 25)),
            "multiplied by 2",
        ),
        "divergence-clipped": Parameter(
            "clip",
            lambda c: around("per_token", lambda before, w: before(w).clamp(max=c)),
            logarithmic(1e-4, 10.0, 21),
            "0.1",
        ),
        "ratio-power": Parameter(
            "exponent",
            lambda g: replacing(log_ratio=lambda w: g * difference(w).clamp(-RATIO_LOG_CLAMP, RATIO_LOG_CLAMP)),
            tuple(x / 8 for x in range(-16, 25)),
            "1.5",
        ),
        "ratio-cap-hard-coded": Parameter("cap", uncapped_above, CAPS, "5.0"),
        "ratio-ppo-clip": Parameter(
            "1 +-",
            lambda c: replacing(ratio=lambda w: w.log_ratio.exp().clamp(1 - c, 1 + c)),
            (*logarithmic(0.02, 0.5, 13), 0.6, 0.7, 0.8, 0.9, 0.99),
            "+- 0.2",
        ),
        "epsilon-in-mixture": Parameter("epsilon", mixed_with, logarithmic(1e-12, 1e-1, 23), "1e-4"),
        "teacher-smoothed": Parameter(
            "weight",
            lambda c: around("teacher_distribution", lambda before, w: smoothed(before(w), c)),
            logarithmic(1e-4, 0.9, 19),
            "0.1",
        ),
        "ratio-above-threshold-dropped": Parameter(
            "threshold",
            lambda c: around("ratio", lambda before, w: torch.where(before(w) > c, 0.0, before(w))),
            CAPS,
            "2.0",
        ),
        "anchor-weight-scaled": Parameter(
            "times",
            lambda c: replacing(loss=lambda w: w.distill_loss + c * w.kl_reg_weight * w.kl_reg),
            (*(-c for c in logarithmic(1 / 32, 32.0, 11)[::-1]), *logarithmic(1 / 32, 32.0, 21)),
            "times 2",
        ),
        "mass-floor-added": Parameter("added", added_to, logarithmic(1e-12, 1e-1, 23), "1e-8"),
        "divided-by-constant": Parameter(
            "constant",
            lambda c: replacing(count=lambda w: w.mask.new_tensor(c)),
            logarithmic(1.0, 65536.0, 33),
            "64",
        ),
        "divergence-divided-by-constant": Parameter(
            "constant",
            lambda c: replacing(distill_loss=lambda w: (w.weighted * w.mask).sum() / c),
            logarithmic(1.0, 65536.0, 33),
            "64",
        ),
        "ratio-floor": Parameter(
            "floor",
            lambda c: around("ratio", lambda before, w: before(w).clamp(min=c)),
            logarithmic(1e-9, 1.0, 19),
            "0.5",
        ),
        "ratio-below-threshold-dropped": Parameter(
            "threshold",
            lambda c: around("ratio", lambda before, w: torch.where(before(w) < c, 0.0, before(w))),
            logarithmic(1e-9, 1.0, 19),
            "0.01",
        ),
        "log-ratio-clamp-ten": Parameter("clamp +-", clamped(lambda c: -c), logarithmic(0.05, 88.0, 27), "+-10"),
        "log-ratio-clamped-above": Parameter(
            "clamp", clamped(lambda c: -RATIO_LOG_CLAMP), logarithmic(0.05, 88.0, 27), "0.5"
        ),
        "ratio-without-temperature": Parameter("temperature", ratio_at, TEMPERATURES, "0.7"),
        "denominator-epsilon": Parameter(
            "epsilon", lambda c: replacing(count=lambda w: w.mask.sum() + c), logarithmic(1e-12, 1.0, 25), "1e-8"
        ),
        "reverse-kl-floor-ten": Parameter(
            "floor", absent, tuple(float(-x) for x in (1, 5, 10, 15, 18, 25, 30, 40, 60, 100, 1000)), "-10"
        ),
        "anchor-clamp-ten": Parameter(
            "clamp +-",
            lambda c: replacing(drift=lambda w: (w.chosen - w.base).clamp(-c, c)),
            logarithmic(0.05, 88.0, 27),
            "+-10",
        ),
        "anchor-value-clamped": Parameter(
            "clamp",
            lambda c: around("k3", lambda before, w: before(w).clamp(-c, c)),
            logarithmic(0.01, 1e6, 25),
            "+-10",
        ),
        "anchor-weight-hard-coded": Parameter(
            "weight",
            lambda c: replacing(loss=lambda w: w.distill_loss + c * w.kl_reg),
            (*(-c for c in logarithmic(1e-4, 4.0, 9)[::-1]), *logarithmic(1e-4, 4.0, 19)),
            "0.001",
        ),
        "anchor-scaled": Parameter(
            "factor",
            lambda c: around("k3", lambda before, w: c * before(w)),
            (*(-c for c in logarithmic(1 / 32, 32.0, 11)[::-1]), *logarithmic(1 / 32, 32.0, 21)),
            "0.5",
        ),
        "anchor-second-order-near-zero": Parameter("limit", second_order_below, logarithmic(1e-3, 20.0, 27), "0.25"),
        "denominator-floored-by-chunk": Parameter("chunk", floored_by_chunk, TILES, "16", whole=True),
        "head-gradient-of-last-tile": Parameter("tile", head_of_last_tile, TILES, "4 tokens", whole=True),
        "vocabulary-tile-overlaps": Parameter("tile", overlapping, TILES, "32", whole=True),
        "vocabulary-tile-counted-twice": Parameter("tile", counted_twice, TILES, "32", whole=True),
        "softmax-gradient-filtered": Parameter("threshold", filtered, POWERS_OF_TWO, "0.000244", whole=True),
        "logprob-running-sum-not-rescaled": Parameter("tile", partial(tiled, own=True), TILES, "32", whole=True),
        "logprob-tile-sum-not-rescaled": Parameter("tile", partial(tiled, own=False), TILES, "16", whole=True),
        "soft-capped-logits": Parameter(
            "cap",
            lambda c: replacing(logits=lambda w: c * torch.tanh(logits(w) / c)),
            logarithmic(5.0, 200.0, 13),
            "30",
        ),
        "scaled-logits": Parameter(
            "temperature", lambda t: replacing(logits=lambda w: logits(w) / t), TEMPERATURES, "0.9"
        ),
    }
)
"""By defect. The value that a defect has when it is run by name is the one its sentence gives."""
