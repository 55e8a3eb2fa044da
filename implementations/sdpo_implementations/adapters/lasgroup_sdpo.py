"""lasgroup/SDPO: ``compute_self_distillation_loss`` of its verl tree, fed as its actor feeds it.

Given lasgroup's input (``--spec lasgroup``) it is what upstream computes: temperature and support as in
``verl/workers/actor/dp_actor.py`` 521-534, rollout weights by ``compute_rollout_correction_weights``.

Given CLaaS's input it is a loss of its own convention: the support is the student's top-k (as many tokens as the
teacher's top-k here) plus a tail bucket, alpha 0 and 1 are the full forward and reverse KL, there is no anchor to the
base policy. It reports no ``kl_reg``, ``mean_is_ratio`` or ``clip_fraction``. The teacher outside its own top-k is
completed by ``complete_teacher``. Sources: ``verl/trainer/ppo/core_algos.py``, ``verl/workers/actor/dp_actor.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from sdpo_implementations.adapters.availability import require
from sdpo_implementations.adapters.teacher import as_module, complete_teacher

_INSTALL = "pip install git+https://github.com/lasgroup/SDPO@0e6d510"
_self_distillation_loss = require("verl.trainer.ppo.core_algos", "compute_self_distillation_loss", _INSTALL)
_rollout_weights = require("verl.trainer.ppo.rollout_corr_helper", "compute_rollout_correction_weights", _INSTALL)


def update_teacher(teacher: dict[str, Tensor], student: Mapping[str, Tensor], teacher_update_rate: float) -> None:
    """``DataParallelPPOActor._update_teacher`` on two modules that hold these parameters, in place. Its module is
    imported when it is called: the loss alone needs less of verl."""
    actor = require("verl.workers.actor.dp_actor", "DataParallelPPOActor", _INSTALL)
    names = list(teacher)
    modules = [as_module({name: one[name] for name in names}) for one in (teacher, student)]
    options = SimpleNamespace(teacher_regularization="ema", teacher_update_rate=teacher_update_rate)
    actor._update_teacher(
        SimpleNamespace(
            config=SimpleNamespace(self_distillation=options, policy_loss={"loss_mode": "sdpo"}),
            teacher_module=modules[0],
            actor_module=modules[1],
        )
    )
    teacher.update({name: value.detach() for name, value in zip(names, modules[0], strict=True)})


def compute_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """lasgroup's loss on its own input, or on CLaaS's."""
    return _on_own_input(loss_input) if hasattr(loss_input, "teacher_logits") else _on_claas_input(loss_input)


def _on_own_input(loss_input: Any) -> dict[str, Tensor]:
    """As ``dp_actor.py`` does it: both sides divided by the temperature, the support the student's top-k."""
    training = loss_input.training
    logits, teacher = (one / training.temperature for one in (loss_input.student_logits, loss_input.teacher_logits))
    chosen = loss_input.response_ids.unsqueeze(-1)
    student_log_probs, teacher_log_probs = (
        one.log_softmax(-1).gather(-1, chosen).squeeze(-1) for one in (logits, teacher)
    )
    at_support: dict[str, Tensor] = {}
    if training.full_logit_distillation and training.distillation_topk is None:
        at_support["student_all_log_probs"] = logits.log_softmax(-1)
        at_support["teacher_all_log_probs"] = teacher.log_softmax(-1)
    elif training.full_logit_distillation:
        top, ids = logits.topk(min(training.distillation_topk, logits.shape[-1]), dim=-1)
        at_support["student_topk_log_probs"] = top - logits.logsumexp(-1, keepdim=True)
        at_support["teacher_topk_log_probs"] = teacher.gather(-1, ids) - teacher.logsumexp(-1, keepdim=True)
    weights = loss_input.rollout_is_weights
    if loss_input.rollout_log_probs is not None:
        weights, _ = _rollout_weights(
            loss_input.old_log_probs - loss_input.rollout_log_probs,
            loss_input.response_mask,
            training.rollout_is,
            training.rollout_is_threshold,
            training.rollout_is_batch_normalize,
        )
    loss, _ = _self_distillation_loss(
        student_log_probs=student_log_probs,
        teacher_log_probs=teacher_log_probs,
        response_mask=loss_input.response_mask,
        self_distillation_config=training,
        old_log_probs=loss_input.old_log_probs,
        self_distillation_mask=loss_input.self_distillation_mask,
        loss_agg_mode=training.loss_agg_mode,
        rollout_is_weights=weights,
        **at_support,
    )
    return {"loss": loss}


def _on_claas_input(loss_input: Any) -> dict[str, Tensor]:
    """The loss with the options of ``verl/trainer/config/actor/actor.yaml``: top-k logits, tail bucket, token
    mean; alpha and is_clip from the input."""
    logits, training = loss_input.student_logits, loss_input.training
    k = loss_input.teacher_indices.shape[-1]
    teacher = complete_teacher(loss_input.teacher_logprobs, loss_input.teacher_indices, logits.shape[-1])
    top_logits, top_indices = logits.topk(k, dim=-1)
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    chosen = loss_input.response_ids.long().unsqueeze(-1)
    loss, _ = _self_distillation_loss(
        student_log_probs=(logits.gather(-1, chosen) - normaliser).squeeze(-1),
        teacher_log_probs=teacher.gather(-1, chosen).squeeze(-1),
        response_mask=loss_input.response_mask,
        self_distillation_config=SimpleNamespace(
            full_logit_distillation=True,
            distillation_topk=k,
            distillation_add_tail=True,
            alpha=training.alpha,
            is_clip=training.is_clip,
        ),
        old_log_probs=loss_input.old_student_logprobs,
        student_topk_log_probs=top_logits - normaliser,
        teacher_topk_log_probs=teacher.gather(-1, top_indices),
    )
    return {"loss": loss, "distill_loss": loss.detach()}
