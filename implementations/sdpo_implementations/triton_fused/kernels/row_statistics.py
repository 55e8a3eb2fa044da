"""One reading of rows that exist: maximum, sum of exponentials at a temperature, stretches' maxima for a top-k."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.vocabulary_product import SUBTILE
from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import INTERPRETED, ceil_div, next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip


@repeated
@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["counted"])
def row_statistics_kernel(
    # logits (N, V), counted (N,)
    logits, counted,
    # results: of each part of a row (parts, N); of each stretch of SUBTILE columns (N, stretches)
    part_max, part_sum, stretch_max,
    # temperature, sizes, strides
    inverse_temperature, n_rows, vocabulary, n_stretches, stride_logits, per_part,
    ROWS: tl.constexpr, STRETCHES: tl.constexpr, SUBTILE: tl.constexpr, SUMS: tl.constexpr, MAXIMA: tl.constexpr,
):  # fmt: skip
    """part = logits[:, start : start + per_part * SUBTILE]; part_max = part.amax(-1);
    part_sum = ((part - part_max[:, None]) * inverse_temperature).exp().sum(-1);
    stretch_max = logits.unflatten(-1, (-1, SUBTILE)).amax(-1)"""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = rows < n_rows
    read = present & (tl.load(counted + rows, mask=present, other=0.0) != 0)
    wide = rows.to(tl.int64)
    part = tl.program_id(1)
    start = part * per_part
    maximum = tl.full((ROWS, STRETCHES), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, STRETCHES, SUBTILE), tl.float32)
    for first in range(start, tl.minimum(start + per_part, n_stretches), STRETCHES):
        stretches = first + tl.arange(0, STRETCHES)
        columns = stretches[:, None] * SUBTILE + tl.arange(0, SUBTILE)[None, :]
        z = tl.load(
            logits + wide[:, None, None] * stride_logits + columns[None, :, :],
            mask=read[:, None, None] & (columns < vocabulary)[None, :, :], other=float("-inf"),
        ).to(tl.float32)  # fmt: skip
        largest = tl.max(z, 2)
        if MAXIMA:
            tl.store(
                stretch_max + wide[:, None] * n_stretches + stretches[None, :], largest,
                mask=present[:, None] & (stretches < n_stretches)[None, :],
            )  # fmt: skip
        if SUMS:
            # A maximum for each lane of stretches, so that no iteration waits for the whole program.
            larger = tl.maximum(maximum, largest)
            finite = tl.where(larger == float("-inf"), 0.0, larger)
            kept = tl.exp((maximum - finite) * inverse_temperature)
            total = total * kept[:, :, None] + tl.exp((z - finite[:, :, None]) * inverse_temperature)
            maximum = larger
    if SUMS:
        row_maximum = tl.max(maximum, 1)
        finite = tl.where(row_maximum == float("-inf"), 0.0, row_maximum)
        row_total = tl.sum(tl.sum(total, 2) * tl.exp((maximum - finite[:, None]) * inverse_temperature), 1)
        place = part.to(tl.int64) * n_rows + rows
        tl.store(part_max + place, row_maximum, mask=present)
        tl.store(part_sum + place, row_total, mask=present)


@repeated
@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["row_max", "log_sum"])
def combine_parts_kernel(
    # statistics (parts, N)
    part_max, part_sum,
    # results (N,)
    row_max, log_sum,
    # temperature and sizes
    inverse_temperature, n_rows, n_parts,
    ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """row_max = part_max.amax(0);
    log_sum = (part_sum * ((part_max - row_max) * inverse_temperature).exp()).sum(0).log()"""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    parts = tl.arange(0, PARTS)
    places = parts[:, None].to(tl.int64) * n_rows + rows[None, :]
    here = (parts < n_parts)[:, None] & (rows < n_rows)[None, :]
    largest = tl.load(part_max + places, mask=here, other=float("-inf"))
    maximum = tl.max(largest, 0)
    finite = tl.where(maximum == float("-inf"), 0.0, maximum)
    shift = (largest - finite[None, :]) * inverse_temperature
    total = tl.sum(tl.load(part_sum + places, mask=here, other=0.0) * tl.exp(shift), 0)
    tl.store(row_max + rows, finite, mask=rows < n_rows)
    tl.store(log_sum + rows, tl.log(total), mask=rows < n_rows)


@dataclass(frozen=True)
class RowStatistics:
    """log_softmax(z / temperature) = (z - row_max) / temperature - log_sum, each (N,) float32; ``stretch_max``
    (N, V / SUBTILE, rounded up) of the untempered logits, for ``selection``. None: not asked for. Where a row does not
    count, there is nothing to read."""

    row_max: Tensor | None
    log_sum: Tensor | None
    stretch_max: Tensor | None


def row_statistics(
    logits: Tensor, counted: Tensor, temperature: float, sums: bool = True, maxima: bool = False
) -> RowStatistics:
    """Of ``logits`` (N, V), rows contiguous; ``counted`` (N,) float32."""
    n_rows, vocabulary = logits.shape
    device = logits.device
    n_stretches = ceil_div(vocabulary, SUBTILE)
    if INTERPRETED:
        stretches = min(64, next_power_of_2(n_stretches))
        rows, per_part = min(next_power_of_2(n_rows), max(1, 512 // stretches)), n_stretches
    else:
        rows, stretches = 1, 32
        wanted = min(64, max(1, ceil_div(1024, n_rows)))
        per_part = ceil_div(ceil_div(n_stretches, wanted), stretches) * stretches
    n_parts = ceil_div(n_stretches, per_part)
    part_max, part_sum = (
        torch.empty((n_parts, n_rows) if sums else (1,), dtype=torch.float32, device=device) for _ in range(2)
    )
    stretch_max = torch.empty((n_rows, n_stretches) if maxima else (1, 1), dtype=torch.float32, device=device)
    inverse = 1.0 / temperature
    row_statistics_kernel[(ceil_div(n_rows, rows), n_parts)](
        logits, counted, part_max, part_sum, stretch_max, inverse, n_rows, vocabulary, n_stretches,
        logits.stride(0), per_part,
        ROWS=rows, STRETCHES=stretches, SUBTILE=SUBTILE, SUMS=sums, MAXIMA=maxima, num_warps=8,
    )  # fmt: skip
    if not sums:
        return RowStatistics(None, None, stretch_max)
    row_max = torch.empty(n_rows, dtype=torch.float32, device=device)
    log_sum = torch.empty_like(row_max)
    rows = min(256, next_power_of_2(n_rows)) if INTERPRETED else 32
    combine_parts_kernel[(ceil_div(n_rows, rows),)](
        part_max, part_sum, row_max, log_sum, inverse, n_rows, n_parts,
        ROWS=rows, PARTS=next_power_of_2(n_parts), num_warps=4,
    )  # fmt: skip
    return RowStatistics(row_max, log_sum, stretch_max if maxima else None)
