"""Everything between a token's few logits and its loss: divergence, importance ratio, anchor, their slopes.

Some hundred numbers a token, so float64 throughout: a divergence of near-equal distributions, an alpha of
1e-6 and a ratio of e^-20 cost nothing extra to get right.

The gradient of a token's loss with respect to its logits is written as

    sum_k support_weight_k [v = S_k]  +  chosen_weight ([v = y] - softmax_v)  -  floor_weight softmax_v

``chosen_weight`` gathers what acts through l[y] (the anchor, the reverse-KL surrogate); ``floor_weight`` is 0
but where the student's mass on the support is below the floor, and only there does the divergence reach
beyond the support.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import INTERPRETED, ceil_div, next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip

LOG_CLAMP = tl.constexpr(20.0)
MASS_FLOOR = tl.constexpr(1e-8)
LOG_MASS_FLOOR = tl.constexpr(math.log(1e-8))
ABSENT_LOGPROB = tl.constexpr(-20.0)


@triton.jit
def _clamp(x, LIMIT: tl.constexpr):
    """To +-LIMIT, NaN staying NaN."""
    return tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))


@triton.jit
def _renormalise(logprobs, LOG_FLOOR: tl.constexpr):
    """(log of exp(x) / max(sum exp(x), floor), log of the sum), along dimension 1."""
    peak = tl.max(logprobs, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    log_mass = peak + tl.log(tl.sum(tl.exp(logprobs - peak[:, None]), 1))
    return logprobs - tl.where(log_mass < LOG_FLOOR, LOG_FLOOR, log_mass)[:, None], log_mass


@repeated
@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=[
        "support_logits", "chosen_logits", "row_max", "log_sum", "teacher_logprobs", "support", "response_ids",
        "mask", "old", "base", "values", "slopes", "support_weight", "floor_rows",
    ],
)  # fmt: skip
def token_loss_kernel(
    # student: support_logits (N, K) of a given row stride, the rest (N,)
    support_logits, chosen_logits, row_max, log_sum,
    # teacher and policy: teacher_logprobs, support (N, K), the rest (N,)
    teacher_logprobs, support, response_ids, mask, old, base,
    # results: values, slopes (3, N), support_weight (N, K), floor_rows (N,), floor_count (1,)
    values, slopes, support_weight, floor_rows, floor_count,
    # hyperparameters, sizes, strides
    alpha_high, alpha_low, is_clip, kl_reg_weight, n_rows, k_support, stride_support, stride_chosen,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, REVERSE_KL: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """PyTorch: CLaaS's compute_sdpo_loss in float64 on l[S] = support_logits - logsumexp, up to the mean, and its
    derivatives as the module's heading writes them."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wide = rows.to(tl.int64)
    present = rows < n_rows
    weight = tl.load(mask + rows, mask=present, other=0.0).to(tl.float64)
    read = present & (weight != 0)
    entries = tl.arange(0, ENTRIES)
    inside = read[:, None] & (entries < k_support)[None, :]
    places = wide[:, None] * k_support + entries[None, :]

    maximum = tl.load(row_max + rows, mask=read, other=0.0).to(tl.float64)
    rest = tl.load(log_sum + rows, mask=read, other=0.0).to(tl.float64)
    tau = tl.load(teacher_logprobs + places, mask=inside, other=float("-inf")).to(tl.float64)

    r = tl.full((ROWS,), 1.0, tl.float64)
    k3 = tl.zeros((ROWS,), tl.float64)
    k3_slope = tl.zeros((ROWS,), tl.float64)
    chosen = tl.zeros((ROWS,), tl.float64)
    if POLICY:
        z_chosen = tl.load(chosen_logits + wide * stride_chosen, mask=read, other=0.0)
        chosen = (z_chosen.to(tl.float64) - maximum) - rest
        behaviour = tl.load(old + rows, mask=read, other=0.0).to(tl.float64)
        r = tl.exp(_clamp(chosen - behaviour, LOG_CLAMP))
        r = tl.where(r > is_clip, is_clip, r)
        drift = chosen - tl.load(base + rows, mask=read, other=0.0).to(tl.float64)
        d = _clamp(drift, LOG_CLAMP)
        k3 = tl.exp(d) - 1.0 - d
        k3_slope = tl.where(d == drift, tl.exp(d) - 1.0, 0.0)

    if REVERSE_KL:
        y = tl.load(response_ids + rows, mask=read, other=0).to(tl.int64)
        match = inside & (tl.load(support + places, mask=inside, other=-1).to(tl.int64) == y[:, None])
        found = tl.sum(tl.where(match, tau, 0.0), 1)
        slope = chosen - tl.where(tl.max(match.to(tl.int32), 1) > 0, found, ABSENT_LOGPROB)
        divergence = slope * chosen
        floor = tl.zeros((ROWS,), tl.float64)
    else:
        alpha = tl.full((1, 1), 0.0, tl.float64) + alpha_high + alpha_low
        z = tl.load(
            support_logits + wide[:, None] * stride_support + entries[None, :], mask=inside, other=float("-inf")
        )
        log_p, _ = _renormalise(tau, LOG_MASS_FLOOR)
        log_q, student_log_mass = _renormalise((z.to(tl.float64) - maximum[:, None]) - rest[:, None], LOG_MASS_FLOOR)
        p = tl.exp(log_p)
        q = tl.exp(log_q)
        log_m = tl.log(alpha * p + (1.0 - alpha) * q)
        teacher_terms = tl.where(p == 0, 0.0, alpha * p * (log_p - log_m))
        gradient = tl.where(q == 0, 0.0, (1.0 - alpha) * (log_q - log_m))
        push = q * gradient
        total = tl.sum(push, 1)
        # An empty mixture is alpha = 0: exactly nothing, rather than the rounding of log(exp(x)).
        active = alpha > 0
        divergence = tl.sum(tl.where(active, teacher_terms + push, 0.0), 1)
        on_floor = student_log_mass < LOG_MASS_FLOOR
        at_support = tl.where(on_floor[:, None], push, q * (gradient - total[:, None]))
        at_support = tl.where(active & inside, at_support, 0.0)
        tl.store(
            support_weight + places, at_support.to(tl.float32), mask=present[:, None] & (entries < k_support)[None, :]
        )
        floor = tl.where(on_floor & read, tl.sum(tl.where(active, push, 0.0), 1), 0.0)
        slope = tl.zeros((ROWS,), tl.float64)

    used = r * weight
    floor = tl.where(read, floor * used, 0.0)
    tl.store(values + rows, tl.where(read, divergence * r, 0.0), mask=present)
    tl.store(values + n_rows + rows, tl.where(read, k3, 0.0), mask=present)
    tl.store(values + 2 * n_rows + rows, tl.where(read, r, 0.0), mask=present)
    through_chosen = tl.where(read, used * slope + kl_reg_weight * weight * k3_slope, 0.0)
    tl.store(slopes + rows, tl.where(read, used, 0.0).to(tl.float32), mask=present)
    tl.store(slopes + n_rows + rows, through_chosen.to(tl.float32), mask=present)
    tl.store(slopes + 2 * n_rows + rows, floor.to(tl.float32), mask=present)
    if not REVERSE_KL:
        listed = floor.to(tl.float32) != 0
        place = tl.atomic_add(floor_count + rows * 0, 1, mask=listed)
        tl.store(floor_rows + place, rows, mask=listed)


@dataclass(frozen=True)
class PolicyTerms:
    """What makes a divergence the SDPO loss. Tensors (N,)."""

    response_ids: Tensor
    old_student_logprobs: Tensor
    base_logprobs: Tensor
    is_clip: float
    kl_reg_weight: float


@dataclass(frozen=True)
class TokenTerms:
    """Per token, before the mean; zeros where the mask is 0.

    ``values`` (3, N) float64: D r, k3, r. Slopes are float32 and include the mask, not 1/n:
    ``support_weight`` (N, K) is per unit of ``support_scale`` = r mask (N,), and None where no support takes
    part; ``chosen_weight`` and ``floor_weight`` (N,). ``floor_rows`` (N,) lists, in any order, the
    ``floor_count`` (1,) rows with floor_weight != 0.
    """

    values: Tensor
    slopes: Tensor
    support_weight: Tensor | None
    floor_rows: Tensor
    floor_count: Tensor

    @cached_property
    def _each_slope(self) -> tuple[Tensor, ...]:
        return self.slopes.unbind()

    @property
    def support_scale(self) -> Tensor:
        return self._each_slope[0]

    @property
    def chosen_weight(self) -> Tensor:
        return self._each_slope[1]

    @property
    def floor_weight(self) -> Tensor:
        return self._each_slope[2]


def token_terms(
    support_logits: Tensor | None, chosen_logits: Tensor, row_max: Tensor, log_sum: Tensor,
    teacher_logprobs: Tensor, support: Tensor, mask: Tensor, alpha: float, policy: PolicyTerms | None,
) -> TokenTerms:  # fmt: skip
    """``support_logits`` (N, K) of any row stride, None for alpha >= 1; ``chosen_logits`` (N,) of any stride;
    ``teacher_logprobs`` contiguous, in any shape; ``mask`` float32."""
    n_rows, k_support = support.shape
    device = support.device
    reverse_kl = alpha >= 1
    terms = TokenTerms(
        values=torch.empty((3, n_rows), dtype=torch.float64, device=device),
        slopes=torch.empty((3, n_rows), dtype=torch.float32, device=device),
        support_weight=None if reverse_kl else torch.empty(support.shape, dtype=torch.float32, device=device),
        floor_rows=torch.empty(n_rows, dtype=torch.int32, device=device),
        floor_count=torch.zeros(1, dtype=torch.int32, device=device),
    )
    entries = next_power_of_2(k_support)
    rows = max(1, min(next_power_of_2(n_rows), 2**14 // entries)) if INTERPRETED else max(1, 128 // entries)
    alpha_high = ctypes.c_float(alpha).value
    unused = mask
    token_loss_kernel[(ceil_div(n_rows, rows),)](
        unused if support_logits is None else support_logits, chosen_logits, row_max, log_sum,
        teacher_logprobs, support, unused if policy is None else policy.response_ids, mask,
        unused if policy is None else policy.old_student_logprobs, unused if policy is None else policy.base_logprobs,
        terms.values, terms.slopes, terms.slopes if terms.support_weight is None else terms.support_weight,
        terms.floor_rows, terms.floor_count,
        alpha_high, alpha - alpha_high, math.inf if policy is None else policy.is_clip,
        0.0 if policy is None else policy.kl_reg_weight, n_rows, k_support,
        0 if support_logits is None else support_logits.stride(0), chosen_logits.stride(0),
        ROWS=rows, ENTRIES=entries, REVERSE_KL=reverse_kl, POLICY=policy is not None,
        num_warps=4 if entries <= 512 else 8,
    )  # fmt: skip
    return terms
