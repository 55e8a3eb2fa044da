"""What an implementation of lasgroup's loss is called with. Field names are upstream's.

Source: lasgroup/SDPO at 0e6d510, verl/trainer/ppo/core_algos.py 1082-1095 (arguments), verl/trainer/config/actor/
actor.yaml 85-128 and verl/trainer/config/sdpo.yaml (defaults), verl/trainer/ppo/rollout_corr_helper.py 481-487.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@dataclass(unsafe_hash=True)
class LasgroupTraining:
    """Options of the loss, with the defaults of ``sdpo.yaml``; a trainer may write another batch's into them.

    ``distillation_topk`` None: the whole vocabulary, no tail, no renormalisation. ``is_clip`` None: no ratio.
    ``rollout_is`` ("token", "sequence" or None) and the two after it say how rollout weights are computed from
    ``rollout_log_probs``. ``batch_num_tokens`` (tokens that count, at least 1) and ``global_batch_size`` (rows that
    have one) name the whole batch, of which this call may see a part: the losses of the parts add up. None: this call
    is the whole batch. They are ``agg_loss``'s names; upstream's loss does not hand them on.
    """

    full_logit_distillation: bool = True
    distillation_topk: int | None = 100
    distillation_add_tail: bool = True
    alpha: float = 0.5
    is_clip: float | None = 2.0
    temperature: float = 1.0
    loss_agg_mode: str = "token-mean"
    rollout_is: str | None = None
    rollout_is_threshold: float = 2.0
    rollout_is_batch_normalize: bool = False
    batch_num_tokens: float | None = None
    global_batch_size: int | None = None


@dataclass
class LasgroupLossInput:
    """Argument of ``compute_sdpo_loss`` under ``--spec lasgroup``.

    ``student_logits`` and ``teacher_logits`` (B, T, V) of the response positions, before the temperature;
    ``response_ids``, ``response_mask``, ``old_log_probs`` (B, T); ``self_distillation_mask`` (B,), 1 for a row that
    has a teacher; ``rollout_is_weights`` (B, T), given, or ``rollout_log_probs`` (B, T), from which they are to be
    computed, never both. Log-probs in nats, of the tempered policies.
    """

    student_logits: Tensor
    teacher_logits: Tensor
    response_ids: Tensor
    response_mask: Tensor
    training: LasgroupTraining
    old_log_probs: Tensor | None = None
    self_distillation_mask: Tensor | None = None
    rollout_is_weights: Tensor | None = None
    rollout_log_probs: Tensor | None = None
