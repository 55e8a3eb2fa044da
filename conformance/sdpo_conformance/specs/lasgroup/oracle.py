"""lasgroup's loss in float64, value and gradient.

    z' = z / tau, zt' = zt / tau;  l = log_softmax(z'), lt = log_softmax(zt')
    S = the min(K, V) largest of z';  a_k = l[S_k], b_k = lt[S_k]
    categories: the support and the tail 1 - exp(min(logsumexp, -1e-7)); or the support renormalised; or all of V
    D = divergence of the categories (specs/shared/oracle/categories.py); sampled token: sg(l[y] - lt[y]) l[y]
    r = min(exp(clamp(sg(l[y] - old), -20, 20)), is_clip), 1 where is_clip is None;  w = the rollout weight, or 1
    M = response_mask * self_distillation_mask;  L = aggregate(D r w, M), by the whole batch's counts where given

Source: lasgroup/SDPO at 0e6d510, verl/trainer/ppo/core_algos.py 1025-1188, verl/workers/actor/dp_actor.py 521-534,
verl/trainer/ppo/rollout_corr_helper.py 481-598.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_conformance.specs.lasgroup.loss_input import AGGREGATIONS, LasgroupLossInput, LasgroupTraining
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
from sdpo_conformance.specs.shared.oracle.ratio import LOG_CLAMP, importance_ratio
from sdpo_conformance.specs.shared.oracle.truth import SpecTruth, upcast

ROW_FLOOR = 1e-8
"""Added to a row's mask sum in seq-mean-token-mean, and to the sums of the batch normalisation."""


def rollout_weights(old: Tensor, rollout: Tensor, mask: Tensor, training: LasgroupTraining) -> Tensor:
    """w, (B, T): capped exp(old - rollout), by token or by row, 0 on padding, divided by its mean where asked for."""
    log_ratio = old - rollout
    if training.rollout_is == "sequence":
        total = torch.where(mask != 0, log_ratio, 0.0).mul(mask).sum(-1, keepdim=True)
        log_ratio = total.expand_as(log_ratio)
    weights = log_ratio.clamp(-LOG_CLAMP, LOG_CLAMP).exp() * mask
    weights = weights.clamp(max=training.rollout_is_threshold)
    if not training.rollout_is_batch_normalize:
        return weights
    if training.rollout_is == "token":
        mean = (weights * mask).sum() / (mask.sum() + ROW_FLOOR)
    else:
        rows = (weights * mask).sum(-1) / (mask.sum(-1) + ROW_FLOOR)
        filled = (mask.sum(-1) > 0).to(mask)
        mean = (rows * filled).sum() / filled.sum().clamp(min=ROW_FLOOR)
    return weights / mean if bool(mean > ROW_FLOOR) else weights


def token_weights(mask: Tensor, mode: str, tokens: float | None = None, sequences: int | None = None) -> Tensor:
    """(B, T): what each position's loss is multiplied with in the mean; 0 / 0 where a row mode has no row. ``tokens``,
    ``sequences``: counts of a larger batch."""
    if mode == "token-mean":
        return mask / (mask.sum().clamp(min=1.0) if tokens is None else tokens)
    if mode == "seq-mean-token-sum-norm":
        return mask / mask.shape[-1]
    lengths = mask.sum(-1, keepdim=True)
    filled = (lengths > 0).to(mask)
    rows = mask / (lengths + ROW_FLOOR) if mode == "seq-mean-token-mean" else mask
    return rows * filled / (filled.sum() if sequences is None else sequences)


def check(loss_input: LasgroupLossInput) -> None:
    """Raise ValueError for what upstream refuses."""
    training = loss_input.training
    if not 0 <= training.alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {training.alpha}")
    if not training.full_logit_distillation and training.alpha != 1:
        raise ValueError(f"sampled-token distillation is reverse KL: alpha must be 1, got {training.alpha}")
    if training.is_clip is not None and loss_input.old_log_probs is None:
        raise ValueError("is_clip is set: old_log_probs is required")
    if training.loss_agg_mode not in AGGREGATIONS:
        raise ValueError(f"loss_agg_mode must be one of {AGGREGATIONS}, got {training.loss_agg_mode!r}")


def categories_of(at_support: Tensor, training: LasgroupTraining) -> Categories:
    """The categories of one side, made of its log-probs at the support."""
    return with_tail(at_support) if training.distillation_add_tail else renormalised(at_support)


def lasgroup_loss(loss_input: LasgroupLossInput, published: bool = False) -> SpecTruth:
    """The truth on this input, whatever its dtypes: upcast first.

    Where upstream's arithmetic is not finite this is the limit (0 log 0 = 0; what stands where the mask is 0 counts
    for nothing; no row at all is 0); with ``published`` it is what upstream returns. Raises ValueError for what
    upstream refuses.
    """
    check(loss_input)
    training = loss_input.training
    response_mask = upcast(loss_input.response_mask)
    mask = response_mask
    if loss_input.self_distillation_mask is not None:
        mask = mask * upcast(loss_input.self_distillation_mask).unsqueeze(-1)
    counted = mask != 0

    def read(tensor: Tensor, where: Tensor = counted) -> Tensor:
        value = upcast(tensor)
        if published:
            return value
        return torch.where(where if value.dim() == 2 else where.unsqueeze(-1), value, torch.zeros_like(value))

    z, zt = read(loss_input.student_logits) / training.temperature, read(loss_input.teacher_logits)
    zt = zt / training.temperature
    y = loss_input.response_ids.long().unsqueeze(-1)
    l, lt = z.log_softmax(-1), zt.log_softmax(-1)  # noqa: E741  (the symbol of the spec)
    chosen = l.gather(-1, y).squeeze(-1)
    aside: dict[str, Tensor] = {"l": l, "lt": lt, "mask": mask}

    if training.full_logit_distillation:
        if training.distillation_topk is None:
            support = torch.arange(z.shape[-1]).expand_as(z)
            q, p = Categories(l), Categories(lt)
        else:
            support = z.topk(min(training.distillation_topk, z.shape[-1]), dim=-1).indices
            q, p = (categories_of(log_probs_at(one, support), training) for one in (z, zt))
        per_token = divergence(q.log, p.log, training.alpha, published)
        renormalises = training.distillation_topk is not None and not training.distillation_add_tail
        at_support = to_support(q, slope(q.log, p.log, training.alpha, published), renormalises)
        aside |= {"support": support, "log_q": q.log, "log_p": p.log, "at_support": at_support}
    else:
        support = y
        weight = chosen - lt.gather(-1, y).squeeze(-1)
        per_token, at_support = weight * chosen, weight.unsqueeze(-1)
        aside |= {"support": support}

    factor = torch.ones_like(chosen)
    if training.is_clip is not None:
        assert loss_input.old_log_probs is not None
        factor = importance_ratio(chosen, read(loss_input.old_log_probs), training.is_clip)
        aside["ratio"] = factor
    if loss_input.rollout_is_weights is not None:
        factor = factor * read(loss_input.rollout_is_weights)
    elif loss_input.rollout_log_probs is not None:
        assert loss_input.old_log_probs is not None
        responded = response_mask != 0
        if published and not bool(responded.any()):
            raise ValueError("no response token: upstream cannot describe the rollout weights")
        old, rollout = (read(t, responded) for t in (loss_input.old_log_probs, loss_input.rollout_log_probs))
        aside["rollout_is_weights"] = rollout_weights(old, rollout, response_mask, training)
        factor = factor * aside["rollout_is_weights"]

    counts = (None, None) if published else (training.batch_num_tokens, training.global_batch_size)
    weight = token_weights(mask, training.loss_agg_mode, *counts)
    if not published:
        weight = torch.where(counted, weight, torch.zeros_like(weight))
    values = per_token * factor
    if published and training.loss_agg_mode == "token-mean":
        values = torch.where(counted, values, torch.zeros_like(values))
    at_support = at_support * (factor * torch.nan_to_num(weight)).unsqueeze(-1)
    grad = to_logits(at_support, support, l) / training.temperature
    return SpecTruth(
        loss=(values * weight).sum(),
        metrics={},
        per_token=per_token,
        factor=factor * weight,
        grad_logits=grad,
        aside=aside,
    )
