"""Anchor to the base policy: Schulman's k3 estimator.

    d = clamp(l[y] - base, -20, 20);   k3 = exp(d) - 1 - d

Source: claas/training/sdpo_loss.py, compute_sdpo_loss, step 4, kfallah/CLaaS at e2331f7. veRL's
kl_penalty takes base - l[y] and clamps k3 to [-10, 10]: other numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_conformance.protocol import RATIO_LOG_CLAMP


def k3(student_chosen: Tensor, base_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """k3 and its derivative with respect to l[y], both (B, T); the derivative is 0 outside the clamp."""
    difference = student_chosen - base_logprobs
    clamped = difference.clamp(-RATIO_LOG_CLAMP, RATIO_LOG_CLAMP)
    inside = difference.abs() <= RATIO_LOG_CLAMP
    return torch.expm1(clamped) - clamped, torch.where(inside, torch.expm1(clamped), torch.zeros_like(clamped))
