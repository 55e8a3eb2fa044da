"""Log-probs of a response from hidden states, what the refresh computes."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 512
"""Tokens whose logits exist at a time: memory is CHUNK x V float32, whatever the length."""


@torch.no_grad()
def compute_response_logprobs(student_hidden: Tensor, lm_head_weight: Tensor, response_ids: Tensor) -> Tensor:
    """log_softmax(hidden @ head.T) at the response, (B, T) float32 (float64 for float64), without graph.

    ``student_hidden`` (B, T, H), ``lm_head_weight`` (V, H), ``response_ids`` (B, T). The one-token shift is
    the caller's: hidden[:, t] is the state that predicts response_ids[:, t]. Raises ValueError on shapes that
    do not fit.
    """
    if student_hidden.dim() != 3 or student_hidden.shape[-1] != lm_head_weight.shape[-1]:
        raise ValueError(
            f"student_hidden (B, T, H) and lm_head_weight (V, H) do not fit: "
            f"{tuple(student_hidden.shape)} and {tuple(lm_head_weight.shape)}"
        )
    if response_ids.shape != student_hidden.shape[:2]:
        raise ValueError(
            f"response_ids must be (B, T) = {tuple(student_hidden.shape[:2])}, got {tuple(response_ids.shape)}"
        )
    hidden, ids = student_hidden.flatten(0, 1), response_ids.flatten().long()
    working = torch.promote_types(hidden.dtype, torch.float32)
    head = lm_head_weight.to(working).T
    found = hidden.new_empty(len(ids), dtype=working)
    for start in range(0, len(ids), CHUNK):
        part = slice(start, start + CHUNK)
        logits = hidden[part].to(working) @ head
        chosen = logits.gather(-1, ids[part].unsqueeze(-1)).squeeze(-1)
        found[part] = chosen - torch.logsumexp(logits, dim=-1)
    return found.view(response_ids.shape)
