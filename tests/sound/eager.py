"""Probabilities and their logarithms in whatever dtype promotion gives: the data flow of upstream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

SDPO_CLAIMS = {
    "expected_failures": {
        "NUM-3": "log of a probability that underflowed",
        "NUM-4": "log of a probability that is 0",
        "NUM-5": "NaN times a mask of 0 is NaN",
    }
}


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    training = loss_input.training
    if hasattr(loss_input, "student_hidden"):
        logits = loss_input.student_hidden @ loss_input.lm_head_weight.T
    else:
        logits = loss_input.student_logits
    mask, tau = loss_input.response_mask, loss_input.teacher_logprobs
    support, y = loss_input.teacher_indices.long(), loss_input.response_ids.long()
    logprobs = F.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    if training.alpha < 1:
        alpha = torch.tensor(training.alpha, dtype=logprobs.dtype, device=logprobs.device)
        p, q = tau.exp(), logprobs.gather(-1, support).exp()
        p = p / p.sum(-1, keepdim=True).clamp(min=1e-8)
        q = q / q.sum(-1, keepdim=True).clamp(min=1e-8)
        log_m = torch.logaddexp(p.log() + alpha.log(), q.log() + (1 - alpha).log())
        divergence = alpha * (p * (p.log() - log_m)).sum(-1) + (1 - alpha) * (q * (q.log() - log_m)).sum(-1)
    else:
        match = support == y.unsqueeze(-1)
        tau_y = torch.where(match.any(-1), torch.where(match, tau, torch.zeros_like(tau)).sum(-1), -20.0)
        divergence = (chosen - tau_y).detach() * chosen
    ratio = (chosen - loss_input.old_student_logprobs).detach().clamp(-20, 20).exp().clamp(max=training.is_clip)
    drift = (chosen - loss_input.base_logprobs).clamp(-20, 20)
    n = mask.sum().clamp(min=1)
    distill_loss = (divergence * ratio * mask).sum() / n
    kl_reg = ((drift.exp() - 1 - drift) * mask).sum() / n
    return {
        "loss": distill_loss + training.kl_reg_weight * kl_reg,
        "distill_loss": distill_loss.item(),
        "kl_reg": kl_reg.item(),
        "mean_is_ratio": ((ratio * mask).sum() / n).item(),
        "clip_fraction": (((ratio >= training.is_clip).float() * mask).sum() / n).item(),
    }


compute_fused_sdpo_loss = compute_sdpo_loss
