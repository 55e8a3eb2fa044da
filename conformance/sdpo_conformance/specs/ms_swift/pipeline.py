"""ms-swift's loss as stages over the N active positions. Unchanged they are right, and finite where the limit is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.ms_swift.loss_input import INACTIVE
from sdpo_conformance.specs.shared import stages
from sdpo_conformance.specs.shared.pipeline import Flow, Pipeline, Result, working_dtype


def active(labels: Tensor) -> Tensor:
    """(B, S) bool: positions whose next label counts."""
    return labels.roll(-1, dims=1) != INACTIVE


def accept(loss_input: Any, clean: bool = True, native: bool = False) -> Flow:
    """The input as the stages read it. There is nothing to blank: what is inactive is not read."""
    training, given = loss_input.training, loss_input.student_logits
    dtype = given.dtype if native else working_dtype(given.dtype)
    topk = loss_input.teacher_topk_logprobs
    teacher = topk if topk is not None else loss_input.teacher_logits
    if teacher is None:
        raise ValueError("neither teacher_logits nor teacher_topk_logprobs given")
    return Flow(
        z=given.to(dtype),
        x=teacher.detach() if native else teacher.detach().to(dtype),
        ids=None if topk is None else loss_input.teacher_topk_indices.long(),
        labels=loss_input.labels,
        teacher_labels=loss_input.teacher_labels,
        k=training.gkd_logits_topk,
        alpha=training.beta,
        temperature=training.temperature,
        items=training.num_items_in_batch,
        sampled=False,
        finish="renormalised",
    )


def here(flow: Flow) -> Tensor:
    """The student's active positions, (B, S) bool."""
    return active(flow.labels)


def there(flow: Flow) -> Tensor:
    """The teacher's, (B, S_t) bool."""
    return active(flow.teacher_labels)


def student_rows(flow: Flow) -> Tensor:
    """(N, V). Raises ValueError where the two counts differ."""
    mine, theirs = int(flow.here.sum()), int(flow.there.sum())
    if mine != theirs:
        raise ValueError(f"{mine} active labels of the student, {theirs} of the teacher")
    found: Tensor = flow.z[flow.here]
    return found


def teacher_rows(flow: Flow) -> Tensor:
    """(N, V_t) or (N, K)."""
    found: Tensor = flow.x[flow.there]
    return found


def support(flow: Flow) -> Tensor | None:
    """(N, K) token ids, or None for the whole vocabulary."""
    if flow.ids is not None:
        found: Tensor = flow.ids[flow.there]
        return found
    return None if flow.k is None else flow.teacher_rows.topk(flow.k, dim=-1).indices


def teacher_raw(flow: Flow) -> Tensor:
    """x, (N, C): the teacher's logits or log-probs over the categories."""
    if flow.support is None:
        found = torch.cat((flow.teacher_rows, flow.student_rows[:, flow.teacher_rows.shape[-1] :]), dim=-1)
        return found
    return flow.teacher_rows if flow.ids is not None else flow.teacher_rows.gather(-1, flow.support)


def student_raw(flow: Flow) -> Tensor:
    """s, (N, C): the student's logits over the categories."""
    if flow.support is None:
        return torch.cat((flow.student_rows, flow.teacher_rows[:, flow.student_rows.shape[-1] :]), dim=-1)
    found: Tensor = flow.student_rows.gather(-1, flow.support)
    return found


def covered(flow: Flow) -> Tensor:
    """(N,) bool: positions of which the teacher says something."""
    if flow.support is None:
        return torch.ones(flow.teacher_raw.shape[:1], dtype=torch.bool, device=flow.z.device)
    found: Tensor = ~flow.teacher_raw.isinf().all(-1)
    return found


def student_distribution(flow: Flow) -> Tensor:
    """log q, (N, C)."""
    found: Tensor = (flow.student_raw[flow.covered] / flow.temperature).log_softmax(-1)
    return found


def teacher_distribution(flow: Flow) -> Tensor:
    """log p, (N, C)."""
    found: Tensor = (flow.teacher_raw[flow.covered] / flow.temperature).log_softmax(-1)
    return found


def total(flow: Flow) -> Tensor:
    """The sum, 0-dim; attached to the logits also where there is nothing."""
    found: Tensor = flow.per_token.sum()
    return found


def count(flow: Flow) -> Tensor:
    """The positions that count, 0-dim."""
    return torch.tensor(float(flow.log_q.shape[0]), device=flow.z.device)


def loss(flow: Flow) -> Tensor:
    """The mean, 0-dim, by the whole batch's count where it is given; 0 where nothing counts."""
    count = flow.count.clamp(min=1.0).to(flow.total.dtype) if flow.items is None else flow.items
    found: Tensor = flow.total / count
    return found


def result(flow: Flow) -> Result:
    """The loss, its numerator and its denominator."""
    return {"loss": flow.loss, "total": flow.total.detach(), "num_valid": flow.count}


PIPELINE = Pipeline(
    accept,
    {
        "here": here,
        "there": there,
        "student_rows": student_rows,
        "teacher_rows": teacher_rows,
        "support": support,
        "teacher_raw": teacher_raw,
        "student_raw": student_raw,
        "covered": covered,
        "log_q": student_distribution,
        "log_p": teacher_distribution,
        "log_m": stages.mixture,
        "per_token": stages.divergence,
        "total": total,
        "count": count,
        "loss": loss,
    },
    result,
)
