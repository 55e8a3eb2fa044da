"""verl: ``compute_forward_kl_topk`` of its distillation trainer, in the supervised form.

For ``--spec verl-topk`` alone: one packed sequence of all positions, then what ``losses.py`` does with it: the floor at
0, the cap, ``agg_loss`` by the whole batch's counts. Source: verl 0.9.1, verl/trainer/distillation/fsdp/losses.py,
losses.py 230-365, verl/trainer/ppo/core_algos.py agg_loss.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.adapters.availability import require

_INSTALL = "pip install verl==0.9.1"
_forward_kl = require("verl.trainer.distillation.fsdp.losses", "compute_forward_kl_topk", _INSTALL)
_agg_loss = require("verl.trainer.ppo.core_algos", "agg_loss", _INSTALL)


def compute_sdpo_loss(loss_input: Any) -> dict[str, Tensor]:
    """``loss``, the range of D before the cap and the masses before the clamp. Raises where nothing counts, as verl."""
    training, mask = loss_input.training, loss_input.response_mask
    b, t, v = loss_input.student_logits.shape
    logits = (loss_input.student_logits / max(training.temperature, 1e-8)).reshape(1, b * t, v)

    def packed(tensor: Tensor) -> Tensor:
        return torch.nested.nested_tensor([tensor.reshape(b * t, -1)], layout=torch.jagged)

    found = _forward_kl(
        student_logits=logits,
        teacher_topk_log_probs=packed(loss_input.teacher_logprobs),
        teacher_topk_ids=packed(loss_input.teacher_ids),
        config=SimpleNamespace(distillation_loss=training),
        data_format="thd",
    )
    losses, student_mass, teacher_mass = (
        found[key].reshape(b, t) for key in ("distillation_losses", "student_mass", "teacher_mass")
    )
    losses, counted = losses.clamp_min(0.0), mask.bool()
    measured = {
        "loss_min": losses[counted].min().detach(),
        "loss_max": losses[counted].max().detach(),
        "student_mass": student_mass[counted].mean().detach(),
        "teacher_mass": teacher_mass[counted].mean().detach(),
    }
    if training.loss_max_clamp is not None:
        losses = losses.clamp(min=-training.loss_max_clamp, max=training.loss_max_clamp)
    loss = _agg_loss(
        loss_mat=losses,
        loss_mask=mask,
        loss_agg_mode=training.loss_agg_mode,
        dp_size=training.dp_size,
        batch_num_tokens=training.batch_num_tokens,
        global_batch_size=training.global_batch_size,
        loss_scale_factor=training.loss_scale_factor,
    )
    return {"loss": loss, **measured}
