"""From tokens on many ranks to one mean: counts, factors, empty ranks, metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sdpo_conformance.protocol import METRIC_KEYS
from sdpo_conformance.specs.claas.sharded.defects.sharded_defect import ShardedDefect
from sdpo_conformance.specs.claas.sharded.defects.sharded_parts import (
    OnRank,
    ShardedParts,
    carried,
    metrics,
    over_batch,
    same,
    total,
    weigh,
)


def own_count(w: OnRank) -> Tensor:
    return w.mask.sum().clamp(min=1.0)


def unclamped_own_count(w: OnRank) -> Tensor:
    return w.mask.sum()


def no_factor(w: OnRank) -> float:
    return 1.0


def factor_twice(w: OnRank) -> float:
    return float((w.ranks("dp") * w.ranks("cp")) ** 2)


def world_factor(w: OnRank) -> float:
    return float(dist.get_world_size())


def own_value(w: OnRank, own: Tensor) -> Tensor:
    return own.detach()


def summed_means(w: OnRank, own: Tensor) -> Tensor:
    return over_batch(w, own)


def averaged_value(w: OnRank, own: Tensor) -> Tensor:
    return over_batch(w, own) / (w.ranks("dp") * w.ranks("cp"))


def clamped_then_summed(w: OnRank) -> Tensor:
    return over_batch(w, w.mask.sum().clamp(min=1.0))


def unclamped(w: OnRank) -> Tensor:
    return over_batch(w, w.mask.sum())


def clamped_low(w: OnRank) -> Tensor:
    return over_batch(w, w.mask.sum()).clamp(min=1e-8)


def whole_tokens(w: OnRank) -> Tensor:
    return over_batch(w, (w.mask != 0).sum().to(w.mask)).clamp(min=1.0)


def positions(w: OnRank) -> Tensor:
    return over_batch(w, torch.ones_like(w.mask).sum())


def rows(w: OnRank) -> Tensor:
    return over_batch(w, (w.mask.sum(-1) > 0).sum().to(w.mask)).clamp(min=1.0)


def over_the_world(w: OnRank) -> Tensor:
    return total(w.mask.sum(), dist.group.WORLD).clamp(min=1.0)


def over_tp_too(w: OnRank) -> Tensor:
    return total(over_batch(w, w.mask.sum()), w.group("tp")).clamp(min=1.0)


def row_means(w: OnRank, values: Tensor) -> Tensor:
    count = w.mask.sum(-1).clamp(min=1.0)
    whole = over_batch(w, (w.mask.sum(-1) > 0).sum().to(w.mask)).clamp(min=1.0)
    return ((values * w.mask).sum(-1) / count).sum() / whole


def own_mean(w: OnRank, values: Tensor) -> Tensor:
    """A rank's own mean, averaged over ranks afterwards."""
    return (values * w.mask).sum() / own_count(w) / (w.ranks("dp") * w.ranks("cp"))


def largest_count(w: OnRank) -> Tensor:
    count = w.mask.sum()
    for axis in ("dp", "cp"):
        count = total(count, w.group(axis), dist.ReduceOp.MAX)
    return (count * w.ranks("dp") * w.ranks("cp")).clamp(min=1.0)


def first_count(w: OnRank) -> Tensor:
    """Every rank is taken to hold as many tokens as the first."""
    count = w.mask.sum().clone()
    dist.broadcast(count, src=0)
    return (count * w.ranks("dp") * w.ranks("cp")).clamp(min=1.0)


def added_in_backward(parts: ShardedParts, w: OnRank, own: Tensor) -> Tensor:
    """The value is reduced by a collective whose backward reduces as well, and the factor is applied besides."""
    scaled = carried(own * parts.factor(w), same, lambda g: over_batch(w, g))
    return over_batch(w, own) + (scaled - scaled.detach())


def without_graph(parts: ShardedParts, w: OnRank, own: Tensor) -> Tensor:
    """The loss is reduced in place: the other ranks' part is there, the gradient is this rank's without the factor."""
    return own + (over_batch(w, own) - own.detach())


def nothing_here(w: OnRank) -> Mapping[str, Any] | None:
    """A rank without a token returns 0 at once; the others wait for it."""
    if bool(w.mask.any()):
        return None
    return {"loss": w.z.sum() * 0.0, **{key: torch.zeros(()) for key in METRIC_KEYS}}


def refuses_nothing(w: OnRank) -> Mapping[str, Any] | None:
    if not bool(w.mask.any()):
        raise ValueError("no response token in this micro-batch")
    return None


def own_metrics(w: OnRank) -> dict[str, Tensor]:
    capped = (w.ratio >= w.training.is_clip).to(w.ratio)
    values = (w.divergence * w.ratio, w.k3, w.ratio, capped)
    return {key: ((v * w.mask).sum() / own_count(w)).detach() for key, v in zip(METRIC_KEYS, values, strict=True)}


def averaged_metrics(w: OnRank) -> dict[str, Tensor]:
    ranks = w.ranks("dp") * w.ranks("cp")
    return {key: over_batch(w, value) / ranks for key, value in own_metrics(w).items()}


def summed_own_metrics(w: OnRank) -> dict[str, Tensor]:
    return {key: over_batch(w, value) for key, value in own_metrics(w).items()}


def reduced_twice(w: OnRank) -> dict[str, Tensor]:
    return {key: over_batch(w, value) for key, value in metrics(w).items()}


def unreduced_shares(w: OnRank) -> dict[str, Tensor]:
    capped = (w.ratio >= w.training.is_clip).to(w.ratio)
    values = (w.divergence * w.ratio, w.k3, w.ratio, capped)
    return {key: weigh(w, v).detach() for key, v in zip(METRIC_KEYS, values, strict=True)}


def one_wrong(key: str) -> Any:
    def found(w: OnRank) -> dict[str, Tensor]:
        return {**metrics(w), key: own_metrics(w)[key]}

    return found


def on_first_rank(w: OnRank) -> dict[str, Tensor]:
    return metrics(w) if dist.get_rank() == 0 else {**metrics(w), **own_metrics(w)}


def maximal_clip(w: OnRank) -> dict[str, Tensor]:
    found = {**metrics(w)}
    largest = own_metrics(w)["clip_fraction"]
    for axis in ("dp", "cp"):
        largest = total(largest, w.group(axis), dist.ReduceOp.MAX)
    return {**found, "clip_fraction": largest}


def _defect(
    name: str, sentence: str, violates: str, seen: tuple[str, ...] = (), mesh: str = "dp=2", **parts: Any
) -> ShardedDefect:
    return ShardedDefect(name, sentence, tuple(violates.split()), parts, mesh, seen)


FACTOR = ("verl#7200", "verl#7225")

DEFECTS = (
    _defect(
        "mean-of-rank-means",
        "Each rank's own mean, averaged: short ranks weigh more.",
        "DP-1",
        ("transformers#34191", "transformers#34373", "torchtune#1875", "open-instruct#1161", "trl#6006"),
        count=own_count,
        factor=no_factor,
        value=averaged_value,
    ),
    _defect(
        "no-factor-of-ranks",
        "The global mean without the factor of dp: the gradient is too small by it.",
        "DP-1",
        FACTOR,
        factor=no_factor,
    ),
    _defect("factor-twice", "The factor of dp enters twice.", "DP-1", FACTOR, factor=factor_twice),
    _defect(
        "own-count-with-factor", "The rank's own count, and the factor of dp besides.", "DP-1", FACTOR, count=own_count
    ),
    _defect("loss-not-reduced", "The loss reported is the rank's own share.", "DP-1", ("trl#6478",), value=own_value),
    _defect(
        "loss-averaged-after-the-sum",
        "The value is divided by dp once more.",
        "DP-1",
        ("trl#5619",),
        value=averaged_value,
    ),
    _defect(
        "row-means-over-ranks",
        "A mean of row means over all ranks.",
        "DP-1",
        ("lasgroup/SDPO DA 769-772",),
        weigh=row_means,
        weigh_anchor=row_means,
    ),
    _defect("anchor-mean-of-rank-means", "The anchor alone is a mean of rank means.", "DP-1", weigh_anchor=own_mean),
    _defect(
        "largest-rank-counts-for-all",
        "The largest rank's count stands for every rank's.",
        "DP-1",
        ("transformers#34373",),
        count=largest_count,
    ),
    _defect(
        "first-rank-counts-for-all",
        "The first rank's count stands for every rank's.",
        "DP-1",
        ("open-instruct#1161",),
        count=first_count,
    ),
    _defect("rows-counted", "The sum is divided by rows instead of tokens.", "DP-1", ("torchtune#1875",), count=rows),
    _defect("positions-counted", "Masked positions are in the denominator.", "DP-1", count=positions),
    _defect(
        "backward-reduces-too",
        "The reduction's backward reduces again, and the factor is applied besides.",
        "DP-1",
        ("trl#5619",),
        assemble=added_in_backward,
    ),
    _defect(
        "reduced-without-factor",
        "The value is reduced in place; the gradient lacks the factor.",
        "DP-1",
        FACTOR,
        assemble=without_graph,
    ),
    _defect(
        "count-over-the-world",
        "Tokens are counted over tp as well: TP times too many.",
        "MESH-1",
        ("SkyRL#1420",),
        "tp=2",
        count=over_the_world,
    ),
    _defect("count-over-tp", "Tokens are counted over tp too.", "MESH-1", (), "tp=2,dp=2", count=over_tp_too),
    _defect(
        "factor-of-the-world",
        "The factor is the world's size, tp included.",
        "MESH-1",
        FACTOR,
        "tp=2",
        factor=world_factor,
    ),
    _defect(
        "empty-rank-returns-early",
        "A rank without a token returns before the collectives: the others hang.",
        "DP-2",
        ("lasgroup/SDPO self_distillation_mask",),
        early=nothing_here,
    ),
    _defect(
        "empty-rank-raises",
        "A rank without a token raises.",
        "DP-2",
        ("ms-swift gkd_loss.py 118-122",),
        early=refuses_nothing,
    ),
    _defect(
        "empty-rank-is-a-mean-of-0",
        "Empty ranks count as a mean of 0.",
        "DP-2",
        ("transformers#34373",),
        weigh=own_mean,
        weigh_anchor=own_mean,
    ),
    _defect("empty-batch-is-nan", "0 / 0 where no rank has a token.", "DP-2", count=unclamped),
    _defect(
        "own-counts-clamped",
        "Each rank's count is clamped to 1 before the sum.",
        "DP-4",
        ("transformers#34373",),
        count=clamped_then_summed,
    ),
    _defect("count-not-clamped-to-1", "The denominator is clamped to 1e-8 instead of 1.", "DP-4", count=clamped_low),
    _defect("tokens-counted-whole", "A fractional mask is counted as whole tokens.", "DP-4", count=whole_tokens),
    _defect(
        "metrics-of-own-rank", "Metrics are the rank's own means.", "DP-3", ("Megatron-LM#4896",), metrics=own_metrics
    ),
    _defect(
        "metrics-averaged-unweighted",
        "Metrics are means of rank means.",
        "DP-3",
        ("SkyRL#1420",),
        metrics=averaged_metrics,
    ),
    _defect(
        "metrics-summed-on-the-mesh",
        "Metrics are sums of rank means.",
        "DP-3",
        ("SkyRL#1420",),
        metrics=summed_own_metrics,
    ),
    _defect(
        "metrics-reduced-twice",
        "Metrics are reduced twice.",
        "DP-3",
        ("SkyRL#1420", "Megatron-LM#4896"),
        metrics=reduced_twice,
    ),
    _defect("metrics-not-reduced", "Metrics are the rank's share of the mean.", "DP-3", metrics=unreduced_shares),
    _defect("metrics-on-rank-0-alone", "Only rank 0 has the batch's metrics.", "DP-3", metrics=on_first_rank),
    _defect("kl-reg-of-own-rank", "kl_reg is the rank's own.", "DP-3", metrics=one_wrong("kl_reg")),
    _defect(
        "mean-is-ratio-of-own-rank", "mean_is_ratio is the rank's own.", "DP-3", metrics=one_wrong("mean_is_ratio")
    ),
    _defect(
        "clip-fraction-of-own-rank", "clip_fraction is the rank's own.", "DP-3", metrics=one_wrong("clip_fraction")
    ),
    _defect("clip-fraction-by-maximum", "clip_fraction is the largest rank's.", "DP-3", metrics=maximal_clip),
)
