"""What an implementation of TRL's loss is called with. Field names are upstream's.

Source: trl 1.16.0, trl/experimental/sdpo/sdpo_config.py 326, 376, 502-533 (options and defaults), sdpo_trainer.py
1186-1357 (what the two loss methods read).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MODES = ("sampled_token", "topk_logits", "full_logits")


@dataclass(unsafe_hash=True)
class TRLTraining:
    """Options of the loss, with TRL's defaults. ``distillation_topk`` must be set in mode topk_logits, and be at most
    V. ``distillation_is_clip`` None: no ratio, nor without ``old_per_token_logps``. A trainer may write another batch's
    values into them."""

    distillation_mode: str = "sampled_token"
    distillation_topk: int | None = None
    distillation_add_tail: bool = False
    distillation_alpha: float = 1.0
    distillation_is_clip: float | None = 2.0
    temperature: float = 1.0
    use_teacher_server: bool = False


@dataclass
class TRLLossInput:
    """Argument of ``compute_sdpo_loss`` under ``--spec trl``.

    ``student_logits`` (B, T, V) of the completion, before the temperature; ``completion_ids``, ``completion_mask``
    (B, T); ``self_distillation_mask`` (B,); ``old_per_token_logps`` (B, T), of the tempered policy. The teacher is
    local: ``teacher_logits`` (B, T, V), before the temperature; or served: ``teacher_topk_logprobs`` and
    ``teacher_topk_ids`` (B, T, K), ``teacher_actual_logprobs`` (B, T), used as they are.
    """

    student_logits: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    training: TRLTraining
    teacher_logits: Tensor | None = None
    self_distillation_mask: Tensor | None = None
    old_per_token_logps: Tensor | None = None
    teacher_topk_logprobs: Tensor | None = None
    teacher_topk_ids: Tensor | None = None
    teacher_actual_logprobs: Tensor | None = None
