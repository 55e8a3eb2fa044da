"""The entry from logits: logsumexp of rows that exist, their entries at the support, and their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.logsumexp import combine
from sdpo_implementations.triton_fused.kernels.token_loss import TokenTerms
from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import INTERPRETED, ceil_div, next_power_of_2, storage_dtype

import triton  # isort: skip
import triton.language as tl  # isort: skip


@repeated
@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["counted"])
def logits_statistics_kernel(
    # logits (N, V), counted (N,)
    logits, counted,
    # result: of each stretch of per_part columns, (2, parts, N)
    statistics,
    # sizes and strides
    n_rows, vocabulary, stride_logits, per_part,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """part = logits[:, start:stop]; m = part.amax(-1); statistics = stack([m, (part - m[:, None]).exp().sum(-1)])"""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    read = (rows < n_rows) & (tl.load(counted + rows, mask=rows < n_rows, other=0.0) != 0)
    part = tl.program_id(1)
    start = part * per_part
    stop = tl.minimum(start + per_part, vocabulary)
    maximum = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for column in range(start, stop, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        z = tl.load(
            logits + rows[:, None].to(tl.int64) * stride_logits + columns[None, :],
            mask=read[:, None] & (columns < stop)[None, :], other=float("-inf"),
        ).to(tl.float32)  # fmt: skip
        larger = tl.maximum(maximum, z)
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(maximum - finite) + tl.exp(z - finite)
        maximum = larger
    row_maximum = tl.max(maximum, 1)
    finite = tl.where(row_maximum == float("-inf"), 0.0, row_maximum)
    row_total = tl.sum(total * tl.exp(maximum - finite[:, None]), 1)
    place = statistics + part.to(tl.int64) * n_rows + rows
    tl.store(place, row_maximum, mask=rows < n_rows)
    tl.store(place + n_rows.to(tl.int64) * tl.num_programs(1), row_total, mask=rows < n_rows)


def logits_logsumexp(logits: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """(row_max, log_sum), each (N,) float32, of logits (N, V)."""
    n_rows, vocabulary = logits.shape
    device = logits.device
    rows, columns = (
        (min(32, next_power_of_2(n_rows)), min(1024, next_power_of_2(vocabulary))) if INTERPRETED else (1, 2048)
    )
    per_part = (
        vocabulary if INTERPRETED else ceil_div(ceil_div(vocabulary, max(1, ceil_div(1024, n_rows))), columns) * columns
    )
    parts = ceil_div(vocabulary, per_part)
    statistics = torch.empty((2, parts, n_rows), dtype=torch.float32, device=device)
    logits_statistics_kernel[(ceil_div(n_rows, rows), parts)](
        logits, counted, statistics, n_rows, vocabulary, logits.stride(0), per_part,
        ROWS=rows, COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    row_max = torch.empty(n_rows, dtype=torch.float32, device=device)
    log_sum = torch.empty_like(row_max)
    combine(statistics, counted, row_max, log_sum)
    return row_max, log_sum


@repeated
@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["counted", "token_ids", "token_logits"])
def pick_tokens_kernel(
    # logits (N, V), counted (N,), token_ids (N, K)
    logits, counted, token_ids,
    # result (N, K); NaN where an id lies outside the vocabulary
    token_logits,
    # sizes and strides
    n_rows, n_entries, vocabulary, stride_logits,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """token_logits = logits.gather(-1, token_ids).float()"""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    entries = tl.arange(0, ENTRIES)
    read = (rows < n_rows) & (tl.load(counted + rows, mask=rows < n_rows, other=0.0) != 0)
    wide = rows[:, None].to(tl.int64)
    wanted = read[:, None] & (entries < n_entries)[None, :]
    token = tl.load(token_ids + wide * n_entries + entries[None, :], mask=wanted, other=0).to(tl.int64)
    valid = wanted & (token >= 0) & (token < vocabulary)
    z = tl.load(logits + wide * stride_logits + token, mask=valid, other=float("nan"))
    tl.store(token_logits + wide * n_entries + entries[None, :], z.to(tl.float32), mask=wanted)


def pick_tokens(logits: Tensor, token_ids: Tensor, counted: Tensor) -> Tensor:
    """(N, K) float32: the logits at ``token_ids`` (N, K)."""
    n_rows, n_entries = token_ids.shape
    picked = torch.empty((n_rows, n_entries), dtype=torch.float32, device=logits.device)
    entries = next_power_of_2(n_entries)
    rows = max(1, min(next_power_of_2(n_rows), (2**14 if INTERPRETED else 128) // entries))
    pick_tokens_kernel[(ceil_div(n_rows, rows),)](
        logits, counted, token_ids, picked, n_rows, n_entries, logits.shape[1], logits.stride(0),
        ROWS=rows, ENTRIES=entries, num_warps=4,
    )  # fmt: skip
    return picked


@triton.jit
def _dense(z, maximum, rest, is_chosen, through_chosen, through_floor):
    softmax = tl.exp((z.to(tl.float32) - maximum) - rest)
    dense = tl.where(is_chosen, 1.0 - softmax, -softmax) * through_chosen
    return tl.where(through_chosen != 0, dense, 0.0) - tl.where(through_floor != 0, softmax * through_floor, 0.0)


@repeated
@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=["row_max", "log_sum", "chosen_weight", "floor_weight", "response_ids"],
)
def dense_gradient_kernel(
    # logits (N, V)
    logits,
    # per row (N,); scale ()
    row_max, log_sum, chosen_weight, floor_weight, response_ids, scale,
    # result (N, V)
    gradient,
    # sizes and strides
    n_rows, vocabulary, stride_logits,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """gradient = scale * (chosen_weight * (one_hot(response_ids) - softmax) - floor_weight * softmax)"""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    present = rows < n_rows
    here = present[:, None] & (columns < vocabulary)[None, :]
    wide = rows[:, None].to(tl.int64)
    through_chosen = tl.load(chosen_weight + rows, mask=present, other=0.0)
    through_floor = tl.load(floor_weight + rows, mask=present, other=0.0)
    needed = (through_chosen != 0) | (through_floor != 0)
    z = tl.load(logits + wide * stride_logits + columns[None, :], mask=here & needed[:, None], other=0.0)
    maximum = tl.load(row_max + rows, mask=present, other=0.0)
    rest = tl.load(log_sum + rows, mask=present, other=0.0)
    y = tl.load(response_ids + rows, mask=present, other=-1)
    is_chosen = columns[None, :] == y[:, None]
    dense = _dense(z, maximum[:, None], rest[:, None], is_chosen, through_chosen[:, None], through_floor[:, None])
    tl.store(
        gradient + wide * vocabulary + columns[None, :],
        (dense * tl.load(scale)).to(gradient.dtype.element_ty), mask=here,
    )  # fmt: skip


@repeated
@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=[
        "row_max", "log_sum", "chosen_weight", "floor_weight", "response_ids",
        "support", "support_weight", "support_scale",
    ],
)  # fmt: skip
def support_entries_kernel(
    # logits (N, V)
    logits,
    # per row (N,); scale ()
    row_max, log_sum, chosen_weight, floor_weight, response_ids, scale,
    # gradient (N, V), filled by dense_gradient_kernel
    gradient,
    # support and support_weight (N, K), support_scale (N,)
    support, support_weight, support_scale,
    # sizes and strides
    n_rows, k_support, vocabulary, stride_logits,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """gradient.scatter_(-1, support, dense.gather(-1, support) + scale * support_weight * support_scale[:, None])

    The dense term is computed anew: the entry is rounded once.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    entries = tl.arange(0, ENTRIES)
    present = rows < n_rows
    wide = rows[:, None].to(tl.int64)
    used = tl.load(support_scale + rows, mask=present, other=0.0)
    inside = (used != 0)[:, None] & (entries < k_support)[None, :]
    token = tl.load(support + wide * k_support + entries[None, :], mask=inside, other=-1).to(tl.int64)
    inside = inside & (token >= 0) & (token < vocabulary)
    weight = tl.load(support_weight + wide * k_support + entries[None, :], mask=inside, other=0.0)
    through_chosen = tl.load(chosen_weight + rows, mask=present, other=0.0)
    through_floor = tl.load(floor_weight + rows, mask=present, other=0.0)
    z = tl.load(logits + wide * stride_logits + token, mask=inside, other=0.0)
    maximum = tl.load(row_max + rows, mask=present, other=0.0)
    rest = tl.load(log_sum + rows, mask=present, other=0.0)
    y = tl.load(response_ids + rows, mask=present, other=-1)
    is_chosen = token == y[:, None]
    dense = _dense(z, maximum[:, None], rest[:, None], is_chosen, through_chosen[:, None], through_floor[:, None])
    value = (dense + weight * used[:, None]) * tl.load(scale)
    tl.store(gradient + wide * vocabulary + token, value.to(gradient.dtype.element_ty), mask=inside)


def logits_gradient(
    logits: Tensor,
    support: Tensor,
    response_ids: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    terms: TokenTerms,
    scale: Tensor,
) -> Tensor:
    """(N, V) in the logits' storage dtype; ``scale`` () float32."""
    n_rows, vocabulary = logits.shape
    k_support = support.shape[1]
    gradient = torch.empty((n_rows, vocabulary), dtype=storage_dtype(logits.dtype), device=logits.device)
    rows, columns = (
        (min(32, next_power_of_2(n_rows)), min(1024, next_power_of_2(vocabulary))) if INTERPRETED else (1, 4096)
    )
    shared = (logits, row_max, log_sum, terms.chosen_weight, terms.floor_weight, response_ids, scale, gradient)
    dense_gradient_kernel[(ceil_div(n_rows, rows), ceil_div(vocabulary, columns))](
        *shared, n_rows, vocabulary, logits.stride(0), ROWS=rows, COLUMNS=columns, num_warps=8
    )
    if terms.support_weight is not None:
        entries = next_power_of_2(k_support)
        rows = max(1, min(next_power_of_2(n_rows), (2**14 if INTERPRETED else 128) // entries))
        support_entries_kernel[(ceil_div(n_rows, rows),)](
            *shared, support, terms.support_weight, terms.support_scale, n_rows, k_support, vocabulary,
            logits.stride(0), ROWS=rows, ENTRIES=entries, num_warps=4,
        )  # fmt: skip
    return gradient
