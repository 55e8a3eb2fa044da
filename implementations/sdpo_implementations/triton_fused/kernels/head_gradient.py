"""Gradient to a trainable head: dW = G.T @ hidden, G the loss's gradient with respect to the logits.

G is rebuilt for a stretch of the vocabulary at a time, all tokens at once, so that each row of dW is finished
by one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.expected_row import BUFFER_BYTES
from sdpo_implementations.triton_fused.kernels.token_loss import TokenTerms
from sdpo_implementations.triton_fused.kernels.vocabulary_product import (
    buffer_columns,
    dense_logit_gradient,
    tiling,
)
from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import INTERPRETED, ceil_div, next_power_of_2, storage_dtype

import triton  # isort: skip
import triton.language as tl  # isort: skip


@repeated
@triton.jit(
    do_not_specialize=["n_rows", "column_start", "column_end"],
    do_not_specialize_on_alignment=["support", "support_weight", "support_scale", "scale"],
)
def add_support_kernel(
    # buffer (N, column_end - column_start), added to
    buffer,
    # support and support_weight (N, K), support_scale (N,); scale (N,) or (), told by its stride
    support, support_weight, support_scale, scale,
    # sizes, strides, the buffer's columns within the vocabulary
    n_rows, k_support, column_start, column_end, stride_buffer, stride_scale,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """buffer.scatter_add_(-1, support - column_start, support_weight * (support_scale * scale)[:, None])"""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wide = rows.to(tl.int64)
    present = rows < n_rows
    used = tl.load(support_scale + rows, mask=present, other=0.0)
    entries = tl.arange(0, ENTRIES)
    places = wide[:, None] * k_support + entries[None, :]
    inside = (used != 0)[:, None] & (entries < k_support)[None, :]
    token = tl.load(support + places, mask=inside, other=-1).to(tl.int64)
    inside = inside & (token >= column_start) & (token < column_end)
    weight = tl.load(support_weight + places, mask=inside, other=0.0)
    factor = used * tl.load(scale + wide * stride_scale, mask=present, other=0.0)
    at = buffer + wide[:, None] * stride_buffer + (token - column_start)
    before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (before + weight * factor[:, None]).to(buffer.dtype.element_ty), mask=inside)


def head_gradient(
    hidden: Tensor, head: Tensor, support: Tensor, response_ids: Tensor, counted: Tensor,
    row_max: Tensor, log_sum: Tensor, terms: TokenTerms, scale: Tensor,
) -> Tensor:  # fmt: skip
    """(V, H) in the head's dtype."""
    n_rows, width = hidden.shape
    vocabulary, k_support = head.shape[0], support.shape[1]
    dtype = storage_dtype(head.dtype)
    tiles = tiling(n_rows, vocabulary, width, hidden.dtype, hidden.device)
    stretch = max(1, BUFFER_BYTES // (n_rows * dtype.itemsize * tiles.columns)) * tiles.columns
    stretch = min(stretch, buffer_columns(vocabulary, tiles))
    buffer = torch.empty((n_rows, stretch), dtype=dtype, device=hidden.device)
    # A hidden state at a masked position may be anything; its row of G is 0, and 0 * NaN must not arise.
    factors = torch.where((counted != 0).unsqueeze(-1), hidden, torch.zeros_like(hidden)).to(dtype)
    gradient = torch.empty((vocabulary, width), dtype=dtype, device=hidden.device)
    entries = next_power_of_2(k_support)
    rows = max(1, min(next_power_of_2(n_rows), (2**14 if INTERPRETED else 128) // entries))
    for start in range(0, vocabulary, stretch):
        stop = min(start + stretch, vocabulary)
        dense_logit_gradient(
            hidden, head, tiles, (start, stop), buffer, row_max, log_sum,
            terms.chosen_weight, terms.floor_weight, scale, response_ids,
        )  # fmt: skip
        if terms.support_weight is not None:
            add_support_kernel[(ceil_div(n_rows, rows),)](
                buffer, support, terms.support_weight, terms.support_scale, scale,
                n_rows, k_support, start, stop, buffer.stride(0), scale.stride(0) if scale.dim() == 1 else 0,
                ROWS=rows, ENTRIES=entries, num_warps=4,
            )  # fmt: skip
        torch.mm(buffer[:, : stop - start].T, factors, out=gradient[start:stop])
    return gradient.to(head.dtype)
