"""The product hidden @ head.T, tile by tile, never written out whole.

One persistent kernel; what becomes of a tile of logits is its epilogue:

* ``statistics``: the tile's row maxima and sums of exponentials alone, for the logsumexp;
* ``exponentials``: these, and -exp(logit - shift) into a buffer that holds some rows of the vocabulary. The
  shift is the row's reference, one for all tiles, unless the tile's maximum lies too far above it;
* ``logits``: these, the float32 logits into a buffer, and the maximum of every SUBTILE columns;
* ``gradient``: given each row's logsumexp, the gradient of the loss with respect to the logits, dense part.

The first two can also take a few logits a row, at ids that ``support_order`` has assigned to the tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.kernels.support_order import (
    COLUMN_BITS,
    COLUMN_MASK,
    MORE,
    POSITION_MASK,
    first_of_links,
    following_of_links,
    ids_of_tiles,
)
from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import (
    INTERPRETED,
    ceil_div,
    compute_capability,
    describable,
    has_tensor_memory_accelerator,
    next_power_of_2,
    processors,
    some_rows,
)

import triton  # isort: skip
import triton.language as tl  # isort: skip

LOG2_E = tl.constexpr(1.4426950408889634)
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
SUBTILE = 64
ROW_BLOCK = 2048
"""Rows per launch where only statistics are kept, 8 bytes a row and tile: 10 MiB at 152k columns."""


@dataclass(frozen=True)
class Tiling:
    """Tile shape and launch shape. A table, not a search: nothing is timed at the first call."""

    rows: int
    columns: int
    inner: int
    group: int
    warps: int
    stages: int


def tiling(n_rows: int, vocabulary: int, width: int, dtype: torch.dtype, device: torch.device) -> Tiling:
    """The tiling for a product of (n_rows, width) with (vocabulary, width)."""
    if INTERPRETED:
        columns = min(512, max(SUBTILE, next_power_of_2(vocabulary)))
        return Tiling(
            min(64, max(16, next_power_of_2(n_rows))), columns, min(256, max(16, next_power_of_2(width))), 8, 4, 1
        )
    if dtype == torch.float32:
        return Tiling(64, 64, 32, 8, 4, 2)
    major, minor = compute_capability(device)
    if major >= 9:
        return Tiling(64, 256, 64, 8, 4, 4) if n_rows <= 64 else Tiling(128, 256, 64, 8, 8, 3)
    if (major, minor) == (8, 0):
        return Tiling(128, 128, 64, 8, 8, 3)
    return Tiling(128, 128, 32, 8, 8, 3)


@cache
def overlapping_product(device: torch.device) -> Any:
    """The module ``hopper_product``, or None where it does not run: no Hopper GPU, or a Triton without its Gluon."""
    if INTERPRETED or device.type != "cuda" or compute_capability(device)[0] != 9:
        return None
    try:
        return import_module("sdpo_implementations.triton_fused.kernels.hopper_product")
    except ImportError:
        return None


@triton.jit
def _tile_of_product(
    a, b, row0, column0, n_rows, n_columns, width, stride_a, stride_b,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """float32 accumulators of rows row0.. of a times rows column0.. of b; DESCRIPTORS: bulk tensor copies."""
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    rows = (row0 + tl.arange(0, ROWS)).to(tl.int64)
    columns = (column0 + tl.arange(0, COLUMNS)).to(tl.int64)
    for k in range(0, width, INNER):
        if DESCRIPTORS:
            a_tile = a.load([row0, k])
            b_tile = b.load([column0, k])
        else:
            inner = k + tl.arange(0, INNER)
            a_tile = tl.load(
                a + rows[:, None] * stride_a + inner[None, :],
                mask=(rows < n_rows)[:, None] & (inner < width)[None, :], other=0.0,
            )  # fmt: skip
            b_tile = tl.load(
                b + columns[:, None] * stride_b + inner[None, :],
                mask=(columns < n_columns)[:, None] & (inner < width)[None, :], other=0.0,
            )  # fmt: skip
        if UPCAST:
            a_tile = a_tile.to(tl.float32)
            b_tile = b_tile.to(tl.float32)
        accumulator = tl.dot(a_tile, b_tile.T, accumulator, input_precision="ieee")
    return accumulator


@triton.jit
def _store_tile(
    buffer, value, row0, column0, n_rows, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """A tile into the buffer. HALVES: in two, where a whole one would not fit beside the operands' stages."""
    if DESCRIPTORS:
        if HALVES:
            left, right = tl.split(tl.permute(tl.reshape(value, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
            buffer.store([row0, column0], left)
            buffer.store([row0, column0 + COLUMNS // 2], right)
        else:
            buffer.store([row0, column0], value)
    else:
        rows = row0 + tl.arange(0, ROWS)
        columns = column0 + tl.arange(0, COLUMNS)
        tl.store(
            buffer + rows[:, None].to(tl.int64) * stride + columns[None, :],
            value.to(buffer.dtype.element_ty), mask=(rows < n_rows)[:, None],
        )  # fmt: skip


@triton.jit
def _take(logits, link, taken, wide_rows, n_entries, COLUMNS: tl.constexpr):
    """The logit of the tile that each row's link names, to its place in ``taken``; that place relative to it."""
    # No link: column 1023, which no tile has.
    here = tl.arange(0, COLUMNS)[None, :] == (link & COLUMN_MASK)[:, None]
    place = wide_rows * n_entries + ((link >> COLUMN_BITS) & POSITION_MASK)
    tl.store(taken + place, tl.sum(tl.where(here, logits, 0.0), 1), mask=link >= 0)
    return place


@triton.jit
def _take_logits(logits, first, second, following, taken, wide_rows, n_entries, COLUMNS: tl.constexpr):
    """The logits of the tile that each row's list names, to their positions in ``taken``."""
    _take(logits, first, taken, wide_rows, n_entries, COLUMNS)
    link = second
    while tl.max(link, 0) >= 0:
        place = _take(logits, link, taken, wide_rows, n_entries, COLUMNS)
        link = tl.load(following + place, mask=(link >= 0) & ((link & MORE) != 0), other=-1)


@repeated
@triton.jit(
    do_not_specialize=["n_rows", "column_start", "column_end"],
    do_not_specialize_on_alignment=[
        "counted", "response_ids", "row_max", "log_sum", "reference", "taken",
    ],
)  # fmt: skip
def vocabulary_product_kernel(
    # operands (N, H), (V, H), counted (N,)
    hidden, head, counted,
    # statistics (2, tiles, N); buffer (N, whole tiles), subtile_max (N, whole tiles / SUBTILE)
    statistics, buffer, subtile_max,
    # taken logits: links as ``support_order`` has them, taken (N, E)
    links, taken,
    # per row (N,)
    row_max, log_sum, chosen_weight, floor_weight, scale, response_ids, reference, most_above,
    # sizes and strides
    n_rows, column_start, column_end, width, n_entries, stride_hidden, stride_head, stride_buffer, stride_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    SUBTILE: tl.constexpr, EPILOGUE: tl.constexpr, MASKED: tl.constexpr, TAKES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """PyTorch, tile by tile: ``z = hidden.float() @ head[start:end].float().T; m = z.amax(1);
    statistics = stack([m, (z - m).exp().sum(1)])``, and as the epilogue says ``buffer = -(z - reference).exp()``,
    ``buffer = z; subtile_max = z.view(N, -1, SUBTILE).amax(-1)`` or ``buffer = scale * (chosen_weight *
    (onehot(y) - softmax) - floor_weight * softmax)``; ``taken = z.gather(1, ids)``."""
    row_tiles = (n_rows + ROWS - 1) // ROWS
    column_tiles = (column_end - column_start + COLUMNS - 1) // COLUMNS
    in_group = GROUP * column_tiles
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        # Row tiles of a group share the columns in flight, so that the head is read from memory once a group.
        group = tile // in_group
        group_rows = min(row_tiles - group * GROUP, GROUP)
        row_tile = group * GROUP + (tile % in_group) % group_rows
        column_tile = (tile % in_group) // group_rows
        row0 = row_tile * ROWS
        column0 = column_start + column_tile * COLUMNS
        rows = row0 + tl.arange(0, ROWS)
        wide_rows = rows.to(tl.int64)
        present = rows < n_rows
        needed = 1.0
        if MASKED:
            needed = tl.max((tl.load(counted + rows, mask=present, other=0.0) != 0).to(tl.float32), 0)
        if EPILOGUE == "gradient":
            c_chosen = tl.load(chosen_weight + rows, mask=present, other=0.0)
            c_floor = tl.load(floor_weight + rows, mask=present, other=0.0)
            needed = tl.max(((c_chosen != 0) | (c_floor != 0)).to(tl.float32), 0)
        if needed != 0:
            if TAKES:
                first_link = first_of_links(links, n_rows, n_entries) + column_tile.to(tl.int64) * n_rows + rows
                following = following_of_links(links, n_rows, n_entries, column_tiles)
                first = tl.load(first_link, mask=present, other=-1)
                second = tl.load(first_link + column_tiles * n_rows, mask=present, other=-1)
            logits = _tile_of_product(
                hidden, head, row0, column0, n_rows, column_end, width, stride_hidden, stride_head,
                ROWS, COLUMNS, INNER, DESCRIPTORS, UPCAST,
            )  # fmt: skip
            columns = column0 + tl.arange(0, COLUMNS)
            if column0 + COLUMNS > column_end:
                logits = tl.where((columns < column_end)[None, :], logits, float("-inf"))
            if EPILOGUE == "gradient":
                maximum = tl.load(row_max + rows, mask=present, other=0.0)
                rest = tl.load(log_sum + rows, mask=present, other=0.0)
                chosen = tl.load(response_ids + rows, mask=present, other=-1)
                factor = tl.load(scale + wide_rows * stride_scale, mask=present, other=0.0)
                log_softmax = (logits - maximum[:, None]) - rest[:, None]
                softmax = tl.exp(log_softmax)
                is_chosen = columns[None, :] == chosen[:, None]
                dense = tl.where(is_chosen, 1.0 - softmax, -softmax) * c_chosen[:, None]
                dense = tl.where((c_chosen != 0)[:, None], dense, 0.0)
                dense -= tl.where((c_floor != 0)[:, None], softmax * c_floor[:, None], 0.0)
                dense = (dense * factor[:, None]).to(STORED)
                _store_tile(
                    buffer,
                    dense,
                    row0,
                    column0 - column_start,
                    n_rows,
                    stride_buffer,
                    ROWS,
                    COLUMNS,
                    DESCRIPTORS,
                    False,
                )
            else:
                if TAKES:
                    _take_logits(logits, first, second, following, taken, wide_rows, n_entries, COLUMNS)
                if EPILOGUE == "logits":
                    parts = tl.max(tl.reshape(logits, (ROWS, COLUMNS // SUBTILE, SUBTILE)), 2)
                    part = column_tile * (COLUMNS // SUBTILE) + tl.arange(0, COLUMNS // SUBTILE)
                    stride_parts = column_tiles * (COLUMNS // SUBTILE)
                    tl.store(
                        subtile_max + wide_rows[:, None] * stride_parts + part[None, :], parts, mask=present[:, None]
                    )
                    maximum = tl.max(parts, 1)
                    _store_tile(buffer, logits, row0, column0, n_rows, stride_buffer, ROWS, COLUMNS, DESCRIPTORS, True)
                else:
                    maximum = tl.max(logits, 1)
                if EPILOGUE == "exponentials":
                    common = tl.load(reference + rows, mask=present, other=0.0)
                    maximum = tl.where(maximum - common <= most_above, common, maximum)
                # Subtract, then scale: a logit of 1e4 keeps its low bits.
                finite = tl.where(maximum == float("-inf"), 0.0, maximum)
                exponentials = tl.exp2((logits - finite[:, None]) * LOG2_E)
                statistic = statistics + column_tile.to(tl.int64) * n_rows + rows
                tl.store(statistic, maximum, mask=present)
                tl.store(statistic + n_rows.to(tl.int64) * column_tiles, tl.sum(exponentials, 1), mask=present)
                if EPILOGUE == "exponentials":
                    _store_tile(
                        buffer, (-exponentials).to(STORED), row0, column0, n_rows, stride_buffer,
                        ROWS, COLUMNS, DESCRIPTORS, False,
                    )  # fmt: skip
        elif EPILOGUE == "gradient":
            nothing = tl.zeros((ROWS, COLUMNS), STORED)
            _store_tile(
                buffer, nothing, row0, column0 - column_start, n_rows, stride_buffer, ROWS, COLUMNS, DESCRIPTORS, False
            )


@dataclass(frozen=True)
class Take:
    """Logits to take on the way: ``logits`` (N, E) float32 gets those that ``links`` name. Rows of tiles without
    a counted token stay unwritten."""

    links: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Wanted:
    """Logits to take at ``support`` (N, K) and, as entry K, at ``response_ids`` (N,) where they are given, into
    ``logits`` (N, E) float32; NaN where an id lies outside the vocabulary."""

    support: Tensor
    response_ids: Tensor | None
    logits: Tensor

    def of(self, rows: slice, vocabulary: int, columns: int) -> Take:
        """Those of some rows, for tiles of ``columns``."""
        ids = None if self.response_ids is None else some_rows(self.response_ids, rows)
        logits = some_rows(self.logits, rows)
        return Take(ids_of_tiles(some_rows(self.support, rows), ids, logits, vocabulary, columns), logits)


def buffer_columns(vocabulary: int, tiles: Tiling) -> int:
    """Columns a buffer needs: whole tiles are written."""
    return ceil_div(vocabulary, tiles.columns) * tiles.columns


def _launch(
    epilogue: str, hidden: Tensor, head: Tensor, tiles: Tiling, columns: tuple[int, int], counted: Tensor | None,
    **tensors: Any,
) -> None:  # fmt: skip
    n_rows, width = hidden.shape
    device = hidden.device
    descriptors = (
        has_tensor_memory_accelerator(device)
        and hidden.dtype != torch.float32
        and describable(hidden)
        and describable(head)
    )
    unused = hidden
    buffer = tensors.get("buffer", unused)
    a: Any = hidden
    b: Any = head
    place: Any = buffer
    if descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        a = TensorDescriptor.from_tensor(hidden, [tiles.rows, tiles.inner])
        b = TensorDescriptor.from_tensor(head[: columns[1]], [tiles.columns, tiles.inner])
        if buffer is not unused:
            width_stored = tiles.columns // 2 if epilogue == "logits" else tiles.columns
            place = TensorDescriptor.from_tensor(buffer, [tiles.rows, width_stored])
    n_tiles = ceil_div(n_rows, tiles.rows) * ceil_div(columns[1] - columns[0], tiles.columns)
    scale = tensors.get("scale", unused)
    take: Take | None = tensors.get("take")
    vocabulary_product_kernel[(min(n_tiles, processors(device)),)](
        a, b, unused if counted is None else counted,
        tensors.get("statistics", unused), place, tensors.get("subtile_max", unused),
        unused if take is None else take.links, unused if take is None else take.logits,
        tensors.get("row_max", unused), tensors.get("log_sum", unused),
        tensors.get("chosen_weight", unused), tensors.get("floor_weight", unused), scale,
        tensors.get("response_ids", unused), tensors.get("reference", unused), tensors.get("most_above", 0.0),
        n_rows, columns[0], columns[1], width, 0 if take is None else take.logits.shape[1],
        hidden.stride(0), head.stride(0),
        buffer.stride(0), scale.stride(0) if scale.dim() == 1 else 0,
        ROWS=tiles.rows, COLUMNS=tiles.columns, INNER=tiles.inner, GROUP=tiles.group,
        SUBTILE=SUBTILE, EPILOGUE=epilogue, MASKED=counted is not None, TAKES=take is not None,
        DESCRIPTORS=descriptors, UPCAST=INTERPRETED, STORED=TRITON_DTYPES[buffer.dtype],
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _empty_statistics(hidden: Tensor, vocabulary: int, tiles: Tiling) -> Tensor:
    shape = (2, ceil_div(vocabulary, tiles.columns), hidden.shape[0])
    return torch.empty(shape, dtype=torch.float32, device=hidden.device)


@dataclass(frozen=True)
class Exponentials:
    """What to store on the way: -exp(logit - shift) into ``buffer`` (N, whole tiles).

    A tile's shift, which stands among the maxima, is the row's ``reference`` (N,) float32, or its maximum where
    that lies more than ``most_above`` above the reference.
    """

    reference: Tensor
    most_above: float
    buffer: Tensor


@dataclass(frozen=True)
class Logits:
    """What to store on the way: the float32 logits into ``buffer`` (N, whole tiles), -inf beyond V, and the maximum of
    each SUBTILE columns into ``subtile_max`` (N, whole tiles / SUBTILE)."""

    buffer: Tensor
    subtile_max: Tensor


def _overlapping_product_of(hidden: Tensor, head: Tensor, tiles: Tiling) -> Any:
    """The module ``hopper_product`` where it takes these operands, else None."""
    overlapped = overlapping_product(hidden.device)
    taken = (
        overlapped is not None
        and hidden.dtype != torch.float32
        and (tiles.rows, tiles.columns) == (overlapped.ROWS, overlapped.COLUMNS)
        and describable(hidden)
        and describable(head)
    )
    return overlapped if taken else None


def tile_statistics(
    hidden: Tensor, head: Tensor, tiles: Tiling, counted: Tensor | None,
    exponentials: Exponentials | None = None, take: Take | None = None,
) -> Tensor:  # fmt: skip
    """Row maxima and sums of exp(logit - maximum) of every tile of hidden (N, H) @ head (V, H).T, (2, column tiles, N)
    float32; row tiles without a counted token are left unwritten."""
    statistics = _empty_statistics(hidden, head.shape[0], tiles)
    overlapped = _overlapping_product_of(hidden, head, tiles)
    if overlapped is not None:
        overlapped.hopper_product(hidden, head, counted, statistics, exponentials, take)
    elif exponentials is None:
        _launch(
            "statistics", hidden, head, tiles, (0, head.shape[0]), counted,
            statistics=statistics, take=take,
        )  # fmt: skip
    else:
        _launch(
            "exponentials", hidden, head, tiles, (0, head.shape[0]), counted,
            statistics=statistics, take=take, buffer=exponentials.buffer,
            reference=exponentials.reference, most_above=exponentials.most_above,
        )  # fmt: skip
    return statistics


def tile_logits(hidden: Tensor, head: Tensor, tiles: Tiling, logits: Logits) -> Tensor:
    """The same of every row, and the logits."""
    statistics = _empty_statistics(hidden, head.shape[0], tiles)
    overlapped = _overlapping_product_of(hidden, head, tiles)
    if overlapped is not None:
        overlapped.hopper_product(hidden, head, None, statistics, logits=logits)
    else:
        _launch(
            "logits", hidden, head, tiles, (0, head.shape[0]), None, statistics=statistics,
            buffer=logits.buffer, subtile_max=logits.subtile_max,
        )  # fmt: skip
    return statistics


def dense_logit_gradient(
    hidden: Tensor, head: Tensor, tiles: Tiling, columns: tuple[int, int], buffer: Tensor,
    row_max: Tensor, log_sum: Tensor, chosen_weight: Tensor, floor_weight: Tensor, scale: Tensor, response_ids: Tensor,
) -> None:  # fmt: skip
    """scale * (chosen_weight (onehot(y) - softmax) - floor_weight softmax) for ``columns`` into ``buffer``."""
    _launch(
        "gradient", hidden, head, tiles, columns, None, buffer=buffer, row_max=row_max, log_sum=log_sum,
        chosen_weight=chosen_weight, floor_weight=floor_weight, scale=scale, response_ids=response_ids,
    )  # fmt: skip
