"""TRL's loss in float64, value and gradient.

    z' = z / tau;  l = log_softmax(z');  local teacher lt = log_softmax(zt / tau);  M = C * s[:, None]
    topk_logits     S = the K largest of z' (a served teacher: its own K), a = l[S], b = lt[S]; tail or renormalised
    full_logits     the whole vocabulary
    sampled_token   D = sg(l[y] - lt[y]) l[y]
    r = min(exp(clamp(sg(l[y] - old), -20, 20)), clip) where both clip and old are there, else 1
    L = (1 / B) sum_b [ sum_t D r M / max(sum_t M, 1) ];  logged: sum D r M / max(sum M, 1)

Source: trl 1.16.0, trl/experimental/sdpo/sdpo_trainer.py 1186-1357, loss_utils.py 23-131.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_conformance.specs.shared.oracle.categories import (
    Categories,
    divergence,
    log_probs_at,
    renormalised,
    slope,
    to_logits,
    to_support,
    with_tail,
)
from sdpo_conformance.specs.shared.oracle.ratio import importance_ratio
from sdpo_conformance.specs.shared.oracle.truth import SpecTruth, upcast
from sdpo_conformance.specs.trl.loss_input import MODES, TRLLossInput


def check(loss_input: TRLLossInput) -> None:
    """Raise ValueError for what upstream refuses."""
    training = loss_input.training
    if training.distillation_mode not in MODES:
        raise ValueError(f"distillation_mode must be one of {MODES}, got {training.distillation_mode!r}")
    local = not training.use_teacher_server
    if local and training.distillation_mode == "sampled_token" and training.distillation_alpha != 1:
        raise ValueError(
            f"sampled_token is reverse KL: distillation_alpha must be 1, got {training.distillation_alpha}"
        )
    if local and training.distillation_mode == "topk_logits":
        k, v = training.distillation_topk, loss_input.student_logits.shape[-1]
        if k is None or not 1 <= k <= v:
            raise ValueError(f"topk_logits needs a distillation_topk from 1 to the vocabulary's {v}, got {k}")


def row_weights(mask: Tensor) -> Tensor:
    """(B, T): M / max(sum_t M, 1) / B: every row counts, empty ones too."""
    return mask / mask.sum(-1, keepdim=True).clamp(min=1.0) / max(mask.shape[0], 1)


def trl_loss(loss_input: TRLLossInput, published: bool = False) -> SpecTruth:
    """The truth on this input; limits, ``published`` and refusals as in ``lasgroup_loss``. A served teacher without a
    log-prob for a token that counts raises ValueError."""
    check(loss_input)
    training, served = loss_input.training, loss_input.training.use_teacher_server
    mask = upcast(loss_input.completion_mask)
    if loss_input.self_distillation_mask is not None:
        mask = mask * upcast(loss_input.self_distillation_mask).unsqueeze(-1)
    counted = mask != 0
    nothing = not served and bool(mask.sum() == 0)

    def read(tensor: Tensor, always: bool = False) -> Tensor:
        value = upcast(tensor)
        if published and not always:
            return value
        return torch.where(counted if value.dim() == 2 else counted.unsqueeze(-1), value, torch.zeros_like(value))

    z = read(loss_input.student_logits) / training.temperature
    y = loss_input.completion_ids.long().unsqueeze(-1)
    l = z.log_softmax(-1)  # noqa: E741  (the symbol of the spec)
    chosen = l.gather(-1, y).squeeze(-1)
    aside: dict[str, Tensor] = {"l": l, "mask": mask}

    if served:
        assert loss_input.teacher_actual_logprobs is not None
        teacher_chosen = read(loss_input.teacher_actual_logprobs, always=True)
        if not bool(torch.isfinite(teacher_chosen).all()):
            raise ValueError("the teacher server returned no log-prob for a token that counts")
    else:
        assert loss_input.teacher_logits is not None
        zt = read(loss_input.teacher_logits) / training.temperature
        lt = zt.log_softmax(-1)
        aside["lt"] = lt
        teacher_chosen = lt.gather(-1, y).squeeze(-1)

    if training.distillation_mode == "sampled_token":
        support = y
        difference = chosen - teacher_chosen
        per_token, at_support = difference * chosen, difference.unsqueeze(-1)
    else:
        a, b, support = _at_support(loss_input, z, None if served else zt, counted)
        renormalises = training.distillation_mode == "topk_logits" and not training.distillation_add_tail
        if training.distillation_mode == "full_logits" and not served:
            q, p = Categories(a), Categories(b)
        else:
            q, p = (renormalised(one) if renormalises else with_tail(one) for one in (a, b))
        per_token = divergence(q.log, p.log, training.distillation_alpha, published)
        at_support = to_support(q, slope(q.log, p.log, training.distillation_alpha, published), renormalises)
        aside |= {"log_q": q.log, "log_p": p.log, "at_support": at_support}
    aside["support"] = support

    ratio = torch.ones_like(chosen)
    if training.distillation_is_clip is not None and loss_input.old_per_token_logps is not None:
        ratio = importance_ratio(chosen, read(loss_input.old_per_token_logps), training.distillation_is_clip)
        aside["ratio"] = ratio
    weight = row_weights(mask)
    values = per_token * ratio
    if not published:
        values = torch.where(counted, values, torch.zeros_like(values))
    logged = (values * mask).sum() / mask.sum().clamp(min=1.0)
    loss = (values * weight).sum()
    if nothing:
        loss, logged = 0 * z.sum(), torch.zeros((), dtype=torch.float64)
    moved = at_support * (ratio * weight).unsqueeze(-1)
    if served and training.distillation_mode == "topk_logits":
        moved = torch.where(counted.unsqueeze(-1), moved, torch.zeros_like(moved))
    return SpecTruth(
        loss=loss,
        metrics={"logged_distillation_loss": logged},
        per_token=per_token,
        factor=ratio * weight,
        grad_logits=torch.zeros_like(l) if nothing else to_logits(moved, support, l) / training.temperature,
        aside=aside,
    )


def _at_support(
    loss_input: TRLLossInput, z: Tensor, zt: Tensor | None, counted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of student and teacher at the support, (B, T, K), and the support. A served teacher's are set to 0
    where nothing counts, on both sides, so that padding of -inf does no harm."""
    training, l = loss_input.training, z.log_softmax(-1)  # noqa: E741
    if zt is None:
        assert loss_input.teacher_topk_ids is not None
        assert loss_input.teacher_topk_logprobs is not None
        support, here = loss_input.teacher_topk_ids.long(), counted.unsqueeze(-1)
        a, b = l.gather(-1, support), upcast(loss_input.teacher_topk_logprobs)
        return torch.where(here, a, torch.zeros_like(a)), torch.where(here, b, torch.zeros_like(b)), support
    if training.distillation_mode == "full_logits":
        return l, zt.log_softmax(-1), torch.arange(z.shape[-1]).expand_as(z)
    assert training.distillation_topk is not None
    support = z.topk(training.distillation_topk, dim=-1).indices
    return log_probs_at(z, support), log_probs_at(zt, support), support
