"""The k largest of rows that exist, exactly: by the selection among stretches, or by PyTorch where k is large."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.selection import MOST_SELECTED, select_largest


def row_topk(logits: Tensor, stretch_max: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values float32, indices int64), each (N, k), in no order, of ``logits`` (N, V), given the maximum of every
    SUBTILE columns."""
    if k > min(stretch_max.shape[1], MOST_SELECTED):
        values, indices = logits.topk(k, dim=-1, sorted=False)
        return values.to(torch.float32), indices
    values = torch.empty((logits.shape[0], k), dtype=torch.float32, device=logits.device)
    indices = torch.empty((logits.shape[0], k), dtype=torch.int64, device=logits.device)
    select_largest(logits, stretch_max, k, values, indices)
    return values, indices
