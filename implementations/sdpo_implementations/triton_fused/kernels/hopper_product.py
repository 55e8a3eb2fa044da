"""The product hidden @ head.T on Hopper GPUs, each tile's epilogue beside the products of other warps.

What ``vocabulary_product`` does in Triton, in Gluon: one warp loads ahead through the tensor memory accelerator, two
groups of four warps take half of a tile's rows each. Each group waits for and hands back stages on its own, so
that while one takes its exponentials the other has the tensor cores, and loading never stops between tiles.

Import where there is a Hopper GPU: Gluon is compiled, never interpreted. ImportError before Triton 3.6.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import TRITON_VERSION, ceil_div, processors

if TYPE_CHECKING:
    from sdpo_implementations.triton_fused.kernels.vocabulary_product import Exponentials, Logits, Take

if TRITON_VERSION < (3, 6):
    raise ImportError(f"Gluon's warp_specialize took other arguments in Triton {triton.__version__}: 3.6 is needed")

# Bulk tensor copies by the names of Triton 3.8 and later, else by those of 3.6.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

LOG2_E = gl.constexpr(1.4426950408889634)
COLUMN_BITS = gl.constexpr(10)
COLUMN_MASK = gl.constexpr(2**10 - 1)
POSITION_MASK = gl.constexpr(2**16 - 1)
MORE = gl.constexpr(2**26)
ROWS, COLUMNS, INNER, GROUP = 128, 256, 64, 8
STAGES = 4
PARTS_OF_EXPONENTIALS, PARTS_OF_LOGITS = 4, 8
"""Parts of 8 KiB, two of each group in flight: they leave room for the four stages."""

GL_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


@gluon.jit
def _place(tile, row_tiles, column_tiles, GROUP: gl.constexpr):
    """(row tile, column tile): row tiles of a group share the columns in flight."""
    in_group = GROUP * column_tiles
    group = tile // in_group
    group_rows = gl.minimum(row_tiles - group * GROUP, GROUP)
    return group * GROUP + (tile % in_group) % group_rows, (tile % in_group) // group_rows


@gluon.jit
def _marks(
    counted, tile, row_tiles, column_tiles, n_rows,
    ROWS: gl.constexpr, GROUP: gl.constexpr, MASKED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """The mask of a tile's rows, zeros beyond the last tile: loaded a tile ahead, so that no one waits for it."""
    rows = gl.arange(0, ROWS, layout)
    marks = gl.full((ROWS,), 1.0, gl.float32, layout)
    if MASKED:
        row_tile, _ = _place(tile, row_tiles, column_tiles, GROUP)
        rows += row_tile * ROWS
        marks = gl.load(counted + rows, mask=(rows < n_rows) & (tile < row_tiles * column_tiles), other=0.0)
    return marks


@gluon.jit
def _any(marks, MASKED: gl.constexpr):
    found = True
    if MASKED:
        found = gl.max(gl.where(marks != 0, 1, 0), 0) != 0
    return found


@gluon.jit
def _load_stages(
    hidden, head, counted, a_stages, b_stages, ready, free, row_tiles, column_tiles, n_rows, width,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, INNER: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """The loading warp."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    step = 0
    marks = _marks(counted, gl.program_id(0), row_tiles, column_tiles, n_rows, ROWS, GROUP, MASKED, layout)
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP)
        needed = _any(marks, MASKED)
        marks = _marks(counted, tile + gl.num_programs(0), row_tiles, column_tiles, n_rows, ROWS, GROUP, MASKED, layout)
        if needed:
            for k in range(0, width, INNER):
                stage = step % STAGES
                mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
                bar = ready.index(stage)
                mbarrier.expect(bar, hidden.block_type.nbytes * 2 + head.block_type.nbytes)
                load_tile(hidden, [row_tile * ROWS, k], bar, a_stages.index(2 * stage))
                load_tile(hidden, [row_tile * ROWS + ROWS // 2, k], bar, a_stages.index(2 * stage + 1))
                load_tile(head, [column_tile * COLUMNS, k], bar, b_stages.index(stage))
                step += 1


@gluon.jit
def _halves(x):
    """Left and right half of the columns; nothing moves between threads."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, x.shape[1] // 2, 16])
    left, right = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()
    return (
        gl.convert_layout(left, layout, assert_trivial=True),
        gl.convert_layout(right, layout, assert_trivial=True),
    )


@gluon.jit
def _parts(x, COUNT: gl.constexpr):
    """The columns in COUNT parts."""
    if COUNT == 1:
        return (x,)
    else:
        left, right = _halves(x)
        return _parts(left, COUNT // 2) + _parts(right, COUNT // 2)


@gluon.jit
def _place_of(link, wide_rows, n_entries):
    """Where among (N, E) a link's entry stands."""
    return wide_rows * n_entries + ((link >> COLUMN_BITS) & POSITION_MASK)


@gluon.jit
def _take(logits, link, place):
    """The logit of the tile that each row's link names, to its ``place``.

    The column's upper bits choose between halves, down to eight columns: a third of the work of comparing all 256.
    """
    row_layout: gl.constexpr = link.type.layout
    part = logits
    for level in gl.static_range(5):
        left, right = _halves(part)
        own = gl.convert_layout(link, gl.SliceLayout(1, left.type.layout), assert_trivial=True)
        is_right = own & (logits.shape[1] >> (level + 1))
        part = gl.where((is_right != 0)[:, None], right, left)
    last: gl.constexpr = part.type.layout
    columns = gl.arange(0, part.shape[1], gl.SliceLayout(0, last))
    own = gl.convert_layout(link, gl.SliceLayout(1, last), assert_trivial=True) & (part.shape[1] - 1)
    chosen = gl.sum(gl.where(columns[None, :] == own[:, None], part, 0.0), 1)
    gl.store(place, gl.convert_layout(chosen, row_layout, assert_trivial=True), mask=link >= 0)


@gluon.jit
def _store_part(part, buffer, row0, column0, staging):
    """Some columns of a tile into the buffer, by way of ``staging``, whose last but one store must have been read."""
    tma.store_wait(pendings=1)
    staging.store(part)
    fence_async_shared()
    store_tile(buffer, [row0, column0], staging)


@gluon.jit
def _multiply(
    half: gl.constexpr, counted, statistics, subtile_max, reference, buffer, links, taken,
    a_stages, b_stages, staging, ready, free, row_tiles, column_tiles,
    n_rows, n_columns, width, n_entries, most_above,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, INNER: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr, TAKES: gl.constexpr, STORED: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """One of the two groups: products and epilogue of its half of the rows."""
    HALF: gl.constexpr = ROWS // 2
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, COLUMNS, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, acc_layout)
    column_layout: gl.constexpr = gl.SliceLayout(0, acc_layout)
    flat_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    step = 0
    steps = (width + INNER - 1) // INNER
    marks = _marks(counted, gl.program_id(0), row_tiles, column_tiles, n_rows, ROWS, GROUP, MASKED, flat_layout)
    for tile in range(gl.program_id(0), row_tiles * column_tiles, gl.num_programs(0)):
        row_tile, column_tile = _place(tile, row_tiles, column_tiles, GROUP)
        needed = _any(marks, MASKED)
        marks = _marks(
            counted, tile + gl.num_programs(0), row_tiles, column_tiles, n_rows, ROWS, GROUP, MASKED, flat_layout
        )
        if needed:
            row0 = row_tile * ROWS + half * HALF
            column0 = column_tile * COLUMNS
            rows = row0 + gl.arange(0, HALF, row_layout)
            present = rows < n_rows
            if TAKES:
                first_of_tile = links + 2 * n_rows.to(gl.int64) * (n_entries + 2)
                following = first_of_tile + 2 * n_rows.to(gl.int64) * column_tiles
                first_link = first_of_tile + column_tile.to(gl.int64) * n_rows + rows
                first = gl.load(first_link, mask=present, other=-1)
                second = gl.load(first_link + column_tiles * n_rows, mask=present, other=-1)
            if STORED == "exponentials":
                common = gl.load(reference + rows, mask=present, other=0.0)
            acc = warpgroup_mma_init(gl.zeros((HALF, COLUMNS), gl.float32, acc_layout))
            for k in range(steps):
                stage = step % STAGES
                mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
                a = a_stages.index(2 * stage + half)
                acc = warpgroup_mma(a, b_stages.index(stage).permute((1, 0)), acc, use_acc=k > 0, is_async=True)
                # The product before this one has read its stage: hand it back.
                acc = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=1, deps=(acc,)))
                mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=k > 0)
                step += 1
            logits = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
            local = gl.arange(0, COLUMNS, column_layout)
            if column0 + COLUMNS > n_columns:
                logits = gl.where((local < n_columns - column0)[None, :], logits, float("-inf"))
            if TAKES:
                wide_rows = rows.to(gl.int64)
                link, next_link = first, second
                while gl.max(link, 0) >= 0:
                    _take(logits, link, taken + _place_of(link, wide_rows, n_entries))
                    link = next_link
                    place = following + _place_of(link, wide_rows, n_entries)
                    next_link = gl.load(place, mask=(link >= 0) & ((link & MORE) != 0), other=-1)
            if STORED == "logits":
                first_of_row = subtile_max + (rows.to(gl.int64) * column_tiles + column_tile) * (PARTS // 2)
                parts = _parts(logits, PARTS)
                maximum = gl.full((HALF,), float("-inf"), gl.float32, row_layout)
                for part in gl.static_range(PARTS):
                    own = staging.index(2 * half + part % 2)
                    _store_part(parts[part], buffer, row0, column0 + part * (COLUMNS // PARTS), own)
                for part in gl.static_range(PARTS // 2):
                    most = gl.max(gl.maximum(parts[2 * part], parts[2 * part + 1]), 1)
                    most = gl.convert_layout(most, row_layout, assert_trivial=True)
                    gl.store(first_of_row + part, most, mask=present)
                    maximum = gl.maximum(maximum, most)
            else:
                maximum = gl.max(logits, 1)
            if STORED == "exponentials":
                maximum = gl.where(maximum - common <= most_above, common, maximum)
            # Subtract, then scale: a logit of 1e4 keeps its low bits.
            finite = gl.where(maximum == float("-inf"), 0.0, maximum)
            exponentials = gl.exp2((logits - finite[:, None]) * LOG2_E)
            statistic = statistics + column_tile.to(gl.int64) * n_rows + rows
            gl.store(statistic, maximum, mask=present)
            gl.store(statistic + n_rows.to(gl.int64) * column_tiles, gl.sum(exponentials, 1), mask=present)
            if STORED == "exponentials":
                parts = _parts((-exponentials).to(buffer.dtype), PARTS)
                for part in gl.static_range(PARTS):
                    own = staging.index(2 * half + part % 2)
                    _store_part(parts[part], buffer, row0, column0 + part * (COLUMNS // PARTS), own)
    if STORED != "nothing":
        tma.store_wait(pendings=0)


@repeated
@gluon.jit(
    do_not_specialize=["n_rows", "n_columns"],
    do_not_specialize_on_alignment=[
        "counted", "statistics", "subtile_max", "reference", "links", "taken",
    ],
)  # fmt: skip
def hopper_product_kernel(
    # operands: descriptors of (N, H) and (V, H); counted (N,)
    hidden, head, counted,
    # statistics (2, tiles, N), subtile_max (N, whole tiles / SUBTILE); reference (N,), descriptor of the buffer (N,
    # whole tiles)
    statistics, subtile_max, reference, buffer,
    # taken logits: links as ``support_order`` has them, taken (N, E)
    links, taken,
    # sizes and limits
    n_rows, n_columns, width, n_entries, most_above,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, INNER: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr, TAKES: gl.constexpr, STORED: gl.constexpr, PARTS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """PyTorch, tile by tile: ``z = hidden.float() @ head.float().T; m = z.amax(1); statistics = stack([m, (z -
    m).exp().sum(1)]); taken = z.gather(1, ids)``; STORED "exponentials": ``buffer = -(z - reference).exp()``,
    "logits": ``buffer = z; subtile_max = z.view(N, -1, SUBTILE).amax(-1)``."""
    row_tiles = (n_rows + ROWS - 1) // ROWS
    column_tiles = (n_columns + COLUMNS - 1) // COLUMNS
    a_stages = gl.allocate_shared_memory(hidden.dtype, [2 * STAGES, ROWS // 2, INNER], hidden.layout)
    b_stages = gl.allocate_shared_memory(head.dtype, [STAGES, COLUMNS, INNER], head.layout)
    staging = a_stages
    if STORED != "nothing":
        staging = gl.allocate_shared_memory(buffer.dtype, [4, ROWS // 2, COLUMNS // PARTS], buffer.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    gl.warp_specialize(
        [
            (_multiply, (
                0, counted, statistics, subtile_max, reference, buffer, links, taken,
                a_stages, b_stages, staging, ready, free, row_tiles, column_tiles,
                n_rows, n_columns, width, n_entries, most_above,
                ROWS, COLUMNS, INNER, GROUP, STAGES, MASKED, TAKES, STORED, PARTS,
            )),
            (_multiply, (
                1, counted, statistics, subtile_max, reference, buffer, links, taken,
                a_stages, b_stages, staging, ready, free, row_tiles, column_tiles,
                n_rows, n_columns, width, n_entries, most_above,
                ROWS, COLUMNS, INNER, GROUP, STAGES, MASKED, TAKES, STORED, PARTS,
            )),
            (_load_stages, (
                hidden, head, counted, a_stages, b_stages, ready, free, row_tiles, column_tiles, n_rows, width,
                ROWS, COLUMNS, INNER, GROUP, STAGES, MASKED,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@cache
def _layout(block: tuple[int, int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), GL_DTYPES[dtype])


class Described(TensorDescriptor):
    """A descriptor of what ``describable`` has looked at: Triton's own look takes longer than all else here."""

    def __post_init__(self) -> None:
        pass


def _descriptor(matrix: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    return Described(matrix, [*matrix.shape], [*matrix.stride()], [*block], _layout(block, matrix.dtype))


def hopper_product(
    hidden: Tensor, head: Tensor, counted: Tensor | None, statistics: Tensor,
    exponentials: Exponentials | None = None, take: Take | None = None, logits: Logits | None = None,
) -> None:  # fmt: skip
    """Fill ``statistics`` of hidden (N, H) @ head (V, H).T, tiles of COLUMNS columns, and what else is asked for."""
    n_rows, width = hidden.shape
    half = ROWS // 2
    unused = statistics
    buffer: TensorDescriptor | None
    a, b = _descriptor(hidden, (half, INNER)), _descriptor(head, (COLUMNS, INNER))
    stored, parts, buffer = "nothing", 1, None
    if exponentials is not None:
        stored, parts = "exponentials", PARTS_OF_EXPONENTIALS
        buffer = _descriptor(exponentials.buffer, (half, COLUMNS // parts))
    if logits is not None:
        stored, parts = "logits", PARTS_OF_LOGITS
        buffer = _descriptor(logits.buffer, (half, COLUMNS // parts))
    n_tiles = ceil_div(n_rows, ROWS) * ceil_div(head.shape[0], COLUMNS)
    hopper_product_kernel[(min(n_tiles, processors(hidden.device)),)](
        a, b, unused if counted is None else counted,
        statistics, unused if logits is None else logits.subtile_max,
        unused if exponentials is None else exponentials.reference, buffer,
        unused if take is None else take.links, unused if take is None else take.logits,
        n_rows, head.shape[0], width, 0 if take is None else take.logits.shape[1],
        0.0 if exponentials is None else exponentials.most_above,
        ROWS=ROWS, COLUMNS=COLUMNS, INNER=INNER, GROUP=GROUP,
        STAGES=STAGES, MASKED=counted is not None, TAKES=take is not None, STORED=stored, PARTS=parts, num_warps=4,
    )  # fmt: skip
