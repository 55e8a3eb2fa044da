"""Clipped importance ratio of the current policy to the behaviour policy.

    r = min(exp(clamp(sg(l[y] - old), -20, 20)), is_clip)

Capped above only. Multiplies D per token, never the anchor.
Source: claas/training/sdpo_loss.py, compute_sdpo_loss, step 3, kfallah/CLaaS at e2331f7.
"""

from __future__ import annotations

from torch import Tensor

from sdpo_conformance.protocol import RATIO_LOG_CLAMP


def importance_ratio(student_chosen: Tensor, old_student_logprobs: Tensor, is_clip: float) -> Tensor:
    """r (B, T). ``old_student_logprobs`` may be infinite."""
    log_ratio = (student_chosen - old_student_logprobs).clamp(-RATIO_LOG_CLAMP, RATIO_LOG_CLAMP)
    return log_ratio.exp().clamp(max=is_clip)
