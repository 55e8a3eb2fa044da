"""From the statistics of tiles to each row's logsumexp, kept as two numbers: its maximum and the rest.

l = (z - maximum) - log_sum keeps the low bits of a log-prob among logits of magnitude 1e4, which
z - logsumexp in float32 does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.vocabulary_product import (
    ROW_BLOCK,
    Wanted,
    tile_statistics,
    tiling,
)
from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import INTERPRETED, ceil_div, some_rows

import triton  # isort: skip
import triton.language as tl  # isort: skip


@repeated
@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["counted", "row_max", "log_sum"])
def combine_statistics_kernel(
    # statistics (2, tiles, N); counted (N,)
    statistics, counted,
    # results (N,)
    row_max, log_sum,
    # sizes
    n_rows, n_tiles,
    ROWS: tl.constexpr, TILES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """m, s = statistics; row_max = m.amax(0); log_sum = (s * (m - row_max).exp()).sum(0).log()"""
    tile_sum = statistics + n_rows.to(tl.int64) * n_tiles
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    read = rows < n_rows
    if MASKED:
        read = read & (tl.load(counted + rows, mask=read, other=0.0) != 0)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    for tile in range(0, n_tiles, TILES):
        tiles = tile + tl.arange(0, TILES)
        places = tiles[:, None].to(tl.int64) * n_rows + rows[None, :]
        here = (tiles < n_tiles)[:, None] & read[None, :]
        maximum = tl.maximum(maximum, tl.max(tl.load(statistics + places, mask=here, other=float("-inf")), 0))
    finite = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.zeros((ROWS,), tl.float32)
    for tile in range(0, n_tiles, TILES):
        tiles = tile + tl.arange(0, TILES)
        places = tiles[:, None].to(tl.int64) * n_rows + rows[None, :]
        here = (tiles < n_tiles)[:, None] & read[None, :]
        shift = tl.load(statistics + places, mask=here, other=float("-inf")) - finite[None, :]
        total += tl.sum(tl.load(tile_sum + places, mask=here, other=0.0) * tl.exp(shift), 0)
    tl.store(row_max + rows, tl.where(read, finite, 0.0), mask=rows < n_rows)
    tl.store(log_sum + rows, tl.where(read, tl.log(total), 0.0), mask=rows < n_rows)


def combine(statistics: Tensor, counted: Tensor | None, row_max: Tensor, log_sum: Tensor) -> None:
    """Fill row_max and log_sum (N,) float32 from statistics (2, tiles, N); 0 and 0 at rows that do not count."""
    _, n_tiles, n_rows = statistics.shape
    rows = 64 if INTERPRETED else 16
    combine_statistics_kernel[(ceil_div(n_rows, rows),)](
        statistics, statistics if counted is None else counted,
        row_max, log_sum, n_rows, n_tiles,
        ROWS=rows, TILES=128, MASKED=counted is not None, num_warps=8,
    )  # fmt: skip


def hidden_logsumexp(
    hidden: Tensor, head: Tensor, counted: Tensor | None, wanted: Wanted | None = None
) -> tuple[Tensor, Tensor]:
    """(row_max, log_sum), each (N,) float32, of hidden (N, H) @ head (V, H).T; ``wanted``: logits on the way."""
    n_rows, width = hidden.shape
    found: list[Tensor] = []
    tiles = tiling(min(n_rows, ROW_BLOCK), head.shape[0], width, hidden.dtype, hidden.device)
    for start in range(0, n_rows, ROW_BLOCK):
        rows = slice(start, min(start + ROW_BLOCK, n_rows))
        part = None if counted is None else some_rows(counted, rows)
        take = None if wanted is None else wanted.of(rows, head.shape[0], tiles.columns)
        statistics = tile_statistics(some_rows(hidden, rows), head, tiles, part, take=take)
        # Allocated while the first product runs: before it the GPU would wait.
        found = found or [torch.empty(n_rows, dtype=torch.float32, device=hidden.device) for _ in range(2)]
        combine(statistics, part, *(some_rows(x, rows) for x in found))
        # The next block's statistics take their place.
        del statistics
    row_max, log_sum = found
    return row_max, log_sum
