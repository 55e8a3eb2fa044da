"""A divergence between student and teacher over the categories of a support: renormalised, or with a tail.

Between a token's K logits and its divergence lie some hundred numbers, so float64 throughout. Results per token, of D
with respect to the logits before the temperature:

    dD / dz_v = at_support_k where v = S_k, and -pull softmax_v elsewhere

``at_support`` is the whole derivative there, the dense part included: where the student is sure of a token its two
parts cancel, and the difference is taken here, before anything is rounded. ``pull`` is 0 where the support is
renormalised, or where the mass on it is so near 1 that the tail is a constant and D does not move with it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.row_statistics import RowStatistics
from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import INTERPRETED, ceil_div, next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip

TAIL_CLAMP = tl.constexpr(-1e-7)
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
MIXTURE = tl.constexpr(2)


@triton.jit
def _log_sum_exp(x):
    """Along dimension 1."""
    peak = tl.max(x, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    return peak + tl.log(tl.sum(tl.exp(x - peak[:, None]), 1))


@triton.jit
def _tail(log_mass):
    """log of what the support leaves, at least 1 - exp(-1e-7); near there 1 - exp is exact to 1e-9 in float64."""
    return tl.log(1.0 - tl.exp(tl.where(log_mass > TAIL_CLAMP, TAIL_CLAMP, log_mass)))


@triton.jit
def _category(log_q, log_p, alpha, KIND: tl.constexpr):
    """(a category's term of D, dD / d log q), with 0 log 0 = 0. ``alpha`` of a shape that broadcasts."""
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    if KIND == FORWARD_KL:
        term = tl.where(p == 0, 0.0, p * (log_p - log_q))
        moved = -p
    elif KIND == REVERSE_KL:
        term = tl.where(q == 0, 0.0, q * (log_q - log_p))
        moved = term + q
    else:
        log_m = tl.log(alpha * p + (1.0 - alpha) * q)
        moved = (1.0 - alpha) * tl.where(q == 0, 0.0, q * (log_q - log_m))
        term = moved + alpha * tl.where(p == 0, 0.0, p * (log_p - log_m))
    return term, moved


@repeated
@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=[
        "student", "student_max", "student_rest", "teacher", "teacher_max", "teacher_rest", "counted",
        "values", "at_support", "pull",
    ],
)  # fmt: skip
def category_loss_kernel(
    # student: logits at the support (N, K), statistics of their rows (N,)
    student, student_max, student_rest,
    # teacher: logits or log-probs at the support (N, K), statistics of their rows (N,); counted (N,)
    teacher, teacher_max, teacher_rest, counted,
    # results: values (N,), at_support (N, K), pull (N,)
    values, at_support, pull,
    # alpha and temperatures, each as the sum of two floats; sizes
    alpha_high, alpha_low, temperature_high, temperature_low, teacher_high, teacher_low, n_rows, k_support,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, TAIL: tl.constexpr, KIND: tl.constexpr,
    STUDENT_ROWS: tl.constexpr, TEACHER_ROWS: tl.constexpr,
):  # fmt: skip
    """PyTorch, in float64, without STUDENT_ROWS and TEACHER_ROWS with maximum and rest 0:

    a = (student - student_max) / temperature - student_rest; b likewise
    renormalised: log_q, log_p = a.log_softmax(-1), b.log_softmax(-1)
    TAIL: log_q = cat((a, log(-expm1(a.logsumexp(-1).clamp(max=-1e-7))))); log_p likewise
    values = divergence(log_q, log_p); at_support, pull as the module's heading writes them
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = rows < n_rows
    read = present & (tl.load(counted + rows, mask=present, other=0.0) != 0)
    entries = tl.arange(0, ENTRIES)
    stored = present[:, None] & (entries < k_support)[None, :]
    inside = stored & read[:, None]
    places = rows.to(tl.int64)[:, None] * k_support + entries[None, :]
    zero = tl.full((1,), 0.0, tl.float64)
    alpha = zero + alpha_high + alpha_low
    temperature = zero + temperature_high + temperature_low

    # A category that does not exist has probability 0.
    a = tl.load(student + places, mask=inside, other=float("-inf")).to(tl.float64)
    b = tl.load(teacher + places, mask=inside, other=float("-inf")).to(tl.float64)
    if STUDENT_ROWS:
        a = a - tl.load(student_max + rows, mask=read, other=0.0).to(tl.float64)[:, None]
    a = a / temperature[:, None]
    if STUDENT_ROWS:
        a = a - tl.load(student_rest + rows, mask=read, other=0.0).to(tl.float64)[:, None]
    if TEACHER_ROWS:
        b = b - tl.load(teacher_max + rows, mask=read, other=0.0).to(tl.float64)[:, None]
    b = b / (zero + teacher_high + teacher_low)[:, None]
    if TEACHER_ROWS:
        b = b - tl.load(teacher_rest + rows, mask=read, other=0.0).to(tl.float64)[:, None]
    student_mass = _log_sum_exp(a)
    teacher_mass = _log_sum_exp(b)
    if not TAIL:
        a = a - student_mass[:, None]
        b = b - teacher_mass[:, None]

    terms, moved = _category(a, b, alpha[:, None], KIND)
    value = tl.sum(tl.where(inside, terms, 0.0), 1)
    moved = tl.where(inside, moved, 0.0)
    q = tl.where(inside, tl.exp(a), 0.0)
    if TAIL:
        log_rest = _tail(student_mass)
        tail_term, tail_moved = _category(log_rest, _tail(teacher_mass), alpha, KIND)
        value += tail_term
        per_mass = tl.where(student_mass <= TAIL_CLAMP, tail_moved / tl.exp(log_rest), 0.0)
        moved = moved - q * per_mass[:, None]
    total = tl.sum(moved, 1)
    here = (moved - q * total[:, None]) / temperature[:, None]
    tl.store(values + rows, tl.where(read, value, 0.0), mask=present)
    tl.store(at_support + places, tl.where(inside, here, 0.0).to(tl.float32), mask=stored)
    if TAIL:
        tl.store(pull + rows, tl.where(read, total / temperature, 0.0).to(tl.float32), mask=present)


def halves(value: float) -> tuple[float, float]:
    """A float64 as the sum of two float32, which is what a kernel's argument holds."""
    high = ctypes.c_float(value).value
    return high, value - high


@dataclass(frozen=True)
class SupportTerms:
    """Per token: ``values`` (N,) float64, and its derivative by the logits as the module's heading writes it:
    ``at_support`` (N, K) float32 at ``support`` (N, K), ``pull`` (N,) float32, None: 0."""

    values: Tensor
    support: Tensor
    at_support: Tensor
    pull: Tensor | None


def category_terms(
    student: Tensor, student_rows: RowStatistics | None, temperature: float,
    teacher: Tensor, teacher_rows: RowStatistics | None, teacher_temperature: float,
    support: Tensor, counted: Tensor, alpha: float, tail: bool,
) -> SupportTerms:  # fmt: skip
    """``student`` and ``teacher`` (N, K), contiguous: logits with their rows' statistics, or log-probs, and logits of a
    renormalised support, without. ``alpha`` 0 is the forward KL, 1 the reverse KL."""
    n_rows, k_support = support.shape
    device = support.device
    terms = SupportTerms(
        values=torch.empty(n_rows, dtype=torch.float64, device=device),
        support=support,
        at_support=torch.empty((n_rows, k_support), dtype=torch.float32, device=device),
        pull=torch.empty(n_rows, dtype=torch.float32, device=device) if tail else None,
    )
    entries = next_power_of_2(k_support)
    rows = max(1, min(next_power_of_2(n_rows), 2**14 // entries)) if INTERPRETED else max(1, 128 // entries)
    kind = FORWARD_KL if alpha == 0 else REVERSE_KL if alpha == 1 else MIXTURE
    none = counted
    category_loss_kernel[(ceil_div(n_rows, rows),)](
        student, none if student_rows is None else student_rows.row_max,
        none if student_rows is None else student_rows.log_sum,
        teacher, none if teacher_rows is None else teacher_rows.row_max,
        none if teacher_rows is None else teacher_rows.log_sum, counted,
        terms.values, terms.at_support, none if terms.pull is None else terms.pull,
        *halves(alpha), *halves(temperature), *halves(teacher_temperature), n_rows, k_support,
        ROWS=rows, ENTRIES=entries, TAIL=tail, KIND=kind.value,
        STUDENT_ROWS=student_rows is not None, TEACHER_ROWS=teacher_rows is not None,
        num_warps=4 if entries <= 512 else 8,
    )  # fmt: skip
    return terms
