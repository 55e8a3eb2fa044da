"""lasgroup/SDPO: ``compute_self_distillation_loss`` of its verl tree, fed as its actor feeds it.

Its convention, not CLaaS's: the support is the student's top-k (as many tokens as the teacher's top-k here)
plus a tail bucket, alpha 0 and 1 are the full forward and reverse KL, there is no anchor to the base policy.
It reports no ``kl_reg``, ``mean_is_ratio`` or ``clip_fraction``. The teacher outside its own top-k is
completed by ``complete_teacher``. Sources: ``verl/trainer/ppo/core_algos.py``,
``verl/workers/actor/dp_actor.py``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from sdpo_implementations.adapters.availability import require
from sdpo_implementations.adapters.teacher import complete_teacher

_self_distillation_loss = require(
    "verl.trainer.ppo.core_algos",
    "compute_self_distillation_loss",
    "pip install git+https://github.com/lasgroup/SDPO@0e6d510",
)


def compute_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
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
