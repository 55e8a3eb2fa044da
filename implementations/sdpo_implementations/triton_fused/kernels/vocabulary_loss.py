"""A divergence over the whole vocabulary: both rows are read once for their statistics, and once here; in the backward
once more.

Where one side's vocabulary is shorter, the other's logits stand in for the missing ones, as ms-swift has it: a student
without the teacher's last ids takes its logits as constants, a teacher without the student's takes the student's, and
then the gradient passes through the teacher as well.

    dD / dz'_v = h_v - q_v sum h   [+ u_v - p_v sum u where v is borrowed],   h = dD / d log q, u = dD / d log p
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.category_loss import FORWARD_KL, MIXTURE, REVERSE_KL
from sdpo_implementations.triton_fused.kernels.row_statistics import RowStatistics
from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import INTERPRETED, ceil_div, next_power_of_2, storage_dtype

import triton  # isort: skip
import triton.language as tl  # isort: skip


@triton.jit
def _log_mixture(log_q, log_p, alpha, complement):
    """log(alpha p + complement q), from the larger of the two: neither exponential has to be a normal number."""
    larger = tl.maximum(log_q, log_p)
    finite = tl.where(larger == float("-inf"), 0.0, larger)
    return finite + tl.log(alpha * tl.exp(log_p - finite) + complement * tl.exp(log_q - finite))


@triton.jit
def _shares(log_q, log_p, alpha, complement, KIND: tl.constexpr):
    """(term of D, dD / d log q, dD / d log p) of a category, with 0 log 0 = 0."""
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    if KIND == FORWARD_KL:
        term = tl.where(p == 0, 0.0, p * (log_p - log_q))
        through_q = -p
        through_p = term + p
    elif KIND == REVERSE_KL:
        term = tl.where(q == 0, 0.0, q * (log_q - log_p))
        through_q = term + q
        through_p = -q
    else:
        log_m = _log_mixture(log_q, log_p, alpha, complement)
        through_q = complement * tl.where(q == 0, 0.0, q * (log_q - log_m))
        through_p = alpha * tl.where(p == 0, 0.0, p * (log_p - log_m))
        term = through_q + through_p
    return term, through_q, through_p


@triton.jit
def _two_rows(student, teacher, columns, vocabulary, teacher_vocabulary, read):
    """(z, x) float32 of both sides on one vocabulary, (ROWS, COLUMNS), -inf beyond it. ``student`` and ``teacher``:
    pointers to the first column of each row (ROWS, 1); ``columns`` (1, COLUMNS)."""
    z = tl.load(student + columns, mask=read & (columns < vocabulary), other=float("-inf")).to(tl.float32)
    x = tl.load(teacher + columns, mask=read & (columns < teacher_vocabulary), other=float("-inf")).to(tl.float32)
    return tl.where(columns < vocabulary, z, x), tl.where(columns < teacher_vocabulary, x, z)


@repeated
@triton.jit(
    do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["counted", "teacher_rows"],
)  # fmt: skip
def extended_statistics_kernel(
    # logits (N, V) and (M, V_t); teacher_rows (N,): which row of the teacher's; counted (N,)
    student, teacher, teacher_rows, counted,
    # results (N,)
    student_max, student_rest, teacher_max, teacher_rest,
    # temperature, sizes, strides
    inverse_temperature, n_rows, vocabulary, teacher_vocabulary, stride_student, stride_teacher,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """z, x = both sides' logits on one vocabulary; max = z.amax(-1);
    rest = ((z - max[:, None]) * inverse_temperature).exp().sum(-1).log(); x likewise"""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = rows < n_rows
    read = present & (tl.load(counted + rows, mask=present, other=0.0) != 0)
    other_rows = tl.load(teacher_rows + rows, mask=read, other=0).to(tl.int64)
    student_rows = student + rows[:, None].to(tl.int64) * stride_student
    teacher_start = teacher + other_rows[:, None] * stride_teacher
    z_max = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    x_max = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    z_total = tl.zeros((ROWS, COLUMNS), tl.float32)
    x_total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, tl.maximum(vocabulary, teacher_vocabulary), COLUMNS):
        columns = (start + tl.arange(0, COLUMNS))[None, :]
        z, x = _two_rows(student_rows, teacher_start, columns, vocabulary, teacher_vocabulary, read[:, None])
        larger = tl.maximum(z_max, z)
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        z_total = z_total * tl.exp((z_max - finite) * inverse_temperature) + tl.exp((z - finite) * inverse_temperature)
        z_max = larger
        larger = tl.maximum(x_max, x)
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        x_total = x_total * tl.exp((x_max - finite) * inverse_temperature) + tl.exp((x - finite) * inverse_temperature)
        x_max = larger
    largest = tl.max(z_max, 1)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(z_total * tl.exp((z_max - finite[:, None]) * inverse_temperature), 1)
    tl.store(student_max + rows, finite, mask=present)
    tl.store(student_rest + rows, tl.log(total), mask=present)
    largest = tl.max(x_max, 1)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(x_total * tl.exp((x_max - finite[:, None]) * inverse_temperature), 1)
    tl.store(teacher_max + rows, finite, mask=present)
    tl.store(teacher_rest + rows, tl.log(total), mask=present)


@repeated
@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=[
        "counted", "teacher_rows", "student_max", "student_rest", "teacher_max", "teacher_rest",
    ],
)  # fmt: skip
def vocabulary_loss_kernel(
    # logits (N, V) and (M, V_t); teacher_rows (N,): which row of the teacher's; counted (N,)
    student, teacher, teacher_rows, counted,
    # statistics of both sides' rows (N,)
    student_max, student_rest, teacher_max, teacher_rest,
    # results (3, N): D, sum h, sum u
    values,
    # alpha, 1 - alpha, temperature, sizes, strides
    alpha, complement, inverse_temperature, n_rows, vocabulary, teacher_vocabulary, stride_student, stride_teacher,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """D = divergence(log_q, log_p).sum(-1) of log_q = (z - student_max) * inverse_temperature - student_rest, log_p
    likewise, and the sums of its derivatives by log_q and log_p; float32 terms, summed in float64"""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = rows < n_rows
    read = present & (tl.load(counted + rows, mask=present, other=0.0) != 0)
    other_rows = tl.load(teacher_rows + rows, mask=read, other=0).to(tl.int64)
    student_rows = student + rows[:, None].to(tl.int64) * stride_student
    teacher_start = teacher + other_rows[:, None] * stride_teacher
    z_max = tl.load(student_max + rows, mask=read, other=0.0)[:, None]
    z_rest = tl.load(student_rest + rows, mask=read, other=0.0)[:, None]
    x_max = tl.load(teacher_max + rows, mask=read, other=0.0)[:, None]
    x_rest = tl.load(teacher_rest + rows, mask=read, other=0.0)[:, None]
    width = tl.maximum(vocabulary, teacher_vocabulary)
    value = tl.zeros((ROWS, COLUMNS), tl.float64)
    through_q = tl.zeros((ROWS, COLUMNS), tl.float64)
    through_p = tl.zeros((ROWS, COLUMNS), tl.float64)
    for start in range(0, width, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS))[None, :]
        z, x = _two_rows(student_rows, teacher_start, columns, vocabulary, teacher_vocabulary, read[:, None])
        term, of_q, of_p = _shares(
            (z - z_max) * inverse_temperature - z_rest, (x - x_max) * inverse_temperature - x_rest,
            alpha, complement, KIND,
        )  # fmt: skip
        inside = read[:, None] & (columns < width)
        value += tl.where(inside, term, 0.0).to(tl.float64)
        through_q += tl.where(inside, of_q, 0.0).to(tl.float64)
        through_p += tl.where(inside, of_p, 0.0).to(tl.float64)
    tl.store(values + rows, tl.sum(value, 1), mask=present)
    tl.store(values + n_rows + rows, tl.sum(through_q, 1), mask=present)
    tl.store(values + 2 * n_rows + rows, tl.sum(through_p, 1), mask=present)


@repeated
@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=[
        "scale", "teacher_rows", "student_max", "student_rest", "teacher_max", "teacher_rest",
    ],
)  # fmt: skip
def vocabulary_gradient_kernel(
    # logits (N, V) and (M, V_t); teacher_rows (N,): which row of the teacher's; scale (N,)
    student, teacher, teacher_rows, scale,
    # statistics of both sides' rows (N,); values (3, N) of the forward
    student_max, student_rest, teacher_max, teacher_rest, values,
    # result (N, V)
    gradient,
    # alpha, 1 - alpha, temperature, sizes, strides
    alpha, complement, inverse_temperature, n_rows, vocabulary, teacher_vocabulary, stride_student, stride_teacher,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr, BORROWS: tl.constexpr,
):  # fmt: skip
    """gradient = scale[:, None] * inverse_temperature * (h - q * h.sum(-1)), and u - p * u.sum(-1) where BORROWS from
    column teacher_vocabulary on"""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    present = rows < n_rows
    size = tl.load(scale + rows, mask=present, other=0.0)
    read = present & (size != 0)
    other_rows = tl.load(teacher_rows + rows, mask=read, other=0).to(tl.int64)
    student_rows = student + rows[:, None].to(tl.int64) * stride_student
    teacher_start = teacher + other_rows[:, None] * stride_teacher
    z, x = _two_rows(student_rows, teacher_start, columns, vocabulary, teacher_vocabulary, read[:, None])
    z = z - tl.load(student_max + rows, mask=read, other=0.0)[:, None]
    x = x - tl.load(teacher_max + rows, mask=read, other=0.0)[:, None]
    log_q = z * inverse_temperature - tl.load(student_rest + rows, mask=read, other=0.0)[:, None]
    log_p = x * inverse_temperature - tl.load(teacher_rest + rows, mask=read, other=0.0)[:, None]
    _, of_q, of_p = _shares(log_q, log_p, alpha, complement, KIND)
    total = tl.load(values + n_rows + rows, mask=read, other=0.0).to(tl.float32)[:, None]
    slope = of_q - tl.exp(log_q) * total
    if BORROWS:
        total = tl.load(values + 2 * n_rows + rows, mask=read, other=0.0).to(tl.float32)[:, None]
        slope = slope + tl.where(columns >= teacher_vocabulary, of_p - tl.exp(log_p) * total, 0.0)
    slope = tl.where(read[:, None], slope * (size * inverse_temperature)[:, None], 0.0)
    tl.store(
        gradient + rows[:, None].to(tl.int64) * vocabulary + columns, slope.to(gradient.dtype.element_ty),
        mask=present[:, None] & (columns < vocabulary),
    )  # fmt: skip


@dataclass(frozen=True)
class Sides:
    """Both sides of N tokens. ``student`` (N, V), ``teacher`` (M, V_t), rows contiguous; ``teacher_rows`` (N,) int64
    which of its rows belongs to a token; ``of_student``, ``of_teacher``: statistics (N,) of each side."""

    student: Tensor
    teacher: Tensor
    teacher_rows: Tensor
    of_student: RowStatistics
    of_teacher: RowStatistics
    alpha: float
    temperature: float


def _kind(alpha: float) -> int:
    kind: int = (FORWARD_KL if alpha == 0 else REVERSE_KL if alpha == 1 else MIXTURE).value
    return kind


def two_sides(
    student: Tensor, teacher: Tensor, teacher_rows: Tensor, counted: Tensor, alpha: float, temperature: float
) -> Sides:
    """Read both sides once, for their statistics."""
    n_rows, vocabulary = student.shape
    statistics = [torch.empty(n_rows, dtype=torch.float32, device=student.device) for _ in range(4)]
    rows, columns = _block(n_rows, max(vocabulary, teacher.shape[1]), 2048)
    extended_statistics_kernel[(ceil_div(n_rows, rows),)](
        student, teacher, teacher_rows, counted, *statistics, 1.0 / temperature, n_rows, vocabulary, teacher.shape[1],
        student.stride(0), teacher.stride(0), ROWS=rows, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    z_max, z_rest, x_max, x_rest = statistics
    return Sides(
        student, teacher, teacher_rows, RowStatistics(z_max, z_rest, None), RowStatistics(x_max, x_rest, None),
        alpha, temperature,
    )  # fmt: skip


def _block(n_rows: int, width: int, columns: int) -> tuple[int, int]:
    if INTERPRETED:
        return min(32, next_power_of_2(n_rows)), min(1024, next_power_of_2(width))
    return 1, columns


def _arguments(sides: Sides) -> tuple[float | int, ...]:
    return (
        sides.alpha, 1.0 - sides.alpha, 1.0 / sides.temperature, *sides.student.shape, sides.teacher.shape[1],
        sides.student.stride(0), sides.teacher.stride(0),
    )  # fmt: skip


def vocabulary_values(sides: Sides, counted: Tensor) -> Tensor:
    """(3, N) float64: D, and the sums of its derivatives by log q and log p; 0 where a row does not count."""
    n_rows, vocabulary = sides.student.shape
    values = torch.empty((3, n_rows), dtype=torch.float64, device=sides.student.device)
    rows, columns = _block(n_rows, max(vocabulary, sides.teacher.shape[1]), 1024)
    vocabulary_loss_kernel[(ceil_div(n_rows, rows),)](
        sides.student, sides.teacher, sides.teacher_rows, counted,
        sides.of_student.row_max, sides.of_student.log_sum, sides.of_teacher.row_max, sides.of_teacher.log_sum,
        values, *_arguments(sides), ROWS=rows, COLUMNS=columns, KIND=_kind(sides.alpha), num_warps=8,
    )  # fmt: skip
    return values


def vocabulary_gradient(sides: Sides, values: Tensor, scale: Tensor) -> Tensor:
    """(N, V) in the storage form of the student's dtype; ``scale`` (N,) float32, 0 where a row does not count."""
    n_rows, vocabulary = sides.student.shape
    dtype = storage_dtype(sides.student.dtype)
    gradient = torch.empty((n_rows, vocabulary), dtype=dtype, device=sides.student.device)
    rows, columns = _block(n_rows, vocabulary, 2048)
    vocabulary_gradient_kernel[(ceil_div(n_rows, rows), ceil_div(vocabulary, columns))](
        sides.student, sides.teacher, sides.teacher_rows, scale,
        sides.of_student.row_max, sides.of_student.log_sum, sides.of_teacher.row_max, sides.of_teacher.log_sum,
        values, gradient, *_arguments(sides), ROWS=rows, COLUMNS=columns, KIND=_kind(sides.alpha),
        BORROWS=sides.teacher.shape[1] < vocabulary, num_warps=8,
    )  # fmt: skip
    return gradient
