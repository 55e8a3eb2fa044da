"""Gradient to the hidden states: the head's rows at the support, weighted, and the dense term if there is one.

dH = scale (support_scale sum_k support_weight_k W[S_k]
            + (chosen_weight + floor_weight) e - floor_weight W[y]),      e = W[y] - sum_v softmax_v W[v]
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.expected_row import ExpectedRows
from sdpo_implementations.triton_fused.kernels.token_loss import TokenTerms
from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import INTERPRETED, ceil_div, next_power_of_2, storage_dtype

import triton  # isort: skip
import triton.language as tl  # isort: skip


@repeated
@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=[
        "support", "response_ids", "support_weight", "support_scale", "chosen_weight", "floor_weight", "scale",
        "expected_scale",
    ],
)  # fmt: skip
def support_gradient_kernel(
    # head (V, H); support (N, K), response_ids (N,)
    head, support, response_ids,
    # slopes: support_weight (N, K), the rest (N,)
    support_weight, support_scale, chosen_weight, floor_weight, scale,
    # dense direction: expected (N, H), expected_scale (N,); result: gradient (N, H)
    expected, expected_scale, gradient,
    # sizes and strides
    n_rows, k_support, vocabulary, width, stride_head, stride_scale,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, INNER: tl.constexpr, SUPPORT: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """PyTorch: ``(support_scale[:, None] * support_weight)[..., None] * head[support]`` summed over K, plus
    ``(c + f) * e - f * head[y]``, times ``scale``. Programs go by stretches of the width, all tokens of one before
    the next: what tokens share of a stretch of the head stays in the cache."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wide = rows.to(tl.int64)
    inner = tl.program_id(1) * INNER + tl.arange(0, INNER)
    present = rows < n_rows
    in_width = inner < width
    used = tl.load(support_scale + rows, mask=present, other=0.0)
    total = tl.zeros((ROWS, INNER), tl.float32)
    if SUPPORT:
        for start in range(0, k_support, ENTRIES):
            entries = start + tl.arange(0, ENTRIES)
            inside = (used != 0)[:, None] & (entries < k_support)[None, :]
            places = wide[:, None] * k_support + entries[None, :]
            token = tl.load(support + places, mask=inside, other=0).to(tl.int64)
            inside = inside & (token >= 0) & (token < vocabulary)
            weight = tl.load(support_weight + places, mask=inside, other=0.0)
            w = tl.load(
                head + token[:, :, None] * stride_head + inner[None, None, :],
                mask=(inside & (weight != 0))[:, :, None] & in_width[None, None, :], other=0.0,
            )  # fmt: skip
            total += tl.sum(weight[:, :, None] * w.to(tl.float32), 1)
        total = tl.where((used != 0)[:, None], total * used[:, None], 0.0)
    if DENSE:
        through_chosen = tl.load(chosen_weight + rows, mask=present, other=0.0)
        through_floor = tl.load(floor_weight + rows, mask=present, other=0.0)
        on_floor = (through_floor != 0)[:, None] & in_width[None, :]
        needed = (through_chosen != 0) | (through_floor != 0)
        c = through_chosen + through_floor
        e = tl.load(
            expected + wide[:, None] * width + inner[None, :],
            mask=needed[:, None] & in_width[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        # Before c: both c and the scale can be as small as 1e-30, and their product too small for float32.
        e *= tl.load(expected_scale + rows, mask=needed, other=0.0)[:, None]
        y = tl.load(response_ids + rows, mask=present, other=0).to(tl.int64)
        w = tl.load(head + y[:, None] * stride_head + inner[None, :], mask=on_floor, other=0.0).to(tl.float32)
        total += c[:, None] * e - through_floor[:, None] * w
    total *= tl.load(scale + wide * stride_scale, mask=present, other=0.0)[:, None]
    tl.store(
        gradient + wide[:, None] * width + inner[None, :], total.to(gradient.dtype.element_ty),
        mask=present[:, None] & in_width[None, :],
    )  # fmt: skip


def hidden_gradient(
    head: Tensor, support: Tensor, response_ids: Tensor, terms: TokenTerms, scale: Tensor, expected: ExpectedRows | None
) -> Tensor:
    """(N, H) in the storage dtype of the head; ``scale`` () or (N,) float32; ``expected`` e or None."""
    n_rows, k_support = support.shape
    width = head.shape[1]
    gradient = torch.empty((n_rows, width), dtype=storage_dtype(head.dtype), device=head.device)
    if INTERPRETED:
        entries, inner = min(16, next_power_of_2(k_support)), min(256, next_power_of_2(width))
        rows, warps = max(1, min(64, 2**17 // (entries * inner), next_power_of_2(n_rows))), 4
    else:
        # 64 columns of all rows of the head are 19 MB at 152k rows: a stretch that stays in the cache while the tokens
        # go through it. 32 entries at once keep enough loads in flight.
        rows, entries, inner, warps = 1, min(32, next_power_of_2(k_support)), min(64, next_power_of_2(width)), 1
    support_gradient_kernel[(ceil_div(n_rows, rows), ceil_div(width, inner))](
        head, support, response_ids,
        terms.support_scale if terms.support_weight is None else terms.support_weight, terms.support_scale,
        terms.chosen_weight, terms.floor_weight, scale, gradient if expected is None else expected.rows,
        scale if expected is None else expected.scale, gradient,
        n_rows, k_support, head.shape[0], width, head.stride(0), scale.stride(0) if scale.dim() == 1 else 0,
        ROWS=rows, ENTRIES=entries, INNER=inner,
        SUPPORT=terms.support_weight is not None, DENSE=expected is not None, num_warps=warps,
    )  # fmt: skip
    return gradient
