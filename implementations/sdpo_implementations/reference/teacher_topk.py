"""The teacher's support from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 512
"""Tokens whose logits exist at a time: memory is CHUNK x V float32, whatever the length."""


@torch.no_grad()
def compute_teacher_topk(teacher_hidden: Tensor, lm_head_weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of log_softmax(hidden @ head.T), k taken as min(max(1, k), V): log-probs (float32, or
    float64 for float64) and int64 indices, each (B, T, K), largest first, without graph, normalised over the
    whole vocabulary.

    ``teacher_hidden`` (B, T, H), ``lm_head_weight`` (V, H). Raises ValueError on shapes that do not fit.
    """
    if teacher_hidden.dim() != 3 or teacher_hidden.shape[-1] != lm_head_weight.shape[-1]:
        raise ValueError(
            f"teacher_hidden (B, T, H) and lm_head_weight (V, H) do not fit: "
            f"{tuple(teacher_hidden.shape)} and {tuple(lm_head_weight.shape)}"
        )
    k = min(max(1, k), lm_head_weight.shape[0])
    hidden = teacher_hidden.flatten(0, 1)
    working = torch.promote_types(hidden.dtype, torch.float32)
    head = lm_head_weight.to(working).T
    logprobs = hidden.new_empty(len(hidden), k, dtype=working)
    indices = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    for start in range(0, len(hidden), CHUNK):
        part = slice(start, start + CHUNK)
        logits = hidden[part].to(working) @ head
        values, indices[part] = logits.topk(k, dim=-1)
        logprobs[part] = values - torch.logsumexp(logits, dim=-1, keepdim=True)
    shape = (*teacher_hidden.shape[:2], k)
    return logprobs.view(shape), indices.view(shape)
