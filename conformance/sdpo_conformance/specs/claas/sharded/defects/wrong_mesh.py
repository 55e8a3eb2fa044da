"""What a sharded path loses that the unsharded one has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.claas.sharded.defects.sharded_defect import ShardedDefect
from sdpo_conformance.specs.claas.sharded.defects.sharded_parts import (
    OnRank,
    ShardedParts,
    carried,
    divergence,
    k3,
    mass,
    objective,
    same,
)


def ones(w: OnRank) -> Tensor:
    return torch.ones_like(w.chosen).detach()


def uncapped(w: OnRank) -> Tensor:
    return (w.chosen - w.old).detach().clamp(-20, 20).exp()


def capped_at_5(w: OnRank) -> Tensor:
    return (w.chosen - w.old).detach().clamp(-20, 20).exp().clamp(max=5.0)


def with_gradient(w: OnRank) -> Tensor:
    return (w.chosen - w.old).clamp(-20, 20).exp().clamp(max=w.training.is_clip)


def unclamped(w: OnRank) -> Tensor:
    return (w.chosen - w.old).detach().exp().clamp(max=w.training.is_clip)


def other_sign(w: OnRank) -> Tensor:
    d = (w.base - w.chosen).clamp(-20, 20)
    return torch.expm1(d) - d


def weighted_k3(w: OnRank) -> Tensor:
    return k3(w) * w.ratio


def always_jensen_shannon(parts: ShardedParts, w: OnRank) -> Tensor:
    if w.training.alpha < 1:
        return divergence(parts, w)
    changed = replace(w.training, alpha=0.5)
    kept, w.training = w.training, changed
    found = divergence(parts, w)
    w.training = kept
    return found


def swapped_alpha(parts: ShardedParts, w: OnRank) -> Tensor:
    if w.training.alpha >= 1:
        return divergence(parts, w)
    kept, w.training = w.training, replace(w.training, alpha=1 - w.training.alpha)
    found = divergence(parts, w)
    w.training = kept
    return found


def no_anchor(parts: ShardedParts, w: OnRank) -> Tensor:
    return parts.weigh(w, w.divergence * w.ratio)


def ratio_in_value_alone(parts: ShardedParts, w: OnRank) -> Tensor:
    right, plain = objective(parts, w), parts.weigh(w, w.divergence)
    return right.detach() + (plain - plain.detach())


def ratio_after_the_mean(parts: ShardedParts, w: OnRank) -> Tensor:
    mean = parts.weigh(w, w.ratio).detach()
    found = parts.weigh(w, w.divergence) * mean
    if w.training.kl_reg_weight:
        found = found + w.training.kl_reg_weight * parts.weigh(w, w.k3)
    return found


def every_position(w: OnRank) -> None:
    w.mask = torch.ones_like(w.mask)


def masks_in_place(given: Any) -> Any:
    features = given.student_hidden if hasattr(given, "student_hidden") else given.student_logits
    with torch.no_grad():
        features.masked_fill_((given.response_mask == 0).unsqueeze(-1), 0.0)
        given.old_student_logprobs.add_(0.25)
    given.old_student_logprobs = given.old_student_logprobs - 0.25
    return given


def metrics_with_graph(w: OnRank, loss: Tensor, found: Mapping[str, Tensor]) -> Mapping[str, Any]:
    return {"loss": loss, **found, "distill_loss": found["distill_loss"] + 0.0 * loss}


def no_clip_fraction(w: OnRank, loss: Tensor, found: Mapping[str, Tensor]) -> Mapping[str, Any]:
    return {"loss": loss, **{key: value for key, value in found.items() if key != "clip_fraction"}}


_KEPT: dict[str, Tensor] = {}


def kept_gradient(w: OnRank, gradient: Tensor) -> Tensor:
    """A buffer of the first backward through each shape serves every later one."""
    key = str(tuple(gradient.shape))
    return _KEPT.setdefault(key, gradient.clone()).clone()


def kept_mass(parts: ShardedParts, w: OnRank) -> Tensor:
    """The buffer of the statistics is one for all calls: a second call overwrites the first one's."""
    found = mass(parts, w)
    shape = str(tuple(found.shape))
    with torch.no_grad():
        buffer = _KEPT.setdefault("mass" + shape, found.detach().clone())
        buffer.copy_(found)
    return carried(found, same, lambda g: g * (_KEPT["mass" + shape] / found.detach()))


def needs_graph(given: Any) -> Any:
    features = given.student_hidden if hasattr(given, "student_hidden") else given.student_logits
    if not torch.is_grad_enabled() or not features.requires_grad:
        raise RuntimeError("element 0 of tensors does not require grad")
    return given


def nan_times_zero(w: OnRank) -> None:
    """Padding is multiplied by the mask where it should have been replaced: -inf or NaN there would stay."""
    w.mask = w.mask + 1e-3


def _defect(
    name: str, sentence: str, violates: str, seen: tuple[str, ...] = (), mesh: str = "tp=2", **parts: Any
) -> ShardedDefect:
    return ShardedDefect(name, sentence, tuple(violates.split()), parts, mesh, seen)


WEIGHTS = ("Liger-Kernel#1082", "Liger-Kernel#1088", "trl#5031", "trl#7063")

DEFECTS = (
    _defect("ratio-lost-on-the-mesh", "The sharded path has no importance ratio.", "MESH-1", WEIGHTS, ratio=ones),
    _defect(
        "ratio-in-the-value-alone",
        "The ratio is in the loss and not in its gradient.",
        "MESH-1",
        WEIGHTS,
        objective=ratio_in_value_alone,
    ),
    _defect(
        "ratio-after-the-mean",
        "The mean ratio multiplies the mean divergence.",
        "MESH-1",
        WEIGHTS,
        "dp=2",
        objective=ratio_after_the_mean,
    ),
    _defect("cap-lost-on-the-mesh", "The sharded path does not cap the ratio.", "MESH-1", (), ratio=uncapped),
    _defect(
        "cap-of-5-on-the-mesh", "The sharded path caps at 5, whatever is configured.", "MESH-1", (), ratio=capped_at_5
    ),
    _defect(
        "ratio-with-gradient-on-the-mesh", "The gradient runs through the ratio.", "MESH-1", (), ratio=with_gradient
    ),
    _defect("log-ratio-unclamped-on-the-mesh", "The log-ratio is not clamped.", "MESH-1", (), ratio=unclamped),
    _defect(
        "anchor-lost-on-the-mesh",
        "The sharded path leaves the anchor out of the loss.",
        "MESH-1",
        ("trl#7063",),
        objective=no_anchor,
    ),
    _defect(
        "anchor-with-other-sign-on-the-mesh", "The anchor's log-ratio has the other sign.", "MESH-1", (), k3=other_sign
    ),
    _defect("anchor-weighted-on-the-mesh", "The ratio multiplies the anchor too.", "MESH-1", (), k3=weighted_k3),
    _defect(
        "no-reverse-kl-on-the-mesh",
        "alpha = 1 falls back to alpha = 0.5.",
        "MESH-1",
        (),
        divergence=always_jensen_shannon,
    ),
    _defect("alpha-swapped-on-the-mesh", "alpha weighs the student.", "MESH-1", (), divergence=swapped_alpha),
    _defect(
        "mask-ignored-on-the-mesh",
        "Masked positions count.",
        "MESH-5",
        ("lasgroup/SDPO self_distillation_mask",),
        prepare=every_position,
    ),
    _defect(
        "masked-positions-weigh-a-little",
        "Masked positions keep a small weight.",
        "MESH-5",
        (),
        "dp=2",
        prepare=nan_times_zero,
    ),
    _defect(
        "inputs-changed-in-place",
        "Hidden states and behaviour log-probs are changed in place.",
        "MESH-2",
        (),
        accept=masks_in_place,
    ),
    _defect("metrics-with-graph-on-the-mesh", "A metric carries the graph.", "MESH-2", (), finish=metrics_with_graph),
    _defect("no-clip-fraction-on-the-mesh", "clip_fraction is missing.", "MESH-2", (), finish=no_clip_fraction),
    _defect(
        "gradient-buffer-kept",
        "The first gradient of a shape is handed out again.",
        "MESH-3",
        (),
        logits_gradient=kept_gradient,
    ),
    _defect("statistics-buffer-shared", "Two graphs share the buffer of the statistics.", "MESH-3", (), mass=kept_mass),
    _defect("needs-a-graph", "Raises under no_grad.", "MESH-4", (), accept=needs_graph),
)
