"""The k largest of each row of a buffer, given the maximum of every SUBTILE columns.

They lie among the k stretches of SUBTILE columns with the largest maxima: any element outside is at most each
of those k maxima. So one program finds the k-th largest of V / SUBTILE maxima, then the k-th largest of
k * SUBTILE candidates; the rest of the row is never read. The k-th largest is found bit by bit, by counting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.vocabulary_product import SUBTILE
from sdpo_implementations.triton_fused.runtime import INTERPRETED, ceil_div, next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip


@triton.jit
def _ordered_keys(x):
    """float32 to uint32 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _largest(keys, k):
    """Mask of exactly k of each row's largest keys, ties by position."""
    threshold = tl.zeros((keys.shape[0], 1), tl.uint32)
    bit = tl.full((1, 1), 0x80000000, tl.uint32)
    found = tl.zeros((keys.shape[0],), tl.int32)
    step = 0
    unfinished = 1
    while (step < 32) & (unfinished > 0):
        candidate = threshold | bit
        count = tl.sum((keys >= candidate).to(tl.int32), 1)
        threshold = tl.where(((count >= k) & (found == 0))[:, None], candidate, threshold)
        # Exactly k at or above: the lower bits cannot matter.
        found = tl.where(count == k, 1, found)
        unfinished = tl.max(1 - found, 0)
        bit = bit >> 1
        step += 1
    above = keys > threshold
    equal = keys == threshold
    wanted = k - tl.sum(above.to(tl.int32), 1)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= wanted[:, None]))


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["stretches", "values", "indices"])
def selection_kernel(
    # logits (N, width) and the maxima (N, stretches) of their SUBTILE columns
    logits, maxima,
    # scratch (N, k): the chosen stretches
    stretches,
    # results (N, k), in no order
    values, indices,
    # sizes and strides
    n_rows, width, n_stretches, k, stride_logits, stride_maxima,
    ROWS: tl.constexpr, STRETCHES: tl.constexpr, ENTRIES: tl.constexpr, SUBTILE: tl.constexpr,
):  # fmt: skip
    """values, indices = logits.topk(k, sorted=False)

    The k largest logits lie within the k stretches of the largest maxima.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = (rows < n_rows)[:, None]
    wide = rows[:, None].to(tl.int64)
    stretch = tl.arange(0, STRETCHES)[None, :]
    real = present & (stretch < n_stretches)
    keys = _ordered_keys(tl.load(maxima + wide * stride_maxima + stretch, mask=real, other=0.0))
    chosen = _largest(tl.where(real, keys, 0), k)
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    tl.store(stretches + wide * k + place, stretch + tl.zeros((ROWS, 1), tl.int32), mask=chosen & real)
    tl.debug_barrier()

    entry = tl.arange(0, ENTRIES)[None, :]
    start = tl.load(stretches + wide * k + entry, mask=present & (entry < k), other=0) * SUBTILE
    column = start[:, :, None] + tl.arange(0, SUBTILE)[None, None, :]
    real3 = (present & (entry < k))[:, :, None] & (column < width)
    z = tl.load(logits + wide[:, :, None] * stride_logits + column, mask=real3, other=0.0).to(tl.float32)
    z = tl.reshape(z, (ROWS, ENTRIES * SUBTILE))
    column = tl.reshape(column, (ROWS, ENTRIES * SUBTILE))
    real = tl.reshape(real3, (ROWS, ENTRIES * SUBTILE))
    chosen = _largest(tl.where(real, _ordered_keys(z), 0), k) & real
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    tl.store(values + wide * k + place, z, mask=chosen)
    tl.store(indices + wide * k + place, column.to(tl.int64), mask=chosen)


def select_largest(logits: Tensor, maxima: Tensor, k: int, values: Tensor, indices: Tensor) -> None:
    """Fill ``values`` float32 and ``indices`` int64, (N, k), in no order, from ``logits`` (N, width), of
    any floating dtype, and their ``maxima`` (N, stretches) float32; k <= stretches."""
    n_rows, n_stretches = maxima.shape
    width, entries = next_power_of_2(n_stretches), next_power_of_2(k)
    largest = max(width, entries * SUBTILE)
    rows = max(1, min(next_power_of_2(n_rows), 2**17 // largest)) if INTERPRETED else 1
    warps = 4 if largest <= 2**13 else 8 if largest <= 2**14 else 16 if largest <= 2**15 else 32
    scratch = torch.empty((n_rows, k), dtype=torch.int32, device=logits.device)
    selection_kernel[(ceil_div(n_rows, rows),)](
        logits, maxima, scratch, values, indices, n_rows, logits.shape[1], n_stretches, k,
        logits.stride(0), maxima.stride(0),
        ROWS=rows, STRETCHES=width, ENTRIES=entries, SUBTILE=SUBTILE, num_warps=warps,
    )  # fmt: skip
