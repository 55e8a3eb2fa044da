"""ms-swift: ``gkd_loss`` of its GKD and OPSD trainers, fed as ``GKDTrainer._compute_jsd_loss`` feeds it.

For ``--spec ms-swift`` alone: labels rolled by one on both sides, the local top-k taken of raw logits, the mean over
the positions that count. Source: ms-swift 4.6.0, swift/rlhf_trainers/gkd_loss.py and gkd_trainer.py 104-114.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.adapters.availability import require

_INSTALL = "pip install ms-swift==4.6.0"
_gkd_loss = require("swift.rlhf_trainers.gkd_loss", "gkd_loss", _INSTALL)
_TeacherOutput = require("swift.rlhf_trainers.gkd_loss", "TeacherOutput", _INSTALL)


def compute_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """``loss``, and ``total`` and ``num_valid`` of which it is the quotient."""
    training = loss_input.training
    teacher = _TeacherOutput(
        full_logits=loss_input.teacher_logits,
        topk_logprobs=loss_input.teacher_topk_logprobs,
        topk_indices=loss_input.teacher_topk_indices,
        labels=torch.roll(loss_input.teacher_labels, shifts=-1, dims=1),
    )
    if training.gkd_logits_topk is not None:
        teacher = teacher.to_topk(training.gkd_logits_topk)
    labels = torch.roll(loss_input.labels, shifts=-1, dims=1)
    total, count = _gkd_loss(loss_input.student_logits, teacher, labels, training.beta, training.temperature)
    loss = total * 0 if count == 0 else total / count
    return {"loss": loss, "total": total.detach(), "num_valid": count}
