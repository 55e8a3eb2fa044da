"""The mean over tokens and the metrics, one program, float64 sums in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.token_loss import TokenTerms
from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import INTERPRETED, next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip


@repeated
@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["values", "mask"])
def reduction_kernel(
    # values (3, N): divergence times ratio, k3, ratio; mask (N,)
    values, mask,
    # results (6,): loss, distill_loss, kl_reg, mean_is_ratio, clip_fraction, 1 / n
    results,
    # hyperparameters and sizes
    is_clip, kl_reg_weight, n_rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(values.double() * mask).sum(-1) / mask.double().sum().clamp(min=1)"""
    distill_sum = tl.zeros((BLOCK,), tl.float64)
    anchor_sum = tl.zeros((BLOCK,), tl.float64)
    ratio_sum = tl.zeros((BLOCK,), tl.float64)
    clipped_sum = tl.zeros((BLOCK,), tl.float64)
    mask_sum = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        present = rows < n_rows
        weight = tl.load(mask + rows, mask=present, other=0.0).to(tl.float64)
        r = tl.load(values + 2 * n_rows + rows, mask=present, other=0.0)
        mask_sum += weight
        distill_sum += tl.load(values + rows, mask=present, other=0.0) * weight
        anchor_sum += tl.load(values + n_rows + rows, mask=present, other=0.0) * weight
        ratio_sum += r * weight
        clipped_sum += tl.where(r >= is_clip, weight, 0.0)
    count = tl.sum(mask_sum, 0)
    count = tl.where(count < 1.0, 1.0, count)
    distill_loss = tl.sum(distill_sum, 0) / count
    kl_reg = tl.sum(anchor_sum, 0) / count
    # A weight of 0 switches the anchor off, even where k3 is not finite.
    anchored = tl.where(kl_reg_weight == 0, distill_loss, distill_loss + kl_reg_weight * kl_reg)
    tl.store(results, anchored.to(tl.float32))
    tl.store(results + 1, distill_loss.to(tl.float32))
    tl.store(results + 2, kl_reg.to(tl.float32))
    tl.store(results + 3, (tl.sum(ratio_sum, 0) / count).to(tl.float32))
    tl.store(results + 4, (tl.sum(clipped_sum, 0) / count).to(tl.float32))
    tl.store(results + 5, (1.0 / count).to(tl.float32))


def reduce_tokens(terms: TokenTerms, mask: Tensor, is_clip: float, kl_reg_weight: float) -> Tensor:
    """(6,) float32: loss, distill_loss, kl_reg, mean_is_ratio, clip_fraction, 1/n."""
    n_rows = mask.shape[0]
    results = torch.empty(6, dtype=torch.float32, device=mask.device)
    reduction_kernel[(1,)](
        terms.values, mask, results, is_clip, kl_reg_weight, n_rows,
        BLOCK=min(2**16, next_power_of_2(n_rows)) if INTERPRETED else 1024, num_warps=8,
    )  # fmt: skip
    return results
