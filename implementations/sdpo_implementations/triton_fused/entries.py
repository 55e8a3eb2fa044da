"""The public functions: check, flatten, call the kernels, restore (B, T)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.triton_fused import sharded
from sdpo_implementations.triton_fused.autograd import (
    FusedDivergence,
    FusedLoss,
    LogitsLoss,
    empty_result,
    result,
    vocabulary_logits,
)
from sdpo_implementations.triton_fused.inputs import (
    Tokens,
    check_features,
    check_head,
    check_logprobs,
    check_response_ids,
    check_support,
    check_teacher_logprobs,
    flat,
    flat_head,
    read_tokens,
)
from sdpo_implementations.triton_fused.kernels.logsumexp import hidden_logsumexp
from sdpo_implementations.triton_fused.kernels.teacher_topk import hidden_topk
from sdpo_implementations.triton_fused.kernels.token_logits import chosen_token_logits
from sdpo_implementations.triton_fused.runtime import on_device


def compute_fused_sdpo_loss(loss_input: Any) -> Mapping[str, Tensor]:
    """The CLaaS SDPO loss from hidden states, without logits of the whole batch at any time.

    ``loss_input`` carries ``student_hidden`` (B, T, H) and ``lm_head_weight`` (V, H) in one dtype (float32,
    bfloat16 or float16); ``teacher_logprobs`` and ``teacher_indices`` (B, T, K); ``base_logprobs``,
    ``old_student_logprobs``, ``response_mask`` and ``response_ids`` (B, T); ``training`` with ``alpha``,
    ``is_clip`` and ``kl_reg_weight``. Log-probs in nats, any floating dtype.

    Returns ``loss`` (0-dim float32, differentiable with respect to the hidden states, and to the head where
    it requires a gradient) and ``distill_loss``, ``kl_reg``, ``mean_is_ratio``, ``clip_fraction`` (0-dim
    float32 tensors without graph: reading one is what waits for the device). Raises ValueError.
    """
    if getattr(loss_input, "mesh", None) is not None:
        return sharded.compute_fused_sdpo_loss(loss_input)
    hidden, head = loss_input.student_hidden, loss_input.lm_head_weight
    check_features("student_hidden", hidden)
    check_head(head, "student_hidden", hidden)
    head = flat_head(head)
    tokens = read_tokens(loss_input, hidden, head.shape[0])
    if tokens.mask.numel() == 0:
        check_logprobs(loss_input)
        return empty_result(hidden)
    differentiated = torch.is_grad_enabled() and hidden.requires_grad
    dense = differentiated and (tokens.alpha >= 1 or tokens.kl_reg_weight != 0)
    # Autograd's own entrance and the other checks take place while the GPU has work.
    product = vocabulary_logits(hidden, head, tokens, dense)
    check_logprobs(loss_input)
    return result(*FusedLoss.apply(hidden, head, tokens, product))


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Tensor]:
    """The same from ``student_logits`` (B, T, V): CLaaS's own entry, field for field."""
    if getattr(loss_input, "mesh", None) is not None:
        return sharded.compute_sdpo_loss(loss_input)
    logits = loss_input.student_logits
    check_features("student_logits", logits)
    tokens = read_tokens(loss_input, logits, logits.shape[-1])
    check_logprobs(loss_input)
    if tokens.mask.numel() == 0:
        return empty_result(logits)
    return result(*LogitsLoss.apply(flat(logits), tokens))


def compute_divergence(
    student_hidden: Tensor,
    lm_head_weight: Tensor,
    teacher_logprobs: Tensor,
    teacher_indices: Tensor,
    alpha: float,
    *,
    mesh: Any = None,
    vocab_start: int = 0,
    vocab_size: int = 0,
) -> Tensor:
    """The generalised Jensen-Shannon divergence alone, (B, T) float32, differentiable. 0 <= alpha < 1.

    Without the importance ratio this is not SDPO: the caller owes it, and the refresh of the behaviour
    log-probs between steps. Raises ValueError, also for alpha >= 1, which needs the response tokens.
    With ``mesh``, from this rank's rows of the head.
    """
    if mesh is not None:
        return sharded.compute_divergence(
            student_hidden, lm_head_weight, teacher_logprobs, teacher_indices, alpha, mesh, vocab_start, vocab_size
        )
    check_features("student_hidden", student_hidden)
    check_head(lm_head_weight, "student_hidden", student_hidden)
    check_support(teacher_indices, student_hidden, lm_head_weight.shape[0], None)
    check_teacher_logprobs(teacher_logprobs, teacher_indices)
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be in [0, 1) for the divergence alone, got {alpha}")
    shape = student_hidden.shape[:2]
    support = flat(teacher_indices).contiguous()
    everywhere = torch.ones(support.shape[0], dtype=torch.float32, device=support.device)
    tokens = Tokens(
        teacher_logprobs=teacher_logprobs,
        support=support,
        response_ids=support[:, 0].contiguous(),
        old_student_logprobs=everywhere,
        base_logprobs=everywhere,
        mask=everywhere,
        alpha=float(alpha),
        is_clip=1.0,
        kl_reg_weight=0.0,
    )
    if everywhere.numel() == 0:
        return student_hidden.float().sum(-1) * 0.0
    divergence: Tensor = FusedDivergence.apply(student_hidden, flat_head(lm_head_weight), tokens)
    return divergence.view(shape)


@torch.no_grad()
def compute_response_logprobs(
    student_hidden: Tensor,
    lm_head_weight: Tensor,
    response_ids: Tensor,
    *,
    mesh: Any = None,
    vocab_start: int = 0,
    vocab_size: int = 0,
) -> Tensor:
    """log_softmax(hidden @ head.T) at the response tokens, (B, T) float32, without graph.

    Position t of ``student_hidden`` (B, T, H) predicts ``response_ids`` (B, T) at t: slicing the model's
    output to start-1 .. -2 is the caller's part. Raises ValueError. With ``mesh``, from this rank's rows of the head.
    """
    if mesh is not None:
        return sharded.compute_response_logprobs(
            student_hidden, lm_head_weight, response_ids, mesh, vocab_start, vocab_size
        )
    check_features("student_hidden", student_hidden)
    check_head(lm_head_weight, "student_hidden", student_hidden)
    check_response_ids(response_ids, student_hidden, lm_head_weight.shape[0], None)
    hidden, head, ids = flat(student_hidden), flat_head(lm_head_weight), flat(response_ids)
    if ids.numel() == 0:
        return torch.zeros(response_ids.shape, dtype=torch.float32, device=ids.device)
    with on_device(hidden):
        row_max, log_sum = hidden_logsumexp(hidden, head, None)
        chosen = chosen_token_logits(hidden, head, ids, None)
    return ((chosen - row_max) - log_sum).view(response_ids.shape)


@torch.no_grad()
def compute_teacher_topk(
    teacher_hidden: Tensor,
    lm_head_weight: Tensor,
    k: int,
    *,
    mesh: Any = None,
    vocab_start: int = 0,
    vocab_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """The teacher's support: the k largest log-probs of log_softmax(hidden @ head.T), largest first.

    Returns (log-probs float32, indices int64), each (B, T, min(max(1, k), V)), normalised over the whole
    vocabulary, without graph. Raises ValueError. With ``mesh``, from this rank's rows of the head.
    """
    if mesh is not None:
        return sharded.compute_teacher_topk(teacher_hidden, lm_head_weight, k, mesh, vocab_start, vocab_size)
    check_features("teacher_hidden", teacher_hidden)
    check_head(lm_head_weight, "teacher_hidden", teacher_hidden)
    k = min(max(1, int(k)), lm_head_weight.shape[0])
    hidden, head = flat(teacher_hidden), flat_head(lm_head_weight)
    shape = (*teacher_hidden.shape[:2], k)
    if hidden.shape[0] == 0:
        empty = torch.zeros(shape, dtype=torch.float32, device=hidden.device)
        return empty, empty.to(torch.int64)
    with on_device(hidden):
        logprobs, indices = hidden_topk(hidden, head, k)
    return logprobs.view(shape), indices.view(shape)
