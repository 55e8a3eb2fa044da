"""Logits at given tokens, straight from the head's rows: K dot products a token."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import INTERPRETED, ceil_div, next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip


@repeated
@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=["counted", "token_ids", "token_logits"],
)
def token_logits_kernel(
    # operands (N, H), (V, H); counted (N,), token_ids (N, K)
    hidden, head, counted, token_ids,
    # result (N, K)
    token_logits,
    # sizes and strides
    n_rows, n_entries, vocabulary, width, stride_hidden, stride_head,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, INNER: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """token_logits = (head[token_ids] * hidden[:, None]).float().sum(-1)"""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    entries = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    read = rows < n_rows
    if MASKED:
        read = read & (tl.load(counted + rows, mask=read, other=0.0) != 0)
    places = rows[:, None].to(tl.int64) * n_entries + entries[None, :]
    wanted = read[:, None] & (entries < n_entries)[None, :]
    token = tl.load(token_ids + places, mask=wanted, other=0).to(tl.int64)
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
    tl.store(token_logits + places, logits, mask=wanted)


def fill_token_logits(
    hidden: Tensor, head: Tensor, token_ids: Tensor, counted: Tensor | None, token_logits: Tensor
) -> None:
    """``token_logits`` (N, K) float32 = hidden (N, H) . head[token_ids (N, K)]; rows that do not count stay
    unwritten. Small programs: they fit beside those of the vocabulary's product on one multiprocessor."""
    n_rows, width = hidden.shape
    n_entries = token_ids.shape[1]
    if INTERPRETED:
        entries, inner = min(64, next_power_of_2(n_entries)), min(128, next_power_of_2(width))
        rows, warps = max(1, min(64, 2**17 // (entries * inner), next_power_of_2(n_rows))), 4
    else:
        rows, entries, inner, warps = 1, min(2, next_power_of_2(n_entries)), min(512, next_power_of_2(width)), 1
    token_logits_kernel[(ceil_div(n_rows, rows), ceil_div(n_entries, entries))](
        hidden, head, token_logits if counted is None else counted, token_ids, token_logits,
        n_rows, n_entries, head.shape[0], width, hidden.stride(0), head.stride(0),
        ROWS=rows, ENTRIES=entries, INNER=inner, MASKED=counted is not None, num_warps=warps,
    )  # fmt: skip


def chosen_token_logits(hidden: Tensor, head: Tensor, response_ids: Tensor, counted: Tensor | None) -> Tensor:
    """(N,) float32: the logits of ``response_ids`` (N,)."""
    logits = torch.empty(response_ids.shape, dtype=torch.float32, device=hidden.device)
    fill_token_logits(hidden, head, response_ids.unsqueeze(1), counted, logits.unsqueeze(1))
    return logits
