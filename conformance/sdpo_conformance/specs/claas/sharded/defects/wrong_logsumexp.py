"""The normaliser of a cut vocabulary, its padding, and the precision of what is exchanged."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sdpo_conformance.specs.claas.sharded.defects.sharded_defect import ShardedDefect
from sdpo_conformance.specs.claas.sharded.defects.sharded_parts import (
    NOWHERE,
    OnRank,
    ShardedParts,
    carried,
    exponentials,
    gathered,
    over_tp,
    real,
    same,
    total,
)


def own_peak(w: OnRank) -> Tensor:
    nothing = w.z.new_full((*w.z.shape[:-1], 1), NOWHERE)
    return torch.cat([w.z.detach()[..., : w.held], nothing], -1).amax(-1)


def local_mass(parts: ShardedParts, w: OnRank) -> Tensor:
    return exponentials(parts, w)


def unscaled_maxima(parts: ShardedParts, w: OnRank) -> Tensor:
    own = own_peak(w)
    added = parts.sum_mass(w, (real(w) - own.unsqueeze(-1)).exp().sum(-1))
    return added


def summed_logsumexps(parts: ShardedParts, w: OnRank) -> Tensor:
    return over_tp(w, exponentials(parts, w).clamp(min=1e-30).log()).exp()


def averaged(parts: ShardedParts, w: OnRank) -> Tensor:
    return over_tp(w, exponentials(parts, w)) / w.ranks("tp")


def gathered_then_summed(parts: ShardedParts, w: OnRank) -> Tensor:
    own = exponentials(parts, w)
    whole = own + sum(gathered(own, w.group("tp"))) - own.detach()
    return over_tp(w, whole)


def added_maxima(w: OnRank) -> Tensor:
    return total(own_peak(w), w.group("tp"))


def maximum_with_padding(w: OnRank) -> Tensor:
    return total(w.z.detach().amax(-1).nan_to_num(), w.group("tp"), dist.ReduceOp.MAX)


def first_ranks_maximum(w: OnRank) -> Tensor:
    return gathered(own_peak(w), w.group("tp"))[0]


def last_ranks_maximum(w: OnRank) -> Tensor:
    return gathered(own_peak(w), w.group("tp"))[-1]


def no_maximum(w: OnRank) -> Tensor:
    return torch.zeros_like(w.z[..., 0].detach())


def on_rank_0_alone(w: OnRank, tensor: Tensor) -> Tensor:
    def reduce(local: Tensor) -> Tensor:
        copy, group = local.clone(), w.group("tp")
        if group is not None:
            dist.reduce(copy, dst=dist.get_global_rank(group, 0), group=group)
        return copy if w.place("tp") == 0 else local.clone()

    return carried(tensor, reduce, same)


def with_padding(w: OnRank) -> Tensor:
    return w.z


def padding_at(value: float, w: OnRank) -> Tensor:
    z = w.z.clone()
    z[..., w.held :] = value
    return z


def padding_owned(w: OnRank, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Every id beyond the shard means the first column of padding, and is not taken out again."""
    local = ids - w.start
    owned = (local >= 0) & (local < w.held)
    sentinel = torch.full_like(local, min(w.held, w.columns - 1))
    return owned | (w.held < w.columns), torch.where(owned, local, sentinel)


def padding_of_other_ranks(w: OnRank) -> Tensor:
    """Padding is taken out on the last rank alone."""
    return w.z[..., : w.held] if w.place("tp") == w.ranks("tp") - 1 and w.held else w.z


def peak_of_nothing(w: OnRank) -> Tensor:
    return total(w.z.detach()[..., : w.held].amax(-1), w.group("tp"), dist.ReduceOp.MAX)


def leftover_gradient(w: OnRank, gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[..., w.held :] = gradient.abs().amax()
    return gradient


def exchanged_in(dtype: torch.dtype, w: OnRank, tensor: Tensor) -> Tensor:
    return carried(tensor, lambda t: total(t.to(dtype), w.group("tp")).to(t.dtype), same)


def logits_in_half(w: OnRank) -> Tensor:
    return carried(real(w), lambda t: t.to(torch.bfloat16).to(t.dtype), same)


def peak_in(dtype: torch.dtype, w: OnRank) -> Tensor:
    """Rounded on the way out, and not on the way in: the two uses of it differ."""
    return total(own_peak(w).to(dtype), w.group("tp"), dist.ReduceOp.MAX).to(w.z.dtype)


def mass_with_unrounded_peak(parts: ShardedParts, w: OnRank) -> Tensor:
    exact = total(own_peak(w), w.group("tp"), dist.ReduceOp.MAX)
    return over_tp(w, (real(w) - exact.unsqueeze(-1)).exp().sum(-1))


def _defect(name: str, sentence: str, violates: str, seen: tuple[str, ...] = (), **parts: Any) -> ShardedDefect:
    return ShardedDefect(name, sentence, tuple(violates.split()), parts, seen=seen)


DEFECTS = (
    _defect("local-logsumexp", "Each rank normalises over its own shard.", "VP-1", ("unsloth#10616",), mass=local_mass),
    _defect(
        "shard-maxima-not-aligned",
        "Each rank's sum is taken against its own maximum, and the sums are added as they are.",
        "VP-1",
        ("unsloth#10616",),
        mass=unscaled_maxima,
    ),
    _defect(
        "logsumexps-added", "The ranks' logsumexps are added instead of their sums.", "VP-1", mass=summed_logsumexps
    ),
    _defect(
        "mass-averaged",
        "The sum over shards is divided by TP: off by log(TP).",
        "VP-1",
        ("Megatron-LM#7452 item 2",),
        mass=averaged,
    ),
    _defect(
        "gathered-and-summed",
        "Gathered statistics are summed over tp once more: off by log(TP).",
        "VP-1",
        ("Megatron-LM#7452 item 2",),
        mass=gathered_then_summed,
    ),
    _defect("maxima-added", "The maximum is all-reduced with SUM.", "VP-1", peak=added_maxima),
    _defect("maximum-of-first-rank", "The first rank's maximum serves all.", "VP-1", peak=first_ranks_maximum),
    _defect("maximum-of-last-rank", "The last rank's maximum serves all.", "VP-1", peak=last_ranks_maximum),
    _defect("no-maximum", "Exponentials without a maximum overflow.", "VP-1", peak=no_maximum),
    _defect(
        "reduced-to-rank-0",
        "The sum is reduced to rank 0; the others go on with their own.",
        "VP-1",
        sum_mass=on_rank_0_alone,
    ),
    _defect(
        "picks-on-rank-0",
        "The chosen logits are reduced to rank 0; the others go on with their own.",
        "VP-1",
        sum_picks=on_rank_0_alone,
    ),
    _defect(
        "padding-adds-exp-0",
        "Padding of the vocabulary is in the sum.",
        "VP-2",
        ("verl#2899", "verl#5349"),
        real=with_padding,
    ),
    _defect(
        "padding-set-to-a-number",
        "Padding is set to -10 instead of being left out.",
        "VP-2",
        ("verl#5349",),
        real=partial(padding_at, -10.0),
    ),
    _defect(
        "padding-set-to-0",
        "Padding is zeroed and stays in the sum.",
        "VP-2",
        ("verl#2899",),
        real=partial(padding_at, 0.0),
    ),
    _defect(
        "maximum-of-padding",
        "The maximum is taken before padding is cut off: beside a large value there every exponential is 0.",
        "VP-2",
        peak=maximum_with_padding,
    ),
    _defect(
        "sentinel-is-a-column",
        "The sentinel of ids of other shards is a padded column of this one.",
        "VP-2",
        ("apple/ml-cross-entropy#59",),
        mine=padding_owned,
    ),
    _defect(
        "padding-left-out-on-last-rank-alone",
        "Only the last rank knows of padding.",
        "VP-2",
        ("verl#2899",),
        real=padding_of_other_ranks,
    ),
    _defect(
        "shard-of-padding-alone", "A maximum over no column at all.", "VP-2", ("SkyRL#1832",), peak=peak_of_nothing
    ),
    _defect(
        "padding-gets-a-gradient",
        "The gradient at padding is never written.",
        "VP-2",
        logits_gradient=leftover_gradient,
    ),
    _defect(
        "sum-exchanged-in-bfloat16",
        "The sum over shards is exchanged in bfloat16.",
        "VP-7",
        ("vllm#42259",),
        sum_mass=partial(exchanged_in, torch.bfloat16),
    ),
    _defect(
        "sum-exchanged-in-float16",
        "The sum over shards is exchanged in float16.",
        "VP-7",
        sum_mass=partial(exchanged_in, torch.float16),
    ),
    _defect(
        "chosen-logits-exchanged-in-bfloat16",
        "Logits at support and response are exchanged in bfloat16.",
        "VP-7",
        ("vllm#42259",),
        sum_picks=partial(exchanged_in, torch.bfloat16),
    ),
    _defect(
        "logits-rounded-before-the-sum",
        "The sum is taken over logits rounded to bfloat16.",
        "VP-7",
        ("vllm#42260",),
        real=logits_in_half,
    ),
    _defect(
        "maximum-rounded-once",
        "The maximum subtracted from the chosen logit is bfloat16's, the one in the sum is not.",
        "VP-7",
        peak=partial(peak_in, torch.bfloat16),
        mass=mass_with_unrounded_peak,
    ),
)
