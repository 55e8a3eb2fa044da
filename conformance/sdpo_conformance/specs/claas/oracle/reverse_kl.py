"""Reverse-KL surrogate (alpha >= 1).

    D = sg(l[y] - tau_y) * l[y],   tau_y = tau at y if y is in S, else -20

Source: claas/training/sdpo_loss.py, compute_sdpo_loss, step 2 (alpha >= 1) and _lookup_token_in_topk,
kfallah/CLaaS at e2331f7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_conformance.protocol import RKL_FLOOR_LOGPROB


def teacher_logprob_of_response(teacher_logprobs: Tensor, teacher_indices: Tensor, response_ids: Tensor) -> Tensor:
    """tau_y (B, T): membership decides, not the value found."""
    match = teacher_indices == response_ids.unsqueeze(-1)
    found = torch.where(match, teacher_logprobs, torch.zeros_like(teacher_logprobs)).sum(-1)
    return torch.where(match.any(-1), found, torch.full_like(found, RKL_FLOOR_LOGPROB))


def reverse_kl_weight(student_chosen: Tensor, teacher_chosen: Tensor) -> Tensor:
    """sg(l[y] - tau_y): the factor on l[y], and so the derivative of D with respect to l[y]."""
    return student_chosen - teacher_chosen
