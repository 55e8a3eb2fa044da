"""The k largest of each row of a buffer, given the maximum of every SUBTILE columns.

They lie among the k stretches of SUBTILE columns with the largest maxima: any element outside is at most each
of those k maxima. For the same reason none of the k is less than the least of those maxima, and hardly more than
k elements are as large: these candidates are listed, then sorted. The rest of the row is never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.vocabulary_product import SUBTILE
from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import INTERPRETED, ceil_div, next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip

MOST_SELECTED = 512
"""Beyond this a row's candidates no longer fit the registers of one program."""


@triton.jit
def _ordered_keys(x):
    """float32 to uint32 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _values_of(keys):
    """Inverse of _ordered_keys, of keys in int32."""
    return (keys ^ tl.where(keys < 0, -2147483648, -1)).to(tl.float32, bitcast=True)


@triton.jit
def _kth_largest(keys, k):
    """(ROWS, 1): each row's k-th largest key, found bit by bit, by counting."""
    threshold = tl.zeros((keys.shape[0], 1), tl.uint32)
    bit = tl.full((1, 1), 0x80000000, tl.uint32)
    found = tl.zeros((keys.shape[0],), tl.int32)
    step = 0
    unfinished = 1
    while (step < 32) & (unfinished > 0):
        candidate = threshold | bit
        count = tl.sum((keys >= candidate).to(tl.int32), 1)
        threshold = tl.where(((count >= k) & (found == 0))[:, None], candidate, threshold)
        # Exactly k at or above: the least of them is the one.
        found = tl.where(count == k, 1, found)
        unfinished = tl.max(1 - found, 0)
        bit = bit >> 1
        step += 1
    none = tl.full((1, 1), 0xFFFFFFFF, tl.uint32)
    # As int64: there is no minimum of unsigned numbers everywhere.
    least = tl.min(tl.where(keys >= threshold, keys, none).to(tl.int64), 1)
    return least[:, None].to(tl.uint32)


@triton.jit
def _elements(
    logits, stretches, wide, present, start, width, k, stride_logits, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    SUBTILE: tl.constexpr,
):  # fmt: skip
    """Keys and columns (ROWS, CHUNK * SUBTILE) of the chosen stretches from number ``start`` on, and which exist."""
    entry = start + tl.arange(0, CHUNK)[None, :]
    named = present & (entry < k)
    first = tl.load(stretches + wide * k + entry, mask=named, other=0) * SUBTILE
    column = first[:, :, None] + tl.arange(0, SUBTILE)[None, None, :]
    real = named[:, :, None] & (column < width)
    z = tl.load(logits + wide[:, :, None] * stride_logits + column, mask=real, other=0.0).to(tl.float32)
    return (
        tl.reshape(_ordered_keys(z), (ROWS, CHUNK * SUBTILE)),
        tl.reshape(column, (ROWS, CHUNK * SUBTILE)),
        tl.reshape(real, (ROWS, CHUNK * SUBTILE)),
    )


@triton.jit
def _list(candidates, wide, keys, column, wanted, listed, CANDIDATES: tl.constexpr):
    """Append the wanted elements to each row's candidates, as many as fit; how many there are now, of all wanted."""
    place = listed + tl.cumsum(wanted.to(tl.int32), 1) - 1
    packed = ((keys.to(tl.int64) - 2**31) << 32) | (2**32 - 1 - column.to(tl.int64))
    tl.store(candidates + wide * CANDIDATES + place, packed, mask=wanted & (place < CANDIDATES))
    return listed + tl.sum(wanted.to(tl.int32), 1)[:, None]


@repeated
@triton.jit(
    do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["stretches", "candidates", "values", "indices"]
)
def selection_kernel(
    # logits (N, width) and the maxima (N, stretches) of their SUBTILE columns
    logits, maxima,
    # scratch: the chosen stretches (N, k), the candidates (N, CANDIDATES)
    stretches, candidates,
    # results (N, k), largest first
    values, indices,
    # sizes and strides
    n_rows, width, n_stretches, k, stride_logits, stride_maxima,
    ROWS: tl.constexpr, STRETCHES: tl.constexpr, CHUNK: tl.constexpr, CANDIDATES: tl.constexpr, SUBTILE: tl.constexpr,
):  # fmt: skip
    """``values, indices = logits.topk(k)``; of equal logits those in the first columns of the chosen stretches."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = (rows < n_rows)[:, None]
    wide = rows[:, None].to(tl.int64)
    stretch = tl.arange(0, STRETCHES)[None, :]
    real = present & (stretch < n_stretches)
    keys = _ordered_keys(tl.load(maxima + wide * stride_maxima + stretch, mask=real, other=0.0))
    keys = tl.where(real, keys, 0)
    threshold = _kth_largest(keys, k)
    above = keys > threshold
    equal = keys == threshold
    wanted = k - tl.sum(above.to(tl.int32), 1)
    chosen = (above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= wanted[:, None]))) & real
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    tl.store(stretches + wide * k + place, stretch + tl.zeros((ROWS, 1), tl.int32), mask=chosen)
    tl.debug_barrier()

    listed = tl.zeros((ROWS, 1), tl.int32)
    for start in range(0, k, CHUNK):
        own, column, inside = _elements(
            logits, stretches, wide, present, start, width, k, stride_logits, ROWS, CHUNK, SUBTILE
        )
        listed = _list(candidates, wide, own, column, inside & (own >= threshold), listed, CANDIDATES)
    if tl.max(listed) > CANDIDATES:
        # Many elements as large as the k-th largest maximum: the k-th largest of them, what lies above, then equals.
        threshold = tl.zeros((ROWS, 1), tl.uint32)
        bit = tl.full((1, 1), 0x80000000, tl.uint32)
        for _ in range(32):
            least = threshold | bit
            count = tl.zeros((ROWS, 1), tl.int32)
            for start in range(0, k, CHUNK):
                own, column, inside = _elements(
                    logits, stretches, wide, present, start, width, k, stride_logits, ROWS, CHUNK, SUBTILE
                )
                count += tl.sum((inside & (own >= least)).to(tl.int32), 1)[:, None]
            threshold = tl.where(count >= k, least, threshold)
            bit = bit >> 1
        tl.debug_barrier()
        listed = tl.zeros((ROWS, 1), tl.int32)
        for start in range(0, k, CHUNK):
            own, column, inside = _elements(
                logits, stretches, wide, present, start, width, k, stride_logits, ROWS, CHUNK, SUBTILE
            )
            listed = _list(candidates, wide, own, column, inside & (own > threshold), listed, CANDIDATES)
        for start in range(0, k, CHUNK):
            own, column, inside = _elements(
                logits, stretches, wide, present, start, width, k, stride_logits, ROWS, CHUNK, SUBTILE
            )
            listed = _list(candidates, wide, own, column, inside & (own == threshold), listed, CANDIDATES)
    tl.debug_barrier()
    candidate = tl.arange(0, CANDIDATES)[None, :]
    packed = tl.load(candidates + wide * CANDIDATES + candidate, mask=present & (candidate < listed), other=-(2**63))
    packed = tl.sort(packed, 1, descending=True)
    out = wide * k + candidate
    found = present & (candidate < k)
    tl.store(values + out, _values_of(((packed >> 32) + 2**31).to(tl.uint32).to(tl.int32, bitcast=True)), mask=found)
    tl.store(indices + out, 2**32 - 1 - (packed & (2**32 - 1)), mask=found)


def select_largest(logits: Tensor, maxima: Tensor, k: int, values: Tensor, indices: Tensor) -> None:
    """Fill ``values`` float32 and ``indices`` int64, (N, k), largest first, from ``logits`` (N, width), of
    any floating dtype, and their ``maxima`` (N, stretches) float32; k <= stretches and MOST_SELECTED."""
    n_rows, n_stretches = maxima.shape
    width = next_power_of_2(n_stretches)
    # Rows that are no sample of one distribution have more candidates than k: room for some of that.
    n_candidates = next_power_of_2((4 if k <= 128 else 2) * k)
    chunk = min(16, next_power_of_2(k))
    largest = max(width, 4 * n_candidates, chunk * SUBTILE)
    rows = max(1, min(next_power_of_2(n_rows), 2**16 // largest)) if INTERPRETED else 1
    stretches = torch.empty((n_rows, k), dtype=torch.int32, device=logits.device)
    candidates = torch.empty((n_rows, n_candidates), dtype=torch.int64, device=logits.device)
    selection_kernel[(ceil_div(n_rows, rows),)](
        logits, maxima, stretches, candidates, values, indices, n_rows, logits.shape[1], n_stretches, k,
        logits.stride(0), maxima.stride(0),
        ROWS=rows, STRETCHES=width, CHUNK=chunk, CANDIDATES=n_candidates, SUBTILE=SUBTILE,
        num_warps=4 if largest <= 2**13 else 8,
    )  # fmt: skip
