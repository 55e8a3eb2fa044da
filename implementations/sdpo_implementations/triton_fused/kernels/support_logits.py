"""Logits at each token's support and at its response token, straight from the head's rows: K + 1 dot products."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.runtime import INTERPRETED, ceil_div, next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip


@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=["counted", "support", "response_ids", "support_logits"],
)
def support_logits_kernel(
    hidden, head, counted, support, response_ids, support_logits,
    n_rows, k_support, vocabulary, width, stride_hidden, stride_head,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, INNER: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    entries = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    read = rows < n_rows
    if MASKED:
        read = read & (tl.load(counted + rows, mask=read, other=0.0) != 0)
    places = rows[:, None].to(tl.int64) * k_support + entries[None, :]
    token = tl.load(support + places, mask=read[:, None] & (entries < k_support)[None, :], other=0).to(tl.int64)
    chosen = tl.load(response_ids + rows, mask=read, other=0).to(tl.int64)
    token = tl.where((entries == k_support)[None, :], chosen[:, None], token)
    wanted = read[:, None] & (entries <= k_support)[None, :]
    valid = wanted & (token >= 0) & (token < vocabulary)
    accumulator = tl.zeros((ROWS, ENTRIES, INNER), tl.float32)
    for start in range(0, width, INNER):
        inner = start + tl.arange(0, INNER)
        h = tl.load(
            hidden + rows[:, None].to(tl.int64) * stride_hidden + inner[None, :],
            mask=read[:, None] & (inner < width)[None, :], other=0.0,
        )  # fmt: skip
        w = tl.load(
            head + token[:, :, None] * stride_head + inner[None, None, :],
            mask=valid[:, :, None] & (inner < width)[None, None, :], other=0.0,
        )  # fmt: skip
        accumulator += h.to(tl.float32)[:, None, :] * w.to(tl.float32)
    # An id outside the vocabulary cannot be reported from here: NaN keeps it from passing for a number.
    logits = tl.where(valid, tl.sum(accumulator, 2), float("nan"))
    out = rows[:, None].to(tl.int64) * (k_support + 1) + entries[None, :]
    tl.store(support_logits + out, logits, mask=wanted)


def hidden_support_logits(
    hidden: Tensor, head: Tensor, support: Tensor | None, response_ids: Tensor, counted: Tensor | None
) -> Tensor:
    """(N, K + 1) float32: hidden . head[support_k], and last hidden . head[response id]; (N, 1) without a
    support. Rows that do not count are left unwritten."""
    n_rows, width = hidden.shape
    k_support = 0 if support is None else support.shape[1]
    logits = torch.empty((n_rows, k_support + 1), dtype=torch.float32, device=hidden.device)
    if INTERPRETED:
        entries, inner = min(64, next_power_of_2(k_support + 1)), min(128, next_power_of_2(width))
        rows, warps = max(1, min(64, 2**17 // (entries * inner), next_power_of_2(n_rows))), 4
    else:
        rows, entries, inner, warps = 1, min(16, next_power_of_2(k_support + 1)), min(256, next_power_of_2(width)), 4
    support_logits_kernel[(ceil_div(n_rows, rows), ceil_div(k_support + 1, entries))](
        hidden, head, logits if counted is None else counted,
        response_ids if support is None else support, response_ids, logits,
        n_rows, k_support, head.shape[0], width, hidden.stride(0), head.stride(0),
        ROWS=rows, ENTRIES=entries, INNER=inner, MASKED=counted is not None, num_warps=warps,
    )  # fmt: skip
    return logits
