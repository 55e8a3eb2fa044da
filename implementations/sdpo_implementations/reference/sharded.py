"""The CLaaS SDPO loss on one rank of a DeviceMesh, in plain PyTorch, to be read beside the formulas.

tp: this rank holds the logits of the ids from ``vocab_start`` on. A log-prob needs the logsumexp, and the logit of
its token; both are sums over tp of what each rank has. dp, cp: this rank holds some of the tokens. The mean needs
the number of all tokens; each rank differentiates dp x cp times its own share of it, because what follows (DDP, FSDP)
averages the gradients of these ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.collectives import batch_ranks, batch_sum, group_of, maximum, shared, summed
from sdpo_implementations.reference.loss import (
    divergence_over_support,
    importance_ratio,
    k3_anchor,
    reverse_kl_surrogate,
    working_dtype,
)

LOWEST_LOGIT = -1e30
"""Where a rank holds no id at all, or none with mass: exp of it is 0 whatever the maximum."""


class ShardedLogits:
    """log_softmax over a vocabulary cut along ``group``. ``logits`` (..., V of this rank), the first that of the id
    ``start``; ids from ``size`` on are padding. Raises ValueError where the ranks hold more than the vocabulary."""

    def __init__(self, logits: Tensor, group: Any, start: int, size: int) -> None:
        self.group, self.start = group, start
        self.held = max(0, min(logits.shape[-1], size - start))
        count = batchless_sum(self.held, logits, group)
        if count != size:
            raise ValueError(
                f"the ranks of tp hold {count} ids of a vocabulary of {size}: each must hold its own stretch, from "
                "vocab_start on (gathered logits belong into a loss without tp)"
            )
        self.logits = logits[..., : self.held]
        nothing = logits.new_full((*logits.shape[:-1], 1), LOWEST_LOGIT)
        peak = maximum(torch.cat([self.logits.detach(), nothing], dim=-1).amax(-1), group)
        mass = summed((self.logits - peak.unsqueeze(-1)).exp().sum(-1), group)
        self.peak, self.log_mass = peak, mass.log()

    def at(self, ids: Tensor) -> Tensor:
        """Log-probs of ``ids`` (..., K), whichever rank owns them."""
        local = ids - self.start
        mine = (local >= 0) & (local < self.held)
        if self.held:
            found = self.logits.gather(-1, torch.where(mine, local, 0))
            found = torch.where(mine, found - self.peak.unsqueeze(-1), 0.0)
        else:
            found = self.logits.sum(-1, keepdim=True) + torch.zeros_like(ids, dtype=self.logits.dtype)
        return summed(found, self.group) - self.log_mass.unsqueeze(-1)


def batchless_sum(count: int, like: Tensor, group: Any) -> int:
    """The sum of a number over ``group``."""
    if group is None:
        return count
    total = torch.tensor(count, dtype=torch.int64, device=like.device)
    torch.distributed.all_reduce(total, group=group)
    return int(total)


def compute_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """The loss and its metrics, equal on every rank of ``loss_input.mesh``.

    ``student_logits`` (B, T, V of this rank), the other tensors as in the loss of one process, those of this rank's
    tokens, with global ids. The gradient of ``loss`` is the one token mean's once it was averaged over dp x cp.
    """
    training, mesh = loss_input.training, loss_input.mesh
    dtype = working_dtype(loss_input.student_logits)
    mask = loss_input.response_mask.to(dtype)
    ignored = mask == 0
    logits = loss_input.student_logits.to(dtype).masked_fill(ignored.unsqueeze(-1), 0.0)
    tau = loss_input.teacher_logprobs.detach().to(dtype).masked_fill(ignored.unsqueeze(-1), 0.0)
    old = loss_input.old_student_logprobs.detach().to(dtype).masked_fill(ignored, 0.0)
    base = loss_input.base_logprobs.detach().to(dtype).masked_fill(ignored, 0.0)
    support, y = loss_input.teacher_indices.long(), loss_input.response_ids.long()

    student = ShardedLogits(logits, group_of(mesh, "tp"), loss_input.vocab_start, loss_input.vocab_size)
    logprobs = student.at(torch.cat([support, y.unsqueeze(-1)], dim=-1))
    at_support, chosen = logprobs[..., :-1], logprobs[..., -1]
    if training.alpha < 1:
        per_token = divergence_over_support(at_support, tau, training.alpha)
    else:
        per_token = reverse_kl_surrogate(chosen, tau, support, y)
    ratio = importance_ratio(chosen, old, training.is_clip)

    weight = mask / batch_sum(mask.sum(), mesh).clamp(min=1.0)
    distill_loss, kl_reg = (per_token * ratio * weight).sum(), (k3_anchor(chosen, base) * weight).sum()
    mine = distill_loss + training.kl_reg_weight * kl_reg if training.kl_reg_weight else distill_loss
    clipped = (ratio >= training.is_clip) * weight
    totals = batch_sum(torch.stack([mine, distill_loss, kl_reg, (ratio * weight).sum(), clipped.sum()]), mesh)
    differentiated = batch_ranks(mesh) * mine
    return {
        "loss": totals[0] + (differentiated - differentiated.detach()),
        "distill_loss": totals[1],
        "kl_reg": totals[2],
        "mean_is_ratio": totals[3],
        "clip_fraction": totals[4],
    }


class _FromHeadShard:
    """A fused input on one rank with this rank's logits computed."""

    def __init__(self, fused: Any) -> None:
        vars(self).update(vars(fused))
        dtype = working_dtype(fused.student_hidden)
        hidden = fused.student_hidden.to(dtype).masked_fill((fused.response_mask == 0).unsqueeze(-1), 0.0)
        head = fused.lm_head_weight.to(dtype)[: max(0, fused.vocab_size - fused.vocab_start)]
        self.student_logits = shared(hidden, group_of(fused.mesh, "tp")) @ head.T


def compute_fused_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """The same from student_hidden (B, T, H), whole on every rank of tp, and lm_head_weight (V of this rank, H)."""
    return compute_sdpo_loss(_FromHeadShard(loss_input))


def compute_divergence(
    hidden: Tensor, head: Tensor, tau: Tensor, support: Tensor, alpha: float, mesh: Any, start: int, size: int
) -> Tensor:
    """The divergence alone, (B, T) of this rank's tokens."""
    dtype, group = working_dtype(hidden), group_of(mesh, "tp")
    logits = shared(hidden.to(dtype), group) @ head.to(dtype)[: max(0, size - start)].T
    at_support = ShardedLogits(logits, group, start, size).at(support.long())
    return divergence_over_support(at_support, tau.detach().to(dtype), alpha)


@torch.no_grad()
def compute_response_logprobs(hidden: Tensor, head: Tensor, ids: Tensor, mesh: Any, start: int, size: int) -> Tensor:
    """Log-probs of this rank's response tokens, (B, T), equal on every rank of tp."""
    dtype, group = working_dtype(hidden), group_of(mesh, "tp")
    logits = hidden.to(dtype) @ head.to(dtype)[: max(0, size - start)].T
    return ShardedLogits(logits, group, start, size).at(ids.long().unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def compute_teacher_topk(
    hidden: Tensor, head: Tensor, k: int, mesh: Any, start: int, size: int
) -> tuple[Tensor, Tensor]:
    """The k largest log-probs of the whole vocabulary and their global ids, (B, T, K), equal on every rank of tp.

    Each rank offers as many candidates as it may have to give, and every rank picks from all of them.
    """
    dtype, group = working_dtype(hidden), group_of(mesh, "tp")
    logits = hidden.to(dtype) @ head.to(dtype)[: max(0, size - start)].T
    student, k = ShardedLogits(logits, group, start, size), min(max(1, k), size)
    values = logits.new_full((*logits.shape[:-1], k), float("-inf"))
    ids = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    mine = min(k, student.held)
    values[..., :mine], local = student.logits.topk(mine, dim=-1)
    ids[..., :mine] = local + start
    if group is not None:
        values, ids = gathered(values, group), gathered(ids, group)
    values, places = values.topk(k, dim=-1)
    return values - (student.peak + student.log_mass).unsqueeze(-1), ids.gather(-1, places)


def gathered(tensor: Tensor, group: Any) -> Tensor:
    """Every rank's tensor, of one shape, side by side along the last dimension."""
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
