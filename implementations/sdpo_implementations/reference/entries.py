"""The public functions: the plain loss of one process, or of one rank where the input lies on a mesh."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sdpo_implementations.reference import loss, response_logprobs, sharded, teacher_topk


def compute_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """``reference.loss.compute_sdpo_loss``, or ``reference.sharded``'s where ``loss_input.mesh`` is set."""
    on_mesh = getattr(loss_input, "mesh", None) is not None
    return sharded.compute_sdpo_loss(loss_input) if on_mesh else loss.compute_sdpo_loss(loss_input)


def compute_fused_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """The same from hidden states and the head."""
    on_mesh = getattr(loss_input, "mesh", None) is not None
    return sharded.compute_fused_sdpo_loss(loss_input) if on_mesh else loss.compute_fused_sdpo_loss(loss_input)


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
    """The divergence alone, (B, T); with ``mesh``, from this rank's rows of the head. Raises ValueError for alpha
    outside [0, 1)."""
    if mesh is None or not 0 <= alpha < 1:
        return loss.compute_divergence(student_hidden, lm_head_weight, teacher_logprobs, teacher_indices, alpha)
    return sharded.compute_divergence(
        student_hidden, lm_head_weight, teacher_logprobs, teacher_indices, alpha, mesh, vocab_start, vocab_size
    )


def compute_response_logprobs(
    student_hidden: Tensor,
    lm_head_weight: Tensor,
    response_ids: Tensor,
    *,
    mesh: Any = None,
    vocab_start: int = 0,
    vocab_size: int = 0,
) -> Tensor:
    """The response's log-probs, (B, T), without graph; with ``mesh``, from this rank's rows of the head."""
    if mesh is None:
        return response_logprobs.compute_response_logprobs(student_hidden, lm_head_weight, response_ids)
    return sharded.compute_response_logprobs(
        student_hidden, lm_head_weight, response_ids, mesh, vocab_start, vocab_size
    )


def compute_teacher_topk(
    teacher_hidden: Tensor,
    lm_head_weight: Tensor,
    k: int,
    *,
    mesh: Any = None,
    vocab_start: int = 0,
    vocab_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """The teacher's support, each (B, T, K); with ``mesh``, the global one from this rank's rows of the head."""
    if mesh is None:
        return teacher_topk.compute_teacher_topk(teacher_hidden, lm_head_weight, k)
    return sharded.compute_teacher_topk(teacher_hidden, lm_head_weight, k, mesh, vocab_start, vocab_size)
