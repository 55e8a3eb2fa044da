"""ms-swift's loss in float64, value and gradient.

    active at t iff labels[t + 1] != -100, the shift being a roll; active student and teacher positions are paired in
    row-major order
    x = the teacher's logits or log-probs at its support S
    log p = log_softmax(x / tau), log q = log_softmax(z[S] / tau)
    D = divergence of the two, alpha = beta (specs/shared/oracle/categories.py);  L = sum D / active positions, those of
    the whole batch where they are given
    V > V_t: the teacher gets the student's logits from V_t on, with their gradient; V < V_t: the reverse, as constants

Source: ms-swift 4.6.0, swift/rlhf_trainers/gkd_loss.py 94-271, gkd_trainer.py 104-114.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_conformance.specs.ms_swift.loss_input import INACTIVE, MsSwiftLossInput
from sdpo_conformance.specs.shared.oracle.categories import (
    Categories,
    divergence,
    log_mixture,
    slope,
    to_support,
    weighted,
)
from sdpo_conformance.specs.shared.oracle.truth import SpecTruth, upcast


@dataclass(frozen=True)
class Paired:
    """The active positions: ``where`` (N, 2) in the student's rows; ``student`` (N, C) its logits on the teacher's
    categories, ``teacher`` (N, C), ``support`` (N, C) int64; ``borrowed``: from which category on the teacher's logits
    are the student's own."""

    where: Tensor
    student: Tensor
    teacher: Tensor
    support: Tensor
    borrowed: int


def active(labels: Tensor) -> Tensor:
    """(B, S) bool: positions whose next label counts; the last position's next is the row's first."""
    return labels.roll(-1, dims=1) != INACTIVE


def paired(loss_input: MsSwiftLossInput) -> Paired:
    """Raises ValueError where student and teacher differ in the number of active labels, or no teacher is given."""
    here, there = active(loss_input.labels), active(loss_input.teacher_labels)
    if int(here.sum()) != int(there.sum()):
        raise ValueError(f"{int(here.sum())} active labels of the student, {int(there.sum())} of the teacher")
    where, z = here.nonzero(), upcast(loss_input.student_logits)[here]
    k, vocabulary = loss_input.training.gkd_logits_topk, z.shape[-1]
    if loss_input.teacher_topk_logprobs is not None:
        assert loss_input.teacher_topk_indices is not None
        x, support = upcast(loss_input.teacher_topk_logprobs)[there], loss_input.teacher_topk_indices.long()[there]
    elif loss_input.teacher_logits is not None:
        x = upcast(loss_input.teacher_logits)[there]
        if k is None:
            width = max(vocabulary, x.shape[-1])
            student = torch.cat((z, x[:, vocabulary:]), dim=-1)
            teacher = torch.cat((x, z[:, x.shape[-1] :]), dim=-1)
            return Paired(where, student, teacher, torch.arange(width).expand_as(student), x.shape[-1])
        x, support = x.topk(k, dim=-1)
    else:
        raise ValueError("neither teacher_logits nor teacher_topk_logprobs given")
    covered = ~x.isinf().all(-1)
    where, z, x, support = where[covered], z[covered], x[covered], support[covered]
    return Paired(where, z.gather(-1, support), x, support, x.shape[-1])


def position_divergence(log_q: Tensor, log_p: Tensor, beta: float, published: bool) -> Tensor:
    """D, (N,): each side's sum first, then their mix, as ms-swift rounds."""
    if beta in (0, 1):
        return divergence(log_q, log_p, beta, published)
    log_m = log_mixture(log_p, log_q, beta)
    teacher, student = (weighted(one, one - log_m, published).sum(-1) for one in (log_p, log_q))
    return beta * teacher + (1 - beta) * student


def teacher_slope(log_q: Tensor, log_p: Tensor, beta: float, published: bool) -> Tensor:
    """dD / d log p_c, (N, C), every category moving alone."""
    if beta == 0:
        return weighted(log_p, log_p - log_q + 1, published)
    if beta == 1:
        return -log_q.exp()
    return beta * weighted(log_p, log_p - log_mixture(log_p, log_q, beta), published)


def ms_swift_loss(loss_input: MsSwiftLossInput, published: bool = False) -> SpecTruth:
    """The truth on this input; limits, ``published`` and refusals as in ``lasgroup_loss``."""
    pairs, training = paired(loss_input), loss_input.training
    q, p = (Categories((one / training.temperature).log_softmax(-1)) for one in (pairs.student, pairs.teacher))
    per_position = position_divergence(q.log, p.log, training.beta, published)
    moved = to_support(q, slope(q.log, p.log, training.beta, published), renormalises=True)
    if pairs.borrowed < pairs.support.shape[-1]:
        through = to_support(p, teacher_slope(q.log, p.log, training.beta, published), renormalises=True)
        moved[:, pairs.borrowed :] += through[:, pairs.borrowed :]
    count = per_position.numel()
    whole = count if published or training.num_items_in_batch is None else training.num_items_in_batch
    share = 1 / whole if count else 0.0

    logits = loss_input.student_logits
    b, s, v = logits.shape
    grad = torch.zeros(b, s, v, dtype=torch.float64)
    own = pairs.support < v
    rows = torch.zeros(count, max(v, pairs.support.shape[-1]), dtype=torch.float64)
    rows = rows.scatter_add(-1, pairs.support, torch.where(own, moved, torch.zeros_like(moved)))[:, :v]
    grad[pairs.where[:, 0], pairs.where[:, 1]] = rows * share / training.temperature
    per_token = torch.zeros(b, s, dtype=torch.float64)
    per_token[pairs.where[:, 0], pairs.where[:, 1]] = per_position
    factor = torch.zeros(b, s, dtype=torch.float64)
    factor[pairs.where[:, 0], pairs.where[:, 1]] = share
    total = per_position.sum()
    return SpecTruth(
        loss=total / whole if count else total * 0,
        metrics={"total": total, "num_valid": torch.tensor(float(count), dtype=torch.float64)},
        per_token=per_token,
        factor=factor,
        grad_logits=grad,
        aside={"where": pairs.where, "support": pairs.support, "log_q": q.log, "log_p": p.log},
    )
