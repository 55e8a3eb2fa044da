"""The K largest logits of each row and their log-probs, without a selection over the whole vocabulary.

The K largest lie among the K stretches of SUBTILE columns with the largest maxima: any element outside them
is at most each of those K maxima. So the product's epilogue writes the stretches' maxima beside the float32
logits, one selection runs over V / SUBTILE maxima and another over K * SUBTILE candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.expected_row import rows_per_buffer
from sdpo_implementations.triton_fused.kernels.logsumexp import combine
from sdpo_implementations.triton_fused.kernels.vocabulary_product import (
    SUBTILE,
    buffer_columns,
    tile_logits,
    tiling,
)


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
    row_max = torch.empty(n_rows, dtype=torch.float32, device=device)
    log_sum = torch.empty_like(row_max)
    logprobs = torch.empty((n_rows, k), dtype=torch.float32, device=device)
    indices = torch.empty((n_rows, k), dtype=torch.int64, device=device)
    for start in range(0, n_rows, block):
        rows = slice(start, min(start + block, n_rows))
        count = rows.stop - rows.start
        logits, parts = buffer[:count], maxima[:count]
        combine(tile_logits(hidden[rows], head, tiles, logits, parts), None, row_max[rows], log_sum[rows])
        if k < stretches:
            chosen = parts.topk(k, dim=-1, sorted=False).indices
            candidates = logits.view(count, stretches, SUBTILE).gather(
                1, chosen.unsqueeze(-1).expand(count, k, SUBTILE)
            )
            values, at = candidates.view(count, k * SUBTILE).topk(k, dim=-1)
            indices[rows] = chosen.gather(1, at // SUBTILE) * SUBTILE + at % SUBTILE
        else:
            values, indices[rows] = logits[:, :vocabulary].topk(k, dim=-1)
        logprobs[rows] = (values - row_max[rows].unsqueeze(-1)) - log_sum[rows].unsqueeze(-1)
    return logprobs, indices
