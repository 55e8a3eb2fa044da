"""The gradient by logits, written once: zeros or a dense pull, and K entries of each row over it."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.category_loss import SupportTerms
from sdpo_implementations.triton_fused.kernels.row_statistics import RowStatistics
from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import INTERPRETED, ceil_div, next_power_of_2, storage_dtype

import triton  # isort: skip
import triton.language as tl  # isort: skip


@repeated
@triton.jit(
    do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["row_max", "log_sum", "pull", "scale"],
)  # fmt: skip
def pull_kernel(
    # logits (N, V); per row (N,)
    logits, row_max, log_sum, pull, scale,
    # result (N, V)
    gradient,
    # temperature, sizes, strides
    inverse_temperature, n_rows, vocabulary, stride_logits,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """log_q = (logits - row_max[:, None]) * inverse_temperature - log_sum[:, None];
    gradient = -(scale * pull)[:, None] * log_q.exp()

    Rows without a pull are not read.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    present = rows < n_rows
    here = present[:, None] & (columns < vocabulary)[None, :]
    wide = rows[:, None].to(tl.int64)
    size = tl.load(pull + rows, mask=present, other=0.0) * tl.load(scale + rows, mask=present, other=0.0)
    needed = (size != 0)[:, None]
    z = tl.load(logits + wide * stride_logits + columns[None, :], mask=here & needed, other=0.0).to(tl.float32)
    maximum = tl.load(row_max + rows, mask=present, other=0.0)[:, None]
    rest = tl.load(log_sum + rows, mask=present, other=0.0)[:, None]
    softmax = tl.exp((z - maximum) * inverse_temperature - rest)
    tl.store(
        gradient + wide * vocabulary + columns[None, :],
        tl.where(needed, -size[:, None] * softmax, 0.0).to(gradient.dtype.element_ty), mask=here,
    )  # fmt: skip


@repeated
@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["support", "at_support", "scale"])
def entries_kernel(
    # support, at_support (N, K), scale (N,)
    support, at_support, scale,
    # gradient (N, V), already filled
    gradient,
    # sizes
    n_rows, k_support, vocabulary,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """gradient.scatter_(-1, support, scale[:, None] * at_support)"""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    entries = tl.arange(0, ENTRIES)
    present = rows < n_rows
    wide = rows[:, None].to(tl.int64)
    size = tl.load(scale + rows, mask=present, other=0.0)[:, None]
    inside = (size != 0) & (entries < k_support)[None, :]
    token = tl.load(support + wide * k_support + entries[None, :], mask=inside, other=-1).to(tl.int64)
    inside = inside & (token >= 0) & (token < vocabulary)
    value = tl.load(at_support + wide * k_support + entries[None, :], mask=inside, other=0.0) * size
    tl.store(gradient + wide * vocabulary + token, value.to(gradient.dtype.element_ty), mask=inside)


def row_gradient(
    logits: Tensor | None, rows: RowStatistics | None, temperature: float, terms: SupportTerms, scale: Tensor,
    shape: tuple[int, int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(N, V) of ``shape`` in the storage form of ``dtype``; ``scale`` (N,) float32: the incoming gradient, 0 where a
    row does not count. ``logits`` and ``rows`` where ``terms`` has a pull, with the temperature it is of."""
    n_rows, vocabulary = shape
    device = scale.device
    k_support = terms.support.shape[1]
    if terms.pull is None:
        gradient = torch.zeros(shape, dtype=storage_dtype(dtype), device=device)
    else:
        assert logits is not None
        assert rows is not None
        gradient = torch.empty(shape, dtype=storage_dtype(dtype), device=device)
        block, columns = (
            (min(32, next_power_of_2(n_rows)), min(1024, next_power_of_2(vocabulary))) if INTERPRETED else (1, 4096)
        )
        pull_kernel[(ceil_div(n_rows, block), ceil_div(vocabulary, columns))](
            logits, rows.row_max, rows.log_sum, terms.pull, scale, gradient, 1.0 / temperature, n_rows, vocabulary,
            logits.stride(0), ROWS=block, COLUMNS=columns, num_warps=8,
        )  # fmt: skip
    entries = next_power_of_2(k_support)
    block = max(1, min(next_power_of_2(n_rows), (2**14 if INTERPRETED else 128) // entries))
    entries_kernel[(ceil_div(n_rows, block),)](
        terms.support, terms.at_support, scale, gradient, n_rows, k_support, vocabulary,
        ROWS=block, ENTRIES=entries, num_warps=4,
    )  # fmt: skip
    return gradient
