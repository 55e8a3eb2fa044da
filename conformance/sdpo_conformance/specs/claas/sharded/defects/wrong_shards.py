"""Gradients through a cut vocabulary, and which shard owns an id."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sdpo_conformance.protocol import MASS_FLOOR, Capability
from sdpo_conformance.specs.claas.sharded.defects.sharded_defect import LOSSES, ShardedDefect
from sdpo_conformance.specs.claas.sharded.defects.sharded_parts import (
    LOG_ZERO,
    OnRank,
    ShardedParts,
    carried,
    mine,
    same,
    total,
)


def plain(w: OnRank, tensor: Tensor) -> Tensor:
    """An all_reduce in place: autograd knows nothing of it."""
    return total(tensor, w.group("tp"))


def plain_keeping_own(w: OnRank, tensor: Tensor) -> Tensor:
    """The sum of others, the own part with graph where it is not 0: what a target on another shard gets is lost."""
    whole = total(tensor, w.group("tp"))
    return torch.where(tensor != 0, whole + tensor - tensor.detach(), whole)


def summed_again(w: OnRank, tensor: Tensor) -> Tensor:
    return carried(tensor, lambda t: total(t, w.group("tp")), lambda g: total(g, w.group("tp")))


def divided(w: OnRank, tensor: Tensor) -> Tensor:
    return carried(tensor, lambda t: total(t, w.group("tp")), lambda g: g / w.ranks("tp"))


def identity(w: OnRank, hidden: Tensor) -> Tensor:
    return hidden


def averaged_hidden(w: OnRank, hidden: Tensor) -> Tensor:
    return carried(hidden, same, lambda g: total(g, w.group("tp")) / w.ranks("tp"))


def summed_twice(w: OnRank, hidden: Tensor) -> Tensor:
    return carried(hidden, same, lambda g: total(total(g, w.group("tp")), w.group("tp")))


def on_first_rank(w: OnRank, hidden: Tensor) -> Tensor:
    def back(gradient: Tensor) -> Tensor:
        copy, group = gradient.clone(), w.group("tp")
        if group is not None:
            dist.reduce(copy, dst=dist.get_global_rank(group, 0), group=group)
        return copy if w.place("tp") == 0 else gradient

    return carried(hidden, same, back)


def owners_rows(w: OnRank, gradient: Tensor) -> Tensor:
    owned, _ = mine(w, w.y)
    return torch.where(owned.unsqueeze(-1), gradient, torch.zeros_like(gradient))


def owners_of_the_support(w: OnRank, gradient: Tensor) -> Tensor:
    owned, _ = mine(w, w.support)
    return torch.where(owned.any(-1, keepdim=True), gradient, torch.zeros_like(gradient))


def onehot_everywhere(w: OnRank, gradient: Tensor) -> Tensor:
    """A shard that does not own the response takes the one-hot at its clamped column."""
    owned, _ = mine(w, w.y)
    at = (w.y - w.start).clamp(0, w.columns - 1).unsqueeze(-1)
    push = torch.where(owned, 0.0, gradient.abs().amax(-1)).unsqueeze(-1)
    return gradient.scatter_add(-1, at, push)


def head_gradient_summed(w: OnRank, gradient: Tensor) -> Tensor:
    group = w.group("tp")
    if group is None:
        return gradient
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(w.ranks("tp"))]
    dist.all_gather(sizes, torch.tensor([gradient.shape[0]]), group=group)
    rows = max(int(size) for size in sizes)
    padded = torch.zeros(rows, gradient.shape[1], dtype=gradient.dtype)
    padded[: gradient.shape[0]] = gradient
    return total(padded, group)[: gradient.shape[0]]


def head_gradient_shared(w: OnRank, gradient: Tensor) -> Tensor:
    return gradient / w.ranks("tp")


def head_left_out_after_rank_0(w: OnRank, gradient: Tensor) -> Tensor:
    return gradient if w.place("tp") == 0 else torch.zeros_like(gradient)


def ids_as_local(w: OnRank, ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids < w.held, torch.where(ids < w.held, ids, 0)


def ids_wrapped(w: OnRank, ids: Tensor) -> tuple[Tensor, Tensor]:
    owned, _ = mine(w, ids)
    return owned, torch.where(owned, ids % max(1, w.held), 0)


def last_excluded(w: OnRank, ids: Tensor) -> tuple[Tensor, Tensor]:
    owned, local = mine(w, ids)
    return owned & (local < w.held - 1), local


def first_excluded(w: OnRank, ids: Tensor) -> tuple[Tensor, Tensor]:
    owned, local = mine(w, ids)
    return owned & (local > 0), local


def one_too_many(w: OnRank, ids: Tensor) -> tuple[Tensor, Tensor]:
    local = ids - w.start
    return (local >= 0) & (local <= w.held), local.clamp(0, max(0, w.held - 1))


def one_too_early(w: OnRank, ids: Tensor) -> tuple[Tensor, Tensor]:
    local = ids - w.start
    return (local >= -1) & (local < w.held), local.clamp(0, max(0, w.held - 1))


def clamped_not_masked(w: OnRank, ids: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(ids, dtype=torch.bool), (ids - w.start).clamp(0, max(0, w.columns - 1))


def even_division(w: OnRank, ids: Tensor) -> tuple[Tensor, Tensor]:
    stretch = max(1, w.size // w.ranks("tp"))
    owned = ids // stretch == w.place("tp")
    local = ids - w.place("tp") * stretch
    return owned & (local < w.held), local.clamp(0, max(0, w.held - 1))


def larger_of_both(w: OnRank, tensor: Tensor) -> Tensor:
    """MAX instead of SUM: an owned logit below 0 loses against another rank's 0."""
    whole = total(tensor, w.group("tp"), dist.ReduceOp.MAX)
    return whole + torch.where(tensor == whole, tensor - tensor.detach(), 0.0)


def own_support_alone(w: OnRank) -> Tensor:
    owned, _ = mine(w, w.support)
    l_k = w.l_k.clamp(min=LOG_ZERO)
    inside = torch.where(owned, l_k, LOG_ZERO)
    return l_k - inside.logsumexp(-1, keepdim=True).clamp(min=float(torch.tensor(MASS_FLOOR).log()))


def floor_of_a_share(w: OnRank) -> Tensor:
    """The floor of the mass is divided over the shards."""
    l_k = w.l_k.clamp(min=LOG_ZERO)
    floor = float(torch.tensor(MASS_FLOOR * w.ranks("tp")).log())
    return l_k - l_k.logsumexp(-1, keepdim=True).clamp(min=floor)


def no_floor(w: OnRank) -> Tensor:
    return w.l_k.clamp(min=LOG_ZERO).log_softmax(-1)


def not_renormalised(w: OnRank) -> Tensor:
    return w.l_k.clamp(min=LOG_ZERO)


def ratio_before_the_sum(w: OnRank) -> Tensor:
    """A rank that does not own the response takes its log-prob for 0."""
    owned, _ = mine(w, w.y)
    step = torch.where(owned, w.chosen - w.old, -w.old).detach().clamp(-20, 20)
    return step.exp().clamp(max=w.training.is_clip)


def first_scales_all(w: OnRank, gradient: Tensor) -> Tensor:
    return gradient.flatten()[:1].view(1, 1).expand_as(gradient).clone()


def mean_scales_all(w: OnRank, gradient: Tensor) -> Tensor:
    return gradient.mean().expand_as(gradient).clone()


def first_of_each_row(w: OnRank, gradient: Tensor) -> Tensor:
    return gradient[:, :1].expand_as(gradient).clone()


def ones_arrive(w: OnRank, gradient: Tensor) -> Tensor:
    return torch.ones_like(gradient)


def detached_picks(parts: ShardedParts, w: OnRank, ids: Tensor) -> Tensor:
    owned, local = parts.mine(w, ids)
    found = w.z.gather(-1, local).detach() - w.peak.unsqueeze(-1)
    return total(torch.where(owned, found, 0.0), w.group("tp")) - w.mass.log().unsqueeze(-1)


def _defect(
    name: str, sentence: str, violates: str, seen: tuple[str, ...] = (),
    capabilities: tuple[Capability, ...] = LOSSES, **parts: Any,
) -> ShardedDefect:  # fmt: skip
    return ShardedDefect(name, sentence, tuple(violates.split()), parts, seen=seen, capabilities=capabilities)


FUSED = (Capability.FUSED,)
DIVERGENCE = (Capability.DIVERGENCE,)

DEFECTS = (
    _defect(
        "picks-plain-all-reduce",
        "Logits at support and response go through an all_reduce that autograd does not see.",
        "VP-3",
        ("ms-swift#9947",),
        sum_picks=plain,
    ),
    _defect(
        "mass-plain-all-reduce",
        "The sum goes through an all_reduce that autograd does not see.",
        "VP-3",
        ("ms-swift#9947",),
        sum_mass=plain,
    ),
    _defect(
        "picks-detached",
        "The chosen logits are gathered from detached ones.",
        "VP-3",
        ("ms-swift#9947",),
        at=detached_picks,
    ),
    _defect(
        "picks-summed-again",
        "The backward of the sum of chosen logits sums again: TP times.",
        "VP-3",
        ("torchtitan#3412",),
        sum_picks=summed_again,
    ),
    _defect(
        "mass-summed-again",
        "The backward of the sum sums again: TP times the softmax.",
        "VP-3",
        ("torchtitan#3412",),
        sum_mass=summed_again,
    ),
    _defect("mass-gradient-divided", "The softmax's gradient is divided by TP.", "VP-3", sum_mass=divided),
    _defect(
        "picks-gradient-divided", "The gradient at support and response is divided by TP.", "VP-3", sum_picks=divided
    ),
    _defect(
        "gradient-on-owning-shard-alone",
        "Only the shard that owns the response gets a gradient.",
        "VP-3",
        ("apple/ml-cross-entropy#42",),
        logits_gradient=owners_rows,
    ),
    _defect(
        "gradient-on-shards-of-support-alone",
        "Only shards that own some of the support get a gradient.",
        "VP-3",
        ("torchtitan#3412",),
        logits_gradient=owners_of_the_support,
    ),
    _defect(
        "onehot-on-every-shard",
        "A shard that does not own the response subtracts the one-hot as well.",
        "VP-3",
        logits_gradient=onehot_everywhere,
    ),
    _defect(
        "hidden-gradient-not-summed",
        "Each rank keeps its share of the hidden states' gradient.",
        "VP-9",
        ("pytorch#190746",),
        FUSED,
        share=identity,
    ),
    _defect(
        "hidden-gradient-averaged",
        "The hidden states' gradient is averaged over tp.",
        "VP-9",
        (),
        FUSED,
        share=averaged_hidden,
    ),
    _defect(
        "hidden-gradient-summed-twice",
        "The hidden states' gradient is summed over tp twice.",
        "VP-9",
        ("Megatron-LM#673",),
        FUSED,
        share=summed_twice,
    ),
    _defect(
        "hidden-gradient-on-rank-0",
        "The hidden states' gradient is reduced to rank 0.",
        "VP-9",
        (),
        FUSED,
        share=on_first_rank,
    ),
    _defect(
        "head-gradient-summed-over-shards",
        "The head's gradient is summed over tp: rows of other ids are mixed in.",
        "VP-9",
        (),
        FUSED,
        head_gradient=head_gradient_summed,
    ),
    _defect(
        "head-gradient-divided",
        "The head's gradient is divided by TP.",
        "VP-9",
        (),
        FUSED,
        head_gradient=head_gradient_shared,
    ),
    _defect(
        "head-gradient-of-rank-0-alone",
        "Only the first shard of the head is trained.",
        "VP-9",
        (),
        FUSED,
        head_gradient=head_left_out_after_rank_0,
    ),
    _defect(
        "ids-taken-as-local",
        "Ids are not counted from the shard's start.",
        "VP-8",
        ("Megatron-LM#7452 item 1",),
        mine=ids_as_local,
    ),
    _defect("ids-wrapped", "The column is the id modulo the shard's size.", "VP-8", mine=ids_wrapped),
    _defect("last-id-of-a-shard-left-out", "The end of the stretch is one too low.", "VP-8", mine=last_excluded),
    _defect("first-id-of-a-shard-left-out", "The start of the stretch is one too high.", "VP-8", mine=first_excluded),
    _defect("first-id-of-the-next-shard-counted", "The end of the stretch is one too high.", "VP-8", mine=one_too_many),
    _defect(
        "last-id-of-the-shard-before-counted", "The start of the stretch is one too low.", "VP-8", mine=one_too_early
    ),
    _defect(
        "unowned-ids-clamped",
        "Ids of other shards are clamped into this one and not masked.",
        "VP-8",
        ("Megatron-LM#7452 item 3",),
        mine=clamped_not_masked,
    ),
    _defect(
        "owner-by-even-division",
        "The owner is id // (V // TP), whatever the cut.",
        "VP-8",
        ("Megatron-LM#7452 item 1",),
        mine=even_division,
    ),
    _defect(
        "picks-by-maximum",
        "The chosen logit is the maximum over ranks instead of the sum.",
        "VP-8",
        sum_picks=larger_of_both,
    ),
    _defect(
        "ratio-before-the-sum",
        "The ratio is taken before the chosen log-prob was summed over shards.",
        "VP-1",
        ratio=ratio_before_the_sum,
    ),
    _defect(
        "support-renormalised-by-shard",
        "Each rank renormalises over the support that it owns.",
        "VP-8 VP-11",
        student_distribution=own_support_alone,
    ),
    _defect(
        "floor-times-shards",
        "The floor below the support's mass grows with TP.",
        "VP-11",
        student_distribution=floor_of_a_share,
    ),
    _defect(
        "no-floor-on-shards",
        "The sharded path has no floor below the support's mass.",
        "VP-11",
        student_distribution=no_floor,
    ),
    _defect(
        "support-not-renormalised-on-shards",
        "The sharded path does not renormalise over the support.",
        "VP-1",
        ("Liger-Kernel#1082",),
        student_distribution=not_renormalised,
    ),
    _defect(
        "first-incoming-scales-all",
        "The first token's incoming gradient scales every token.",
        "VP-4",
        ("NeMo-Automodel#3853",),
        DIVERGENCE,
        incoming=first_scales_all,
    ),
    _defect(
        "mean-incoming-scales-all",
        "The mean of the incoming gradient scales every token.",
        "VP-4",
        ("Liger-Kernel#1298",),
        DIVERGENCE,
        incoming=mean_scales_all,
    ),
    _defect(
        "first-incoming-of-a-row",
        "The first token of a row scales the row.",
        "VP-4",
        (),
        DIVERGENCE,
        incoming=first_of_each_row,
    ),
    _defect(
        "incoming-taken-for-one",
        "What arrives at each token is taken for 1.",
        "VP-4",
        ("Liger-Kernel#1298",),
        DIVERGENCE,
        incoming=ones_arrive,
    ),
    _defect(
        "incoming-of-the-loss-ignored",
        "The gradient that arrives at the loss is taken for 1.",
        "DP-5",
        ("Liger-Kernel#1298",),
        incoming=ones_arrive,
    ),
    _defect(
        "softmax-lost-where-nothing-is-owned",
        "The sum carries a gradient only where this rank's part is not 0.",
        "VP-3",
        ("ms-swift#9947",),
        sum_picks=plain_keeping_own,
        sum_mass=partial(plain),
    ),
)
