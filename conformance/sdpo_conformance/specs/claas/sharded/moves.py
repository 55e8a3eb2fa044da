"""Putting support and response where a rule wants them: on this shard or that, at its first or last id."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_conformance.protocol import SDPOLossInput
from sdpo_conformance.specs.claas.sharded.cut import ShardedCase


def owned(case: ShardedCase, place: int) -> range:
    """The ids that tp rank ``place`` owns, padding left out."""
    cut = case.laid
    stop = min(cut.starts[place] + cut.stretches[place], case.vocabulary)
    return range(min(cut.starts[place], stop), stop)


def with_ids(case: ShardedCase, support: Tensor, response: Tensor) -> ShardedCase:
    """The case with other support and response ids, the ratio and the drift of every token kept as they were."""
    fields = case.loss_input
    chosen = case.truth.chosen
    moved = case.with_fields(
        teacher_indices=support.to(fields.teacher_indices.dtype), response_ids=response.to(fields.response_ids.dtype)
    )
    step = moved.truth.chosen - chosen
    final = moved.with_fields(
        old_student_logprobs=(fields.old_student_logprobs.double() + step).to(fields.old_student_logprobs.dtype),
        base_logprobs=(fields.base_logprobs.double() + step).to(fields.base_logprobs.dtype),
    )
    return final


def support_on_one_shard(case: ShardedCase) -> ShardedCase | None:
    """Each token's support lies on one shard, in turn, and its response on the next; None where a shard is too
    small to hold a support."""
    tp, k = case.laid.mesh.size("tp"), case.loss_input.teacher_indices.shape[-1]
    homes = [list(owned(case, place)) for place in range(tp)]
    if any(len(home) < k for home in homes):
        return None
    b, t = case.loss_input.response_ids.shape
    generator = torch.Generator().manual_seed(b * 31 + t)
    support, response = torch.empty(b, t, k, dtype=torch.int64), torch.empty(b, t, dtype=torch.int64)
    for token in range(b * t):
        home, away = torch.tensor(homes[token % tp]), torch.tensor(homes[(token + 1) % tp])
        support[token // t, token % t] = home[torch.randperm(len(home), generator=generator)[:k]]
        response[token // t, token % t] = away[torch.randint(len(away), (1,), generator=generator)]
    return with_ids(case, support, response)


def ids_at_edges(case: ShardedCase) -> ShardedCase:
    """Responses at the first and last id of each shard in turn, and the support with such ids in it."""
    tp = case.laid.mesh.size("tp")
    edges = [id for place in range(tp) if owned(case, place) for id in (owned(case, place)[0], owned(case, place)[-1])]
    b, t, k = case.loss_input.teacher_indices.shape
    support = case.loss_input.teacher_indices.long().clone()
    response = torch.empty(b, t, dtype=torch.int64)
    for token in range(b * t):
        at = (token // t, token % t)
        response[at] = edges[token % len(edges)]
        rest = [id for id in support[at].tolist() if id not in edges]
        wanted = list(dict.fromkeys(edges[(token + shift) % len(edges)] for shift in range(len(edges))))
        support[at] = torch.tensor((wanted + rest + [i for i in range(case.vocabulary) if i not in wanted + rest])[:k])
    return with_ids(case, support, response)


def one_shard_far_below(case: ShardedCase, place: int, distance: float) -> ShardedCase | None:
    """The logits of one shard lowered so far that its own maximum is of no use to the others, the rest left. Through
    hidden states: one column more, 1 in each of them and -distance in the shard's rows of the head."""
    loss_input = case.loss_input
    if not len(owned(case, place)):
        return None
    rows = slice(owned(case, place)[0], owned(case, place)[-1] + 1)
    if isinstance(loss_input, SDPOLossInput):
        logits = loss_input.student_logits.clone()
        logits[..., rows] -= distance
        moved = case.with_fields(student_logits=logits)
    else:
        hidden, head = loss_input.student_hidden, loss_input.lm_head_weight
        column = torch.zeros_like(head[:, :1])
        column[rows] = -distance
        moved = case.with_fields(
            student_hidden=torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1),
            lm_head_weight=torch.cat([head, column], -1),
        )
    step = moved.truth.chosen - case.truth.chosen
    old, base = loss_input.old_student_logprobs, loss_input.base_logprobs
    return moved.with_fields(
        old_student_logprobs=(old.double() + step).to(old.dtype), base_logprobs=(base.double() + step).to(base.dtype)
    )
