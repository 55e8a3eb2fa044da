"""The forward KL over the teacher's support with both sides' log-probs clamped from below, not renormalised.

    D = sum_k P_k (b'_k - a'_k),   a' = max(a, c), b' = max(b, c), P = exp b'
    dD / dz'_v = sum_{k: a_k >= c} P_k (softmax_v - [v = S_k])

before any bound of D itself: so w_k = -P_k [a_k >= c] at the support, and a dense pull sum_k w_k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.category_loss import SupportTerms, halves
from sdpo_implementations.triton_fused.kernels.row_statistics import RowStatistics
from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import INTERPRETED, ceil_div, next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip


@repeated
@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=[
        "student", "student_max", "student_rest", "teacher", "counted", "values", "at_support", "pull",
    ],
)  # fmt: skip
def clamped_loss_kernel(
    # student: logits at the support (N, K), statistics of their rows (N,)
    student, student_max, student_rest,
    # teacher's log-probs (N, K); counted (N,)
    teacher, counted,
    # results: values (3, N): D, both masses; at_support (N, K), pull (N,)
    values, at_support, pull,
    # lowest log-prob and temperature, each as the sum of two floats; sizes
    lowest_high, lowest_low, temperature_high, temperature_low, n_rows, k_support,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """PyTorch, in float64:

    a = (student - student_max) / temperature - student_rest; b = teacher.clamp(min=lowest)
    D = (b.exp() * (b - a.clamp(min=lowest))).sum(-1); masses = a.exp().sum(-1), teacher.exp().sum(-1)
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = rows < n_rows
    read = present & (tl.load(counted + rows, mask=present, other=0.0) != 0)
    entries = tl.arange(0, ENTRIES)
    stored = present[:, None] & (entries < k_support)[None, :]
    inside = stored & read[:, None]
    places = rows.to(tl.int64)[:, None] * k_support + entries[None, :]
    zero = tl.full((1,), 0.0, tl.float64)
    lowest = (zero + lowest_high + lowest_low)[:, None]
    temperature = zero + temperature_high + temperature_low

    a = tl.load(student + places, mask=inside, other=0.0).to(tl.float64)
    a = (a - tl.load(student_max + rows, mask=read, other=0.0).to(tl.float64)[:, None]) / temperature[:, None]
    a = a - tl.load(student_rest + rows, mask=read, other=0.0).to(tl.float64)[:, None]
    b = tl.load(teacher + places, mask=inside, other=0.0).to(tl.float64)
    q = tl.where(inside, tl.exp(a), 0.0)
    clamped = tl.where(b < lowest, lowest, b)
    p = tl.exp(clamped)
    terms = tl.where(p == 0, 0.0, p * (clamped - tl.where(a < lowest, lowest, a)))
    moved = tl.where(inside & (a >= lowest), -p, 0.0)
    total = tl.sum(moved, 1)
    here = (moved - q * total[:, None]) / temperature[:, None]
    tl.store(values + rows, tl.sum(tl.where(inside, terms, 0.0), 1), mask=present)
    tl.store(values + n_rows + rows, tl.sum(q, 1), mask=present)
    tl.store(values + 2 * n_rows + rows, tl.sum(tl.where(inside, tl.exp(b), 0.0), 1), mask=present)
    tl.store(at_support + places, here.to(tl.float32), mask=stored)
    tl.store(pull + rows, (total / temperature).to(tl.float32), mask=present)


@dataclass(frozen=True)
class ClampedTerms:
    """``terms`` of D before its floor and cap; masses of student and teacher on the support, unclamped, (N,)."""

    terms: SupportTerms
    student_mass: Tensor
    teacher_mass: Tensor


def clamped_terms(
    student: Tensor, student_rows: RowStatistics, temperature: float, teacher: Tensor, support: Tensor,
    counted: Tensor, lowest: float | None,
) -> ClampedTerms:  # fmt: skip
    """``student`` logits and ``teacher`` log-probs (N, K), contiguous; ``lowest`` None: no clamp."""
    n_rows, k_support = support.shape
    device = support.device
    values = torch.empty((3, n_rows), dtype=torch.float64, device=device)
    at_support = torch.empty((n_rows, k_support), dtype=torch.float32, device=device)
    pull = torch.empty(n_rows, dtype=torch.float32, device=device)
    entries = next_power_of_2(k_support)
    rows = max(1, min(next_power_of_2(n_rows), 2**14 // entries)) if INTERPRETED else max(1, 128 // entries)
    clamp = (-math.inf, 0.0) if lowest is None else halves(lowest)
    clamped_loss_kernel[(ceil_div(n_rows, rows),)](
        student, student_rows.row_max, student_rows.log_sum, teacher, counted, values, at_support, pull,
        *clamp, *halves(temperature), n_rows, k_support,
        ROWS=rows, ENTRIES=entries, num_warps=4 if entries <= 512 else 8,
    )  # fmt: skip
    return ClampedTerms(SupportTerms(values[0], support, at_support, pull), values[1], values[2])
