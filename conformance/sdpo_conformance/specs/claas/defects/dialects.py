"""Other algorithms that share SDPO's name or parts: each a right implementation of something else.

Sources: ``compute_self_distillation_loss`` of lasgroup/SDPO (verl/trainer/ppo/core_algos.py at 0e6d510);
``trl/experimental/sdpo`` of TRL 1.16.0; ``torchrl/objectives/llm/sdpo.py`` of pytorch/rl at 1d4f6b2; veRL's
``kl_penalty``. docs/dialects.md sets them side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.defects.defect import DIVERGENCES, LOSSES, Change, Defect, around, both, replacing
from sdpo_conformance.specs.claas.defects.loss_parts import LOG_ZERO, Result, Work, jensen_shannon, kl
from sdpo_conformance.specs.claas.defects.sources import cite
from sdpo_conformance.specs.claas.defects.wrong_anchor import DEFECTS as ANCHORS
from sdpo_conformance.specs.claas.defects.wrong_reduction import row_means


@dataclass(frozen=True)
class Dialect(Defect):
    """``whose`` algorithm it computes, and ``convention``: how it differs, in a few words."""

    whose: str = ""
    convention: str = ""


def completed(w: Work) -> Tensor:
    """The teacher over the whole vocabulary: tokens outside its top-k share the mass that is left."""
    left = (1 - w.tau.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(torch.float32).tiny)
    outside = left.log() - math.log(max(w.l.shape[-1] - w.tau.shape[-1], 1))
    return outside.expand_as(w.l).clone().scatter(-1, w.support, w.tau)


def onto(support: str) -> Change:
    """Move the divergence to the "student"'s top-k, to "all" of the vocabulary, or leave the "teacher"'s."""

    def log_softmax(before: Callable[[Work], Tensor], w: Work) -> Tensor:
        w.l = before(w)
        if support == "student":
            ids = w.l.detach().topk(w.support.shape[-1], dim=-1).indices
            w.tau, w.support = completed(w).gather(-1, ids), ids
        elif support == "all":
            w.tau = completed(w)
            w.support = torch.arange(w.l.shape[-1], device=w.l.device).expand(w.l.shape)
        return w.l

    return around("log_softmax", log_softmax)


def with_tail(logprobs: Tensor) -> Tensor:
    """The support's log-probs, and the log of what is left."""
    log_mass = torch.logsumexp(logprobs, dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logprobs, torch.log(-torch.expm1(log_mass))], dim=-1)


def renormalised(logprobs: Tensor) -> Tensor:
    """Divided by their mass, however small."""
    return torch.log_softmax(logprobs, dim=-1)


def either_end(w: Work) -> Tensor:
    """The forward KL at alpha = 0, the divergence between."""
    return kl(w.log_p, w.log_q) if w.alpha == 0 else jensen_shannon(w)


def full_reverse_kl(finish: Callable[[Tensor], Tensor], w: Work) -> Tensor:
    """KL(student, teacher) over the support."""
    log_q = finish(w.l.gather(-1, w.support).clamp(min=LOG_ZERO))
    return kl(log_q, finish(w.tau.clamp(min=LOG_ZERO)))


def distributions(finish: Callable[[Tensor], Tensor]) -> Change:
    """Both sides finished alike, and KLs at both ends."""
    return replacing(
        teacher_distribution=lambda w: finish(w.tau.clamp(min=LOG_ZERO)),
        student_distribution=lambda w: finish(w.l_k),
        jensen_shannon=either_end,
        reverse_kl=partial(full_reverse_kl, finish),
    )


def without_anchor(before: Callable[..., Result], w: Work, metrics: Any) -> Result:
    """No kl_reg and no ratio metrics."""
    result = before(w, metrics)
    return {"loss": result["loss"], "distill_loss": result["distill_loss"]}


NO_ANCHOR = both(replacing(loss=lambda w: w.distill_loss), around("result", without_anchor))
ROW_MEANS = replacing(distill_loss=lambda w: row_means(w, w.weighted))


def veRL_anchor() -> Change:
    """ref - policy, k3 clamped to [-10, 10]."""
    changes = {one.name: one.change for one in ANCHORS}
    flipped, clamped = changes["anchor-sign-flipped"], changes["anchor-value-clamped"]
    assert flipped is not None
    assert clamped is not None
    return both(flipped, clamped)


def dialect(
    name: str,
    whose: str,
    convention: str,
    change: Change,
    seen: tuple[str, ...] = (),
    capabilities: tuple[Capability, ...] = LOSSES,
    fix: str = "Compute CLaaS's loss (docs/spec.md), or do not call the result CLaaS-style SDPO.",
) -> Dialect:
    """One algorithm of someone else's."""
    return Dialect(
        name=name,
        sentence=f"This computes {whose} ({convention}), not CLaaS's.",
        violates=("GJS-2",),
        fix=fix,
        change=change,
        seen=cite(*seen),
        usable_for=f"{whose[0].upper()}{whose[1:]} where that is wanted; docs/dialects.md says how the two differ.",
        capabilities=capabilities,
        whose=whose,
        convention=convention,
    )


DIALECTS: tuple[Dialect, ...] = (
    dialect(
        "lasgroup-sdpo",
        "lasgroup/SDPO's loss",
        "student top-k, tail bucket",
        both(onto("student"), distributions(with_tail), NO_ANCHOR),
    ),
    dialect(
        "lasgroup-sdpo-teacher-support",
        "lasgroup/SDPO's loss on the teacher's top-k",
        "tail bucket, KLs at alpha 0 and 1",
        both(distributions(with_tail), NO_ANCHOR),
        ("Gen-Verse/OpenClaw-RL#4",),
        DIVERGENCES,
    ),
    dialect(
        "lasgroup-sdpo-renormalised",
        "lasgroup/SDPO's loss with distillation_add_tail off",
        "student top-k, renormalised, KLs at alpha 0 and 1",
        both(onto("student"), distributions(renormalised), NO_ANCHOR),
        ("verl-project/verl#6676",),
    ),
    dialect(
        "trl-sdpo",
        "TRL's SDPOTrainer loss",
        "student top-k, renormalised, mean of row means",
        both(onto("student"), distributions(renormalised), NO_ANCHOR, ROW_MEANS),
        ("huggingface/trl#4935",),
    ),
    dialect(
        "trl-sdpo-tail",
        "TRL's SDPOTrainer loss with distillation_add_tail",
        "student top-k, tail bucket, mean of row means",
        both(onto("student"), distributions(with_tail), NO_ANCHOR, ROW_MEANS),
        ("huggingface/trl#4935",),
    ),
    dialect(
        "trl-sdpo-server",
        "TRL's SDPOTrainer loss with a teacher server",
        "teacher top-k, KLs at alpha 0 and 1, mean of row means",
        both(distributions(renormalised), NO_ANCHOR, ROW_MEANS),
        ("huggingface/trl#4935",),
    ),
    dialect(
        "gkd",
        "the generalised Jensen-Shannon divergence of GKD (TRL's GKDTrainer, Liger's JSD)",
        "full vocabulary, no importance ratio, KLs at alpha 0 and 1",
        both(
            onto("all"),
            distributions(lambda logprobs: logprobs),
            NO_ANCHOR,
            replacing(weighted=lambda w: w.divergence),
        ),
        ("linkedin/Liger-Kernel#425", "huggingface/trl#5731"),
    ),
    dialect(
        "torchrl-sdpo",
        "torchrl's SDPOLoss",
        "student top-k, tail bucket, no importance ratio",
        both(onto("student"), distributions(with_tail), NO_ANCHOR, replacing(weighted=lambda w: w.divergence)),
    ),
    dialect(
        "verl-anchor",
        "CLaaS's divergence with veRL's k3",
        "base minus policy, k3 clamped to [-10, 10]",
        veRL_anchor(),
        fix="d = clamp(l[y] - base, -20, 20); k3 = exp(d) - 1 - d, not clamped.",
    ),
)
