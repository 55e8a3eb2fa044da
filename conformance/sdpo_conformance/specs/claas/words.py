"""A case in words: what a person needs to see in a failing input."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_conformance.protocol import METRIC_KEYS, RATIO_LOG_CLAMP
from sdpo_conformance.specs.claas.loss_case import LossCase
from sdpo_conformance.specs.claas.oracle.loss import upcast
from sdpo_conformance.specs.spec import Intermediates

SHOWN_TOKENS = 3

PER_TOKEN = {
    "chosen": "log-prob of the response",
    "logsumexp": "logsumexp",
    "per_token": "divergence D",
    "ratio": "importance ratio r",
    "k3": "k3",
    "weight": "mask / n",
}


def intermediates(case: LossCase) -> Intermediates:
    """The oracle's truth about a case."""
    truth = case.truth
    returned = {name: getattr(truth, name) for name in ("loss", *METRIC_KEYS)}
    return Intermediates(
        {words: getattr(truth, name) for name, words in PER_TOKEN.items()},
        {**returned, "divergence": truth.per_token, "gradient.student_logits": truth.grad_logits},
    )


def describe(case: LossCase) -> str:
    """Shape, dtypes, config, and what is special about the first tokens."""
    loss_input, training, truth = case.loss_input, case.training, case.truth
    b, t = loss_input.response_ids.shape
    k = loss_input.teacher_indices.shape[-1]
    shape = f"B={b} T={t} V={case.vocabulary} K={k}"
    if case.fused:
        shape += f" H={case.tensors()['student_hidden'].shape[-1]}"
    config = f"alpha={training.alpha:g} is_clip={training.is_clip:g} kl_reg_weight={training.kl_reg_weight:g}"
    parts = [f"{case.name}: {shape}" if case.name else shape, config, dtypes_in_words(case)]
    if case.layout != "contiguous":
        parts.append(f"{case.layout} tensors")
    if case.trainable_head:
        parts.append("trainable head")
    if case.incoming != 1:
        parts.append(f"incoming gradient {case.incoming:g}")
    mask = upcast(loss_input.response_mask)
    if not bool((mask == 1).all()):
        parts.append(f"mask sums to {float(mask.sum()):g} over {mask.numel()} positions")
    special = [text for index in range(b * t) if (text := token_in_words(case, index // t, index % t))]
    if special:
        more = f" and {len(special) - SHOWN_TOKENS} more tokens" if len(special) > SHOWN_TOKENS else ""
        parts.append("; ".join(special[:SHOWN_TOKENS]) + more)
    if not bool(torch.isfinite(truth.loss)):
        parts.append("the truth itself is not finite")
    return ", ".join(parts)


def dtypes_in_words(case: LossCase) -> str:
    """The dtype of logits or hidden states, and those of the others where they differ."""

    def name(tensor: Tensor) -> str:
        return str(tensor.dtype).removeprefix("torch.")

    tensors = case.tensors()
    main = name(tensors["student_hidden" if case.fused else "student_logits"])
    others = {
        key: name(tensors[key])
        for key in (
            "teacher_logprobs",
            "base_logprobs",
            "old_student_logprobs",
            "response_mask",
            "response_ids",
        )
    }
    differing = [f"{key} {dtype}" for key, dtype in others.items() if dtype not in (main, "int64")]
    return main + (f" ({', '.join(differing)})" if differing else "")


def token_in_words(case: LossCase, row: int, column: int) -> str:
    """What is not ordinary about one token, or an empty string."""
    loss_input, training, truth = case.loss_input, case.training, case.truth
    at = (row, column)
    if float(upcast(loss_input.response_mask)[at]) == 0:
        return ""
    notes = []
    log_ratio = float(truth.chosen[at] - upcast(loss_input.old_student_logprobs)[at])
    if abs(log_ratio) > RATIO_LOG_CLAMP:
        notes.append(f"log-ratio {log_ratio:.3g} beyond the clamp")
    elif abs(log_ratio) > 1e-2:
        capped = " above the cap" if float(truth.ratio[at]) >= training.is_clip else ""
        notes.append(f"ratio exp({log_ratio:.3g}){capped}")
    drift = float(truth.chosen[at] - upcast(loss_input.base_logprobs)[at])
    if training.kl_reg_weight and abs(drift) > 1e-2:
        notes.append(f"drift from base {drift:.3g}")
    y = int(loss_input.response_ids[at])
    if y not in loss_input.teacher_indices[at].tolist():
        notes.append("response outside the support")
    if truth.divergence is not None and bool(truth.divergence.on_floor[at]):
        notes.append("student mass below 1e-8")
    if float(torch.logsumexp(upcast(loss_input.teacher_logprobs)[at], -1)) < -18.42:
        notes.append("teacher mass below 1e-8")
    return f"token ({row}, {column}): {', '.join(notes)}" if notes else ""
