"""The K largest logits of each row and their log-probs, from float32 logits of some rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.expected_row import rows_per_buffer
from sdpo_implementations.triton_fused.kernels.logsumexp import combine
from sdpo_implementations.triton_fused.kernels.selection import MOST_SELECTED, select_largest
from sdpo_implementations.triton_fused.kernels.vocabulary_product import (
    SUBTILE,
    Logits,
    buffer_columns,
    tile_logits,
    tiling,
)
from sdpo_implementations.triton_fused.runtime import some_rows


def hidden_topk(hidden: Tensor, head: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(log-probs float32, indices int64), each (N, k), largest first, of log_softmax(hidden @ head.T)."""
    n_rows, width = hidden.shape
    vocabulary = head.shape[0]
    device = hidden.device
    tiles = tiling(n_rows, vocabulary, width, hidden.dtype, device)
    padded = buffer_columns(vocabulary, tiles)
    block = rows_per_buffer(n_rows, padded, 4)
    stretches = padded // SUBTILE
    buffer = torch.empty((block, padded), dtype=torch.float32, device=device)
    maxima = torch.empty((block, stretches), dtype=torch.float32, device=device)
    found: list[Tensor] = []
    for start in range(0, n_rows, block):
        rows = slice(start, min(start + block, n_rows))
        held = slice(0, rows.stop - start)
        logits, parts = some_rows(buffer, held), some_rows(maxima, held)
        statistics = tile_logits(some_rows(hidden, rows), head, tiles, Logits(logits, parts))
        if not found:
            # Allocated while the first product runs: before it the GPU would wait.
            found = [torch.empty(n_rows, dtype=torch.float32, device=device) for _ in range(2)]
            values = torch.empty((n_rows, k), dtype=torch.float32, device=device)
            indices = torch.empty((n_rows, k), dtype=torch.int64, device=device)
        combine(statistics, None, *(some_rows(x, rows) for x in found))
        if k <= min(stretches, MOST_SELECTED):
            select_largest(logits, parts, k, some_rows(values, rows), some_rows(indices, rows))
        else:
            values[rows], indices[rows] = logits[:, :vocabulary].topk(k, dim=-1)
    row_max, log_sum = found
    return (values - row_max.unsqueeze(-1)) - log_sum.unsqueeze(-1), indices
