"""What an implementation of ms-swift's loss is called with. Field names are upstream's.

Source: ms-swift 4.6.0, swift/rlhf_trainers/gkd_loss.py 22-44, 237-271 and gkd_trainer.py 104-114.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

INACTIVE = -100
"""The label of a position that does not count."""


@dataclass(unsafe_hash=True)
class MsSwiftTraining:
    """``beta`` in [0, 1] weighs the teacher; 0 is the forward, 1 the reverse KL. ``gkd_logits_topk``: how many of the
    raw teacher logits to keep, None for all. ``num_items_in_batch``: active positions of the whole batch, of which this
    call may see a part: the losses of the parts add up. None: this call is the whole batch. It is the name under which
    transformers hands that count to ``compute_loss``; upstream does not read it. A trainer may write another batch's
    values into these options."""

    beta: float = 0.5
    temperature: float = 1.0
    gkd_logits_topk: int | None = None
    num_items_in_batch: int | None = None


@dataclass
class MsSwiftLossInput:
    """Argument of ``compute_sdpo_loss`` under ``--spec ms-swift``.

    ``student_logits`` (B, S, V); ``labels`` (B, S) int64, unshifted, -100 where inactive; ``teacher_labels``
    (B, S_t) likewise. The teacher: ``teacher_logits`` (B, S_t, V_t), or ``teacher_topk_logprobs`` and
    ``teacher_topk_indices`` (B, S_t, K), in any order.
    """

    student_logits: Tensor
    labels: Tensor
    teacher_labels: Tensor
    training: MsSwiftTraining
    teacher_logits: Tensor | None = None
    teacher_topk_logprobs: Tensor | None = None
    teacher_topk_indices: Tensor | None = None
