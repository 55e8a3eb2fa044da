"""The dense term of tokens whose student mass on the support is below the floor: -floor_weight sum_v softmax_v W[v].

Such tokens are rare, and how many there are is known on the device alone; nothing waits for it. A fixed
grid reads the list: no row, no work. Each program owns a float32 accumulator in memory for some rows and a
stretch of the vocabulary. With few rows the stretches are short and a second kernel adds them up in a fixed
order; with many, each program finishes its rows alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.token_loss import TokenTerms
from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import INTERPRETED, next_power_of_2, processors

import triton  # isort: skip
import triton.language as tl  # isort: skip

ROWS_PER_PROGRAM = 16


@triton.jit
def _stretches(count, programs, ROWS: tl.constexpr):
    """(blocks of listed rows, into how many stretches the vocabulary is cut)."""
    blocks = (count + ROWS - 1) // ROWS
    stretches = programs // tl.maximum(blocks, 1)
    return blocks, tl.maximum(stretches, 1)


@triton.jit
def _add_to_gradient(gradient, row, weight, inner, width, value, keep):
    places = gradient + row[:, None].to(tl.int64) * width + inner[None, :]
    here = keep[:, None] & (inner < width)[None, :]
    before = tl.load(places, mask=here, other=0.0).to(tl.float32)
    tl.store(places, (before - weight[:, None] * value).to(gradient.dtype.element_ty), mask=here)


@repeated
@triton.jit(do_not_specialize_on_alignment=["row_max", "log_sum", "floor_weight", "scale", "floor_rows"])
def floor_rows_kernel(
    # operands (N, H), (V, H)
    hidden, head,
    # per row (N,); scale (N,) or (), told by its stride
    row_max, log_sum, floor_weight, scale,
    # the list of rows (N,) and its length (1,)
    floor_rows, floor_count,
    # scratch (programs, ROWS, H) float32; result (N, H), added to
    partial, gradient,
    # sizes and strides
    vocabulary, width, stride_hidden, stride_head, stride_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """gradient[rows] -= (floor_weight * scale)[rows, None] * softmax(hidden[rows] @ head.T) @ head

    Where the vocabulary is cut into several stretches, only their products are left in ``partial``.
    """
    program = tl.program_id(0)
    count = tl.load(floor_count)
    blocks, stretches = _stretches(count, tl.num_programs(0), ROWS)
    own = partial + program.to(tl.int64) * ROWS * width + tl.arange(0, ROWS)[:, None] * width
    for item in range(program, blocks * stretches, tl.num_programs(0)):
        listed = (item // stretches) * ROWS + tl.arange(0, ROWS)
        keep = listed < count
        row = tl.load(floor_rows + listed, mask=keep, other=0)
        wide = row.to(tl.int64)
        maximum = tl.load(row_max + row, mask=keep, other=0.0)
        rest = tl.load(log_sum + row, mask=keep, other=0.0)
        tiles = (vocabulary + COLUMNS - 1) // COLUMNS
        per_stretch = (tiles + stretches - 1) // stretches
        first = (item % stretches) * per_stretch
        for start in range(0, width, INNER):
            inner = start + tl.arange(0, INNER)
            tl.store(own + inner[None, :], tl.zeros((ROWS, INNER), tl.float32), mask=(inner < width)[None, :])
        for tile in range(first, tl.minimum(first + per_stretch, tiles)):
            columns = tile * COLUMNS + tl.arange(0, COLUMNS)
            in_head = columns < vocabulary
            table = head + columns[:, None].to(tl.int64) * stride_head
            logits = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in range(0, width, INNER):
                inner = start + tl.arange(0, INNER)
                h = tl.load(
                    hidden + wide[:, None] * stride_hidden + inner[None, :],
                    mask=keep[:, None] & (inner < width)[None, :], other=0.0,
                )  # fmt: skip
                w = tl.load(table + inner[None, :], mask=in_head[:, None] & (inner < width)[None, :], other=0.0)
                if UPCAST:
                    h = h.to(tl.float32)
                    w = w.to(tl.float32)
                logits = tl.dot(h, w.T, logits, input_precision="ieee")
            softmax = tl.exp((logits - maximum[:, None]) - rest[:, None])
            softmax = tl.where(in_head[None, :] & keep[:, None], softmax, 0.0)
            for start in range(0, width, INNER):
                inner = start + tl.arange(0, INNER)
                w = tl.load(table + inner[None, :], mask=in_head[:, None] & (inner < width)[None, :], other=0.0)
                if UPCAST:
                    w = w.to(tl.float32)
                tl.debug_barrier()
                so_far = tl.load(own + inner[None, :], mask=(inner < width)[None, :], other=0.0)
                so_far = tl.dot(softmax.to(w.dtype), w, so_far, input_precision="ieee")
                tl.store(own + inner[None, :], so_far, mask=(inner < width)[None, :])
        tl.debug_barrier()
        if stretches == 1:
            factor = tl.load(floor_weight + row, mask=keep, other=0.0)
            factor *= tl.load(scale + wide * stride_scale, mask=keep, other=0.0)
            for start in range(0, width, INNER):
                inner = start + tl.arange(0, INNER)
                value = tl.load(own + inner[None, :], mask=(inner < width)[None, :], other=0.0)
                _add_to_gradient(gradient, row, factor, inner, width, value, keep)
            tl.debug_barrier()


@repeated
@triton.jit(do_not_specialize=["programs"], do_not_specialize_on_alignment=["floor_weight", "scale", "floor_rows"])
def add_stretches_kernel(
    # per row (N,); scale (N,) or (), told by its stride
    floor_weight, scale,
    # the list of rows (N,) and its length (1,)
    floor_rows, floor_count,
    # products (programs, ROWS, H) float32; result (N, H), added to
    partial, gradient,
    # sizes and strides
    programs, width, stride_scale,
    ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """gradient[rows] -= (floor_weight * scale)[rows, None] * partial.sum(0), where there are several stretches"""
    count = tl.load(floor_count)
    blocks, stretches = _stretches(count, programs, ROWS)
    if stretches > 1:
        inner = tl.program_id(0) * INNER + tl.arange(0, INNER)
        for block in range(blocks):
            listed = block * ROWS + tl.arange(0, ROWS)
            keep = listed < count
            row = tl.load(floor_rows + listed, mask=keep, other=0)
            factor = tl.load(floor_weight + row, mask=keep, other=0.0)
            factor *= tl.load(scale + row.to(tl.int64) * stride_scale, mask=keep, other=0.0)
            total = tl.zeros((ROWS, INNER), tl.float32)
            for stretch in range(stretches):
                own = partial + (block * stretches + stretch).to(tl.int64) * ROWS * width
                places = own + tl.arange(0, ROWS)[:, None] * width + inner[None, :]
                total += tl.load(places, mask=(inner < width)[None, :], other=0.0)
            _add_to_gradient(gradient, row, factor, inner, width, total, keep)


def add_floor_rows(
    hidden: Tensor, head: Tensor, row_max: Tensor, log_sum: Tensor, terms: TokenTerms, scale: Tensor, gradient: Tensor
) -> None:
    """Add scale * -floor_weight * sum_v softmax_v W[v] to ``gradient`` (N, H) at the listed rows."""
    width = head.shape[1]
    programs = min(64, processors(hidden.device))
    partial = torch.empty((programs, ROWS_PER_PROGRAM, width), dtype=torch.float32, device=hidden.device)
    columns = min(512, next_power_of_2(head.shape[0])) if INTERPRETED else 128
    columns, inner = max(16, columns), max(16, min(256 if INTERPRETED else 64, next_power_of_2(width)))
    stride_scale = scale.stride(0) if scale.dim() == 1 else 0
    floor_rows_kernel[(programs,)](
        hidden, head, row_max, log_sum, terms.floor_weight, scale, terms.floor_rows, terms.floor_count,
        partial, gradient, head.shape[0], width, hidden.stride(0), head.stride(0), stride_scale,
        ROWS=ROWS_PER_PROGRAM, COLUMNS=columns, INNER=inner, UPCAST=INTERPRETED, num_warps=4, num_stages=3,
    )  # fmt: skip
    add_stretches_kernel[(-(-width // inner),)](
        terms.floor_weight, scale, terms.floor_rows, terms.floor_count, partial, gradient,
        programs, width, stride_scale, ROWS=ROWS_PER_PROGRAM, INNER=inner, num_warps=4,
    )  # fmt: skip
