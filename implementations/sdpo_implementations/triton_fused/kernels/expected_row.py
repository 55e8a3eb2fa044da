"""The dense direction e = W[y] - sum_v softmax_v W[v], (N, H): what the gradient through l[y] moves along.

It does not depend on how strongly the anchor or the surrogate pulls, so it is made in the forward pass, from
logits that are at hand there: two products in all rather than three. Some rows of the vocabulary's width are
held at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.logsumexp import combine
from sdpo_implementations.triton_fused.kernels.vocabulary_product import (
    TileStatistics,
    buffer_columns,
    tile_exponentials,
    tiling,
)
from sdpo_implementations.triton_fused.runtime import INTERPRETED, ceil_div, storage_dtype

import triton  # isort: skip
import triton.language as tl  # isort: skip

BUFFER_BYTES = 300 * 2**20
"""Bound on the buffer that holds some rows of the vocabulary's width."""

HALF_SCALE = 64.0
"""float16 flushes probabilities below 6e-8; scaled by this, below 1e-9. Small enough that no product overflows."""


def rows_per_buffer(n_rows: int, columns: int, element_size: int) -> int:
    """Rows that fit, a multiple of 128 if more than 128."""
    fitting = max(1, BUFFER_BYTES // (columns * element_size))
    return min(n_rows, fitting if fitting < 128 else fitting // 128 * 128)


@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=["counted", "row_max", "log_sum", "response_ids", "chosen_logits"],
)
def onehot_minus_softmax_kernel(
    buffer, tile_max, counted, row_max, log_sum, response_ids, chosen_logits,
    n_rows, n_tiles, stride_buffer, stride_logits, factor,
    TILES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """In place: exp(logit - tile maximum) becomes factor * (onehot(y) - softmax)."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(counted + row) != 0:
        tiles = tl.program_id(1) * TILES + tl.arange(0, TILES)
        columns = tiles[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        here = tiles < n_tiles
        maximum = tl.load(row_max + row)
        rest = tl.load(log_sum + row)
        shift = tl.load(tile_max + tiles.to(tl.int64) * n_rows + row, mask=here, other=float("-inf"))
        share = tl.exp((shift - maximum) - rest) * factor
        places = buffer + row * stride_buffer + columns
        others = -tl.load(places, mask=here[:, None], other=0.0).to(tl.float32) * share[:, None]
        y = tl.load(response_ids + row)
        chosen = (tl.load(chosen_logits + row * stride_logits).to(tl.float64) - maximum) - rest
        # At y directly from l[y]: 1 - softmax taken after rounding would lose all where softmax is near 1.
        at_chosen = ((1.0 - tl.exp(chosen)) * factor).to(tl.float32)
        tl.store(places, tl.where(columns == y, at_chosen, others).to(buffer.dtype.element_ty), mask=here[:, None])


def _normalise(
    buffer: Tensor, statistics: TileStatistics, columns: int, counted: Tensor, row_max: Tensor, log_sum: Tensor,
    response_ids: Tensor, chosen_logits: Tensor, factor: float,
) -> None:  # fmt: skip
    n_tiles, n_rows = statistics.maxima.shape
    tiles = max(1, (2**16 if INTERPRETED else 4096) // columns)
    onehot_minus_softmax_kernel[(n_rows, ceil_div(n_tiles, tiles))](
        buffer, statistics.maxima, counted, row_max, log_sum, response_ids, chosen_logits,
        n_rows, n_tiles, buffer.stride(0), chosen_logits.stride(0), factor,
        TILES=tiles, COLUMNS=columns, num_warps=4,
    )  # fmt: skip


def expected_rows(
    hidden: Tensor, head: Tensor, response_ids: Tensor, chosen_logits: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(e, row_max, log_sum): (N, H) in the head's storage dtype, and (N,) float32 twice. ``chosen_logits`` (N,)
    are the logits of y. Rows of e that do not count hold anything."""
    n_rows, width = hidden.shape
    vocabulary = head.shape[0]
    device = hidden.device
    row_max = torch.empty(n_rows, dtype=torch.float32, device=device)
    log_sum = torch.empty_like(row_max)
    dtype = storage_dtype(head.dtype)
    factor = HALF_SCALE if dtype == torch.float16 else 1.0
    tiles = tiling(n_rows, vocabulary, width, hidden.dtype, device)
    padded = buffer_columns(vocabulary, tiles)
    block = rows_per_buffer(n_rows, padded, dtype.itemsize)
    buffer = torch.empty((block, padded), dtype=dtype, device=device)
    expected = torch.empty((n_rows, width), dtype=dtype, device=device)
    table = head.to(dtype)
    for start in range(0, n_rows, block):
        rows = slice(start, min(start + block, n_rows))
        part = buffer[: rows.stop - rows.start]
        statistics = tile_exponentials(hidden[rows], head, tiles, counted[rows], part)
        combine(statistics, counted[rows], row_max[rows], log_sum[rows])
        _normalise(
            part, statistics, tiles.columns, counted[rows], row_max[rows], log_sum[rows],
            response_ids[rows], chosen_logits[rows], factor,
        )  # fmt: skip
        torch.mm(part[:, :vocabulary], table, out=expected[rows])
    if factor != 1.0:
        expected.mul_(1.0 / factor)
    return expected, row_max, log_sum
