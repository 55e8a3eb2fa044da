"""A sequence cut over cp: which group the mean is over, and what goes with which position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.claas.sharded.defects.sharded_defect import ShardedDefect
from sdpo_conformance.specs.claas.sharded.defects.sharded_parts import OnRank, gathered, metrics, total


def count_over_dp(w: OnRank) -> Tensor:
    return total(w.mask.sum(), w.group("dp")).clamp(min=1.0)


def value_over_dp(w: OnRank, own: Tensor) -> Tensor:
    return total(own, w.group("dp"))


def dp_factor(w: OnRank) -> float:
    return float(w.ranks("dp"))


def cp_squared(w: OnRank) -> float:
    return float(w.ranks("dp") * w.ranks("cp") ** 2)


def divided_by_cp(w: OnRank) -> float:
    return float(w.ranks("dp")) / w.ranks("cp")


def doubled_metrics(w: OnRank) -> dict[str, Tensor]:
    return {key: total(value, w.group("cp")) for key, value in metrics(w).items()}


def recut(w: OnRank, tensor: Tensor) -> Tensor:
    """Gathered over cp, put in the order of a load-balanced cut, and cut contiguously."""
    parts = gathered(tensor, w.group("cp"))
    halves = [torch.tensor_split(part, 2, dim=1) for part in parts]
    ordered = torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim=1)
    here = w.place("cp") * tensor.shape[1]
    return ordered[:, here : here + tensor.shape[1]]


def mask_recut(w: OnRank) -> None:
    w.mask = recut(w, w.mask)


def old_recut(w: OnRank) -> None:
    w.old = recut(w, w.old)


def base_recut(w: OnRank) -> None:
    w.base = recut(w, w.base)


def support_recut(w: OnRank) -> None:
    w.support = recut(w, w.support)


def tau_recut(w: OnRank) -> None:
    w.tau = recut(w, w.tau)


def response_recut(w: OnRank) -> None:
    w.y = recut(w, w.y)


def neighbour(w: OnRank, tensor: Tensor) -> Tensor:
    parts = gathered(tensor, w.group("cp"))
    return parts[(w.place("cp") + 1) % len(parts)]


def neighbours_mask(w: OnRank) -> None:
    w.mask = neighbour(w, w.mask)


def neighbours_old(w: OnRank) -> None:
    w.old = neighbour(w, w.old)


def last_dropped(w: OnRank) -> None:
    w.mask = w.mask.clone()
    w.mask[:, -1] = 0


def first_dropped(w: OnRank) -> None:
    w.mask = w.mask.clone()
    w.mask[:, 0] = 0


def border_dropped(w: OnRank) -> None:
    """The last position of every rank but the last predicts a token of the next rank, and is left out."""
    if w.place("cp") < w.ranks("cp") - 1:
        last_dropped(w)


def mask_shifted(w: OnRank) -> None:
    w.mask = torch.cat([w.mask[:, 1:], torch.zeros_like(w.mask[:, :1])], dim=1)


def old_shifted(w: OnRank) -> None:
    w.old = w.old.roll(1, dims=1)


def border_from_the_next_rank(w: OnRank) -> None:
    """The mask is shifted by one, across the rank's border."""
    following = neighbour(w, w.mask)[:, :1]
    w.mask = torch.cat([w.mask[:, 1:], following], dim=1)


def document_end_dropped(w: OnRank) -> None:
    """The last counted token of each row is taken for the end of a document, which predicts nothing."""
    mask = w.mask.clone()
    for row in range(mask.shape[0]):
        counted = mask[row].nonzero()
        if len(counted):
            mask[row, int(counted[-1])] = 0
    w.mask = mask


def longest(w: OnRank) -> Tensor:
    """Tokens are counted on the first cp rank and multiplied."""
    first = gathered(w.mask.sum(), w.group("cp"))[0]
    return (total(first, w.group("dp")) * w.ranks("cp")).clamp(min=1.0)


def _defect(name: str, sentence: str, violates: str, seen: tuple[str, ...] = (), **parts: Any) -> ShardedDefect:
    return ShardedDefect(name, sentence, tuple(violates.split()), parts, "cp=2", seen)


PERMUTED = ("ms-swift#8436", "verl#6268", "verl#6293")
PACKED = ("maxtext#4016", "prime-rl#3032", "nanoVLM#204")

DEFECTS = (
    _defect(
        "tokens-counted-over-dp-alone", "The count leaves cp out.", "CP-1", ("Megatron-LM#673",), count=count_over_dp
    ),
    _defect("loss-over-dp-alone", "The value leaves cp out.", "CP-1", ("SkyRL#1420",), value=value_over_dp),
    _defect("no-factor-of-cp", "The factor of cp is missing.", "CP-1", ("Megatron-LM#906",), factor=dp_factor),
    _defect(
        "factor-of-cp-twice",
        "The factor of cp enters twice.",
        "CP-1",
        ("Megatron-LM#673", "verl#6609"),
        factor=cp_squared,
    ),
    _defect(
        "divided-by-cp",
        "The loss is divided by cp instead of multiplied.",
        "CP-1",
        ("verl#6609",),
        factor=divided_by_cp,
    ),
    _defect(
        "metrics-doubled-over-cp",
        "Metrics are reduced over cp once more.",
        "DP-3",
        ("SkyRL#1420",),
        metrics=doubled_metrics,
    ),
    _defect(
        "first-cp-rank-counts-for-all",
        "The first cp rank's tokens stand for every rank's.",
        "CP-1",
        ("verl#3723",),
        count=longest,
    ),
    _defect(
        "mask-cut-otherwise",
        "The mask is cut contiguously beside a load-balanced sequence.",
        "CP-2",
        PERMUTED,
        prepare=mask_recut,
    ),
    _defect(
        "old-cut-otherwise",
        "The behaviour log-probs are cut by another permutation.",
        "CP-2",
        PERMUTED,
        prepare=old_recut,
    ),
    _defect(
        "base-cut-otherwise",
        "The base's log-probs are cut by another permutation.",
        "CP-2",
        PERMUTED,
        prepare=base_recut,
    ),
    _defect(
        "support-cut-otherwise", "The support is cut by another permutation.", "CP-2", PERMUTED, prepare=support_recut
    ),
    _defect(
        "teacher-cut-otherwise",
        "The teacher's log-probs are cut by another permutation.",
        "CP-2",
        PERMUTED,
        prepare=tau_recut,
    ),
    _defect(
        "response-cut-otherwise",
        "The response ids are cut by another permutation.",
        "CP-2",
        PERMUTED,
        prepare=response_recut,
    ),
    _defect("mask-of-the-next-rank", "The mask is the next rank's.", "CP-2", PERMUTED, prepare=neighbours_mask),
    _defect(
        "old-of-the-next-rank", "The behaviour log-probs are the next rank's.", "CP-2", PERMUTED, prepare=neighbours_old
    ),
    _defect(
        "last-position-of-a-rank-dropped",
        "The last position of each rank is left out.",
        "CP-3",
        PACKED,
        prepare=last_dropped,
    ),
    _defect(
        "first-position-of-a-rank-dropped",
        "The first position of each rank is left out.",
        "CP-3",
        PACKED,
        prepare=first_dropped,
    ),
    _defect(
        "position-before-a-border-dropped",
        "The position before a rank's border is left out.",
        "CP-3",
        PACKED,
        prepare=border_dropped,
    ),
    _defect(
        "mask-shifted-on-the-mesh", "The mask is shifted by one inside the loss.", "CP-3", PACKED, prepare=mask_shifted
    ),
    _defect(
        "mask-shifted-across-ranks",
        "The mask is shifted by one across the rank's border.",
        "CP-3",
        PACKED,
        prepare=border_from_the_next_rank,
    ),
    _defect("old-shifted", "The behaviour log-probs are shifted by one.", "CP-3", PACKED, prepare=old_shifted),
    _defect(
        "end-of-document-dropped",
        "The last token of each document is left out.",
        "CP-3",
        PACKED,
        prepare=document_end_dropped,
    ),
)
