"""What an implementation of verl's ``forward_kl_topk`` is called with. Field names are upstream's.

Source: verl 0.9.1, verl/workers/config/distillation.py (options and defaults), verl/trainer/distillation/losses.py
230-275, verl/trainer/ppo/core_algos.py agg_loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@dataclass(unsafe_hash=True)
class VerlTopKTraining:
    """``log_prob_min_clamp`` and ``loss_max_clamp`` None: not applied. The last four name the whole batch, of which
    this call may see a part: tokens that count, sequences, data-parallel ranks, and the divisor of
    seq-mean-token-sum-norm (None: T). A trainer may write another batch's values into these options."""

    log_prob_min_clamp: float | None = -10.0
    loss_max_clamp: float | None = 10.0
    temperature: float = 1.0
    loss_agg_mode: str = "token-mean"
    dp_size: int = 1
    batch_num_tokens: float = 1.0
    global_batch_size: int = 1
    loss_scale_factor: float | None = None
    use_chunked_topk: bool = False
    chunked_topk_chunk_size: int = 4096


@dataclass
class VerlTopKLossInput:
    """Argument of ``compute_sdpo_loss`` under ``--spec verl-topk``.

    ``student_logits`` (B, T, V) of the response positions, before the temperature; ``teacher_logprobs`` and
    ``teacher_ids`` (B, T, K), at temperature 1; ``response_mask`` (B, T); ``response_lengths`` (B,): positions beyond
    are padding.
    """

    student_logits: Tensor
    teacher_logprobs: Tensor
    teacher_ids: Tensor
    response_mask: Tensor
    training: VerlTopKTraining
    response_lengths: Tensor | None = None
