"""The dense direction e = W[y] - sum_v softmax_v W[v], (N, H): what the gradient through l[y] moves along.

It does not depend on how strongly the anchor or the surrogate pulls, so it is made in the forward pass, from
logits that are at hand there: two products in all rather than three. Some rows of the vocabulary's width are
held at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.logsumexp import combine
from sdpo_implementations.triton_fused.kernels.vocabulary_product import (
    Exponentials,
    Wanted,
    buffer_columns,
    tile_statistics,
    tiling,
)
from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import INTERPRETED, ceil_div, some_rows, storage_dtype

import triton  # isort: skip
import triton.language as tl  # isort: skip

BUFFER_BYTES = 300 * 2**20
"""Bound on the buffer that holds some rows of the vocabulary's width."""

MOST_ABOVE = {torch.float32: 60.0, torch.bfloat16: 60.0, torch.float16: 8.0}
"""How far above a row's reference a logit, or the logsumexp, may lie for exp(logit - reference) to be stored."""

HALF_OFFSET = 2.0
"""float16 flushes what lies 17 below the reference; this lowers the reference from the response's logit."""


def rows_per_buffer(n_rows: int, columns: int, element_size: int) -> int:
    """Rows that fit, a multiple of 128 if more than 128."""
    fitting = max(1, BUFFER_BYTES // (columns * element_size))
    return min(n_rows, fitting if fitting < 128 else fitting // 128 * 128)


@dataclass(frozen=True)
class ExpectedRows:
    """e = scale * rows: (N,) float32 and (N, H) in the head's storage dtype. Anything at rows that do not count."""

    rows: Tensor
    scale: Tensor


@repeated
@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=[
        "counted", "row_max", "log_sum", "response_ids", "chosen_logits", "reference", "scale",
    ],
)  # fmt: skip
def onehot_minus_softmax_kernel(
    # buffer (N, whole tiles), statistics (2, tiles, N)
    buffer, statistics,
    # per row (N,)
    counted, row_max, log_sum, response_ids, chosen_logits, reference, scale,
    # sizes and limits
    n_rows, n_tiles, stride_buffer, most_above, TILES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """In place: -exp(logit - shift of its tile) becomes (onehot(y) - softmax) / scale.

    Where all tiles of a row are shifted by the reference, that is one element, at y. Where one is not, the
    row is rescaled to 1. PyTorch: ``buffer = (one_hot(y) - softmax) / scale[:, None]``.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(counted + row) != 0:
        maximum = tl.load(row_max + row)
        rest = tl.load(log_sum + row)
        uniform = (maximum == tl.load(reference + row)) & (rest < most_above)
        y = tl.load(response_ids + row).to(tl.int64)
        # At y from l[y]: 1 - softmax taken after rounding would lose all where softmax is near 1.
        l_chosen = (tl.load(chosen_logits + row).to(tl.float64) - maximum) - rest
        at_chosen = 1.0 - tl.exp(l_chosen)
        if uniform:
            if tl.program_id(1) == 0:
                tl.store(scale + row, tl.exp(-rest))
                at_chosen = at_chosen * tl.exp(rest.to(tl.float64))
                tl.store(buffer + row * stride_buffer + y, at_chosen.to(tl.float32).to(buffer.dtype.element_ty))
        else:
            if tl.program_id(1) == 0:
                tl.store(scale + row, 1.0)
            tiles = tl.program_id(1) * TILES + tl.arange(0, TILES)
            here = tiles < n_tiles
            columns = tiles[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            shift = tl.load(statistics + tiles.to(tl.int64) * n_rows + row, mask=here, other=float("-inf"))
            share = tl.exp((shift - maximum) - rest)
            places = buffer + row * stride_buffer + columns
            values = tl.load(places, mask=here[:, None], other=0.0).to(tl.float32) * share[:, None]
            values = tl.where(columns == y, at_chosen.to(tl.float32), values)
            tl.store(places, values.to(buffer.dtype.element_ty), mask=here[:, None])


def _normalise(
    buffer: Tensor, statistics: Tensor, columns: int, counted: Tensor, row_max: Tensor, log_sum: Tensor,
    response_ids: Tensor, chosen_logits: Tensor, reference: Tensor, scale: Tensor, most_above: float,
) -> None:  # fmt: skip
    _, n_tiles, n_rows = statistics.shape
    tiles = max(1, (2**16 if INTERPRETED else 2**14) // columns)
    onehot_minus_softmax_kernel[(n_rows, ceil_div(n_tiles, tiles))](
        buffer, statistics, counted, row_max, log_sum, response_ids, chosen_logits, reference, scale,
        n_rows, n_tiles, buffer.stride(0), most_above, TILES=tiles, COLUMNS=columns, num_warps=8,
    )  # fmt: skip


def expected_rows(
    hidden: Tensor,
    head: Tensor,
    response_ids: Tensor,
    chosen_logits: Tensor,
    counted: Tensor,
    wanted: Wanted | None = None,
) -> tuple[ExpectedRows, Tensor, Tensor]:
    """(e, row_max, log_sum), the last two (N,) float32. ``chosen_logits`` (N,) are the logits of y; ``wanted``:
    logits to take on the way."""
    n_rows, width = hidden.shape
    vocabulary = head.shape[0]
    device = hidden.device
    found: list[Tensor] = []
    reference = chosen_logits - HALF_OFFSET if head.dtype == torch.float16 else chosen_logits
    most_above = MOST_ABOVE[head.dtype]
    dtype = storage_dtype(head.dtype)
    tiles = tiling(n_rows, vocabulary, width, hidden.dtype, device)
    padded = buffer_columns(vocabulary, tiles)
    block = rows_per_buffer(n_rows, padded, dtype.itemsize)
    buffer = torch.empty((block, padded), dtype=dtype, device=device)
    table = head.to(dtype)
    for start in range(0, n_rows, block):
        rows = slice(start, min(start + block, n_rows))
        part = some_rows(buffer, slice(0, rows.stop - start))
        take = None if wanted is None else wanted.of(rows, vocabulary, tiles.columns)
        counts, shift = some_rows(counted, rows), some_rows(reference, rows)
        exponentials = Exponentials(shift, most_above, part)
        statistics = tile_statistics(some_rows(hidden, rows), head, tiles, counts, exponentials, take)
        if not found:
            # Allocated while the first product runs: before it the GPU would wait.
            expected = torch.empty((n_rows, width), dtype=dtype, device=device)
            found = [torch.empty(n_rows, dtype=torch.float32, device=device) for _ in range(3)]
        top, rest, scale = (some_rows(x, rows) for x in found)
        combine(statistics, counts, top, rest)
        _normalise(
            part, statistics, tiles.columns, counts, top, rest, some_rows(response_ids, rows),
            some_rows(chosen_logits, rows), shift, scale, most_above,
        )  # fmt: skip
        torch.mm(part[:, :vocabulary], table, out=some_rows(expected, rows))
    row_max, log_sum, scale = found
    return ExpectedRows(expected, scale), row_max, log_sum
