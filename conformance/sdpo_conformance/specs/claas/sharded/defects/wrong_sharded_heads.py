"""The teacher's top-k and the refresh's log-probs from a cut head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.sharded.defects.sharded_defect import ShardedDefect
from sdpo_conformance.specs.claas.sharded.defects.sharded_parts import (
    OnRank,
    ShardedParts,
    exponentials,
    gathered,
    mine,
    over_tp,
    total,
)


def candidates(w: OnRank, k: int, filling: float = float("-inf"), columns: int | None = None) -> tuple[Tensor, Tensor]:
    """This rank's k best (logits, columns), short ones filled."""
    held = w.held if columns is None else columns
    own = min(k, held)
    values = w.z.new_full((*w.z.shape[:-1], k), filling)
    ids = torch.zeros(values.shape, dtype=torch.int64)
    values[..., :own], ids[..., :own] = w.z[..., :held].topk(own, -1)
    return values, ids


def picked(w: OnRank, k: int, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The k best of all ranks' candidates."""
    group = w.group("tp")
    every, every_id = torch.cat(gathered(values, group), -1), torch.cat(gathered(ids, group), -1)
    best, places = every.topk(k, -1)
    return best - (w.peak + w.mass.log()).unsqueeze(-1), every_id.gather(-1, places)


def of_the_own_shard(parts: ShardedParts, w: OnRank, k: int) -> tuple[Tensor, Tensor]:
    values, ids = candidates(w, k)
    return values - (w.peak + w.mass.log()).unsqueeze(-1), ids + w.start


def local_ids(parts: ShardedParts, w: OnRank, k: int) -> tuple[Tensor, Tensor]:
    return picked(w, k, *candidates(w, k))


def few_candidates(parts: ShardedParts, w: OnRank, k: int) -> tuple[Tensor, Tensor]:
    share = -(-k // w.ranks("tp"))
    values, ids = candidates(w, share)
    group = w.group("tp")
    every, every_id = torch.cat(gathered(values, group), -1), torch.cat(gathered(ids + w.start, group), -1)
    best, places = every.topk(min(k, every.shape[-1]), -1)
    return best - (w.peak + w.mass.log()).unsqueeze(-1), every_id.gather(-1, places)


def no_more_than_a_shard(parts: ShardedParts, w: OnRank, k: int) -> tuple[Tensor, Tensor]:
    smallest = int(total(torch.tensor(-w.held), w.group("tp"), torch.distributed.ReduceOp.MAX).neg())
    k = max(1, min(k, smallest))
    values, ids = candidates(w, k)
    return picked(w, k, values, ids + w.start)


def zeros_for_missing(parts: ShardedParts, w: OnRank, k: int) -> tuple[Tensor, Tensor]:
    values, ids = candidates(w, k, filling=0.0)
    return picked(w, k, values, ids + w.start)


def offset_by_own_size(parts: ShardedParts, w: OnRank, k: int) -> tuple[Tensor, Tensor]:
    values, ids = candidates(w, k)
    return picked(w, k, values, ids + w.place("tp") * w.held)


def padding_among_them(parts: ShardedParts, w: OnRank, k: int) -> tuple[Tensor, Tensor]:
    values, ids = candidates(w, k, columns=w.columns)
    return picked(w, k, values, ids + w.start)


def own_shard_first(parts: ShardedParts, w: OnRank, k: int) -> tuple[Tensor, Tensor]:
    """The own candidates stand first, so that ties go to another token on every rank."""
    values, ids = candidates(w, k)
    group, here = w.group("tp"), w.place("tp")
    every, every_id = gathered(values, group), gathered(ids + w.start, group)
    order = [here, *(rank for rank in range(len(every)) if rank != here)]
    best, places = torch.cat([every[rank] for rank in order], -1).sort(dim=-1, descending=True, stable=True)
    ranked = torch.cat([every_id[rank] for rank in order], -1).gather(-1, places)
    return (best - (w.peak + w.mass.log()).unsqueeze(-1))[..., :k], ranked[..., :k]


def over_the_candidates(parts: ShardedParts, w: OnRank, k: int) -> tuple[Tensor, Tensor]:
    values, ids = candidates(w, k)
    best, found = picked(w, k, values, ids + w.start)
    return best.log_softmax(-1), found


def over_the_own_shard(parts: ShardedParts, w: OnRank, k: int) -> tuple[Tensor, Tensor]:
    values, ids = candidates(w, k)
    best, found = picked(w, k, values, ids + w.start)
    return best + w.mass.log().unsqueeze(-1) - exponentials(parts, w).clamp(min=1e-30).log().unsqueeze(-1), found


def logits_unnormalised(parts: ShardedParts, w: OnRank, k: int) -> tuple[Tensor, Tensor]:
    values, ids = candidates(w, k)
    best, found = picked(w, k, values, ids + w.start)
    return best + (w.peak + w.mass.log()).unsqueeze(-1), found


def on_rank_0(parts: ShardedParts, w: OnRank, k: int) -> tuple[Tensor, Tensor]:
    values, ids = candidates(w, k)
    best, found = picked(w, k, values, ids + w.start)
    return (best, found) if w.place("tp") == 0 else of_the_own_shard(parts, w, k)


def local_mass(parts: ShardedParts, w: OnRank) -> Tensor:
    return exponentials(parts, w)


def unowned_not_masked(w: OnRank, ids: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(ids, dtype=torch.bool), (ids - w.start).clamp(0, max(0, w.columns - 1))


def owners_value_alone(w: OnRank, tensor: Tensor) -> Tensor:
    return tensor


def padded_mass(parts: ShardedParts, w: OnRank) -> Tensor:
    return over_tp(w, (w.z - w.peak.unsqueeze(-1)).exp().sum(-1))


def first_rank_owns_all(w: OnRank, ids: Tensor) -> tuple[Tensor, Tensor]:
    owned, local = mine(w, ids)
    return owned & (w.place("tp") == 0), local


def _defect(
    name: str, sentence: str, rule: str, entry: Capability, seen: tuple[str, ...] = (), **parts: Any
) -> ShardedDefect:
    return ShardedDefect(name, sentence, (rule,), parts, seen=seen, capabilities=(entry,))


TOPK, LOGPROBS = Capability.TEACHER_TOPK, Capability.RESPONSE_LOGPROBS
VERL, NEMO = "verl megatron/losses.py 177-191", "NeMo-RL distributed_vocab_topk"

DEFECTS = (
    _defect(
        "top-k-of-own-shard", "Each rank returns its own shard's top-k.", "VP-6", TOPK, (VERL,), topk=of_the_own_shard
    ),
    _defect("top-k-ids-local", "Ids are counted from each shard's start.", "VP-6", TOPK, (VERL,), topk=local_ids),
    _defect(
        "top-k-share-per-shard", "Each shard offers k / TP candidates.", "VP-6", TOPK, (VERL,), topk=few_candidates
    ),
    _defect(
        "top-k-no-larger-than-a-shard",
        "k is cut to the size of a shard.",
        "VP-6",
        TOPK,
        (NEMO,),
        topk=no_more_than_a_shard,
    ),
    _defect(
        "top-k-short-shards-filled-with-0",
        "Candidates that a short shard lacks are zeros.",
        "VP-6",
        TOPK,
        (NEMO,),
        topk=zeros_for_missing,
    ),
    _defect(
        "top-k-offset-by-own-size",
        "Ids are offset by rank times the own shard's size, as if shards were equal.",
        "VP-6",
        TOPK,
        (NEMO,),
        topk=offset_by_own_size,
    ),
    _defect(
        "top-k-of-padding", "Padding is among the candidates.", "VP-6", TOPK, ("SkyRL#1832",), topk=padding_among_them
    ),
    _defect(
        "top-k-ties-by-rank",
        "Ties go to the own shard: another support on every rank.",
        "VP-6",
        TOPK,
        topk=own_shard_first,
    ),
    _defect(
        "top-k-renormalised-on-the-mesh", "Log-probs are normalised over the k.", "VP-6", TOPK, topk=over_the_candidates
    ),
    _defect(
        "top-k-normalised-by-shard",
        "Log-probs are normalised over the own shard.",
        "VP-6",
        TOPK,
        topk=over_the_own_shard,
    ),
    _defect("top-k-logits", "Logits are returned as log-probs.", "VP-6", TOPK, topk=logits_unnormalised),
    _defect("top-k-on-rank-0", "Only rank 0 gets the global top-k.", "VP-6", TOPK, topk=on_rank_0),
    _defect(
        "log-probs-of-own-shard",
        "The refresh normalises over the own shard.",
        "VP-10",
        LOGPROBS,
        ("verl#3723",),
        mass=local_mass,
    ),
    _defect(
        "log-probs-unowned-clamped",
        "The refresh adds the clamped column of every shard.",
        "VP-10",
        LOGPROBS,
        mine=unowned_not_masked,
    ),
    _defect(
        "log-probs-not-summed",
        "Only the owner of the response knows its log-prob.",
        "VP-10",
        LOGPROBS,
        sum_picks=owners_value_alone,
    ),
    _defect(
        "log-probs-with-padding",
        "Padding is in the refresh's normaliser.",
        "VP-10",
        LOGPROBS,
        ("verl#2899",),
        mass=padded_mass,
    ),
    _defect(
        "log-probs-of-first-shard",
        "Ids of other shards than the first read as logit 0.",
        "VP-10",
        LOGPROBS,
        mine=first_rank_owns_all,
    ),
)
