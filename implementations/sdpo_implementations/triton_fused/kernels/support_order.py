"""Which of a token's ids each of the product's tiles holds, so that its epilogue can take their logits.

A tile of 256 columns holds 0.2 of a token's 100 ids: taking their logits there costs less than reading
the head's rows once more, which are 3.3 GB for 4096 tokens of width 4096.

There is a linked list for each row and tile. A link is an int32: the id's column in the tile, its position among the
row's E ids times 2**10, and MORE where another id of the tile follows; -1 where there is none. ``first`` (2, tiles, N)
has the first two links of a tile, which can be loaded ahead; ``following`` (N, E) has, at the position of a link, the
one after the next. Both lie in one tensor, behind the sorted ids (N, E + 2) int64: until the product has started, each
allocation is time that the GPU waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_implementations.triton_fused.launching import repeated
from sdpo_implementations.triton_fused.runtime import INTERPRETED, ceil_div, next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip

COLUMN_BITS = tl.constexpr(10)
COLUMN_MASK = tl.constexpr(2**10 - 1)
POSITION_BITS = tl.constexpr(16)
POSITION_MASK = tl.constexpr(2**16 - 1)
MORE = tl.constexpr(2**26)
MOST_ENTRIES = 2**12
"""Ids a row that are sorted within one program."""


@triton.jit
def first_of_links(links, n_rows, n_entries):
    """Where ``first`` begins."""
    return links + 2 * n_rows.to(tl.int64) * (n_entries + 2)


@triton.jit
def following_of_links(links, n_rows, n_entries, n_tiles):
    """Where ``following`` begins."""
    return first_of_links(links, n_rows, n_entries) + 2 * n_rows.to(tl.int64) * n_tiles


@triton.jit
def _link(key, after, COLUMNS: tl.constexpr):
    """The link of an ordered key, id * 2**16 + position, whose neighbour is ``after``."""
    column = ((key >> POSITION_BITS) % COLUMNS).to(tl.int32)
    position = (key & POSITION_MASK).to(tl.int32)
    more = ((key >> POSITION_BITS) // COLUMNS) == ((after >> POSITION_BITS) // COLUMNS)
    return column | (position << COLUMN_BITS) | tl.where(more, MORE, 0)


@repeated
@triton.jit(
    do_not_specialize=["n_rows"],
    do_not_specialize_on_alignment=["support", "response_ids", "logits"],
)
def ids_of_tiles_kernel(
    # ids (N, K), (N,)
    support, response_ids,
    # results: links as the module's heading has them, logits (N, E)
    links, logits,
    # sizes
    n_rows, k_support, n_entries, vocabulary, n_tiles,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, TILES: tl.constexpr, COLUMNS: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """PyTorch: ``ids = cat([support, response_ids[:, None]], 1); logits[outside the vocabulary] = nan``; then
    ``ids.sort(1)`` cut where ``ids // COLUMNS`` changes."""
    ordered = links.to(tl.pointer_type(tl.int64))
    first = first_of_links(links, n_rows, n_entries)
    following = following_of_links(links, n_rows, n_entries, n_tiles)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wide = rows.to(tl.int64)[:, None]
    present = (rows < n_rows)[:, None]
    entry = tl.arange(0, ENTRIES)[None, :]
    real = present & (entry < n_entries)
    ids = tl.load(support + wide * k_support + entry, mask=present & (entry < k_support), other=0).to(tl.int64)
    if CHOSEN:
        y = tl.load(response_ids + rows, mask=rows < n_rows, other=0).to(tl.int64)
        ids = tl.where(entry == k_support, y[:, None], ids)
    inside = real & (ids >= 0) & (ids < vocabulary)
    # An id outside the vocabulary cannot be reported from here: NaN keeps it from passing for a number.
    nothing = tl.full((ROWS, ENTRIES), float("nan"), tl.float32)
    tl.store(logits + wide * n_entries + entry, nothing, mask=real & (inside == 0))
    for start in range(0, n_tiles, TILES):
        tiles = start + tl.arange(0, TILES)[None, :]
        none = tl.full((ROWS, TILES), -1, tl.int32)
        place = first + tiles.to(tl.int64) * n_rows + wide
        tl.store(place, none, mask=present & (tiles < n_tiles))
        tl.store(place + n_tiles * n_rows, none, mask=present & (tiles < n_tiles))
    beyond = tl.full((ROWS, ENTRIES), 2**56, tl.int64)
    keys = tl.sort(tl.where(inside, (ids << POSITION_BITS) | entry.to(tl.int64), beyond), 1)
    # Neighbours are read back: two places at the end hold what follows the last.
    own = ordered + wide * (n_entries + 2) + entry
    tl.store(own, tl.where(entry < n_entries, keys, beyond), mask=present & (entry < n_entries + 2))
    tl.debug_barrier()
    real = real & (keys < 2**56)
    before = tl.load(own - 1, mask=real & (entry > 0), other=-(2**40))
    second_before = tl.load(own - 2, mask=real & (entry > 1), other=-(2**40))
    after = tl.load(own + 1, mask=real, other=2**56)
    second_after = tl.load(own + 2, mask=real, other=2**56)
    tile = (keys >> POSITION_BITS) // COLUMNS
    leads = tile != ((before >> POSITION_BITS) // COLUMNS)
    second = (leads == 0) & (tile != ((second_before >> POSITION_BITS) // COLUMNS))
    place = first + tile * n_rows + wide + tl.where(second, n_tiles * n_rows, 0)
    tl.store(place, _link(keys, after, COLUMNS), mask=real & (leads | second))
    position = keys & POSITION_MASK
    tl.store(following + wide * n_entries + position, _link(after, second_after, COLUMNS), mask=real)


def ids_of_tiles(support: Tensor, response_ids: Tensor | None, logits: Tensor, vocabulary: int, columns: int) -> Tensor:
    """The links of ``support`` (N, K) and, as entry K, ``response_ids`` (N,), for tiles of ``columns``. ``logits``
    (N, E) float32, which the product will fill, becomes NaN where an id lies outside the vocabulary."""
    n_rows, n_entries = logits.shape
    n_tiles = ceil_div(vocabulary, columns)
    size = n_rows * (2 * (n_entries + 2) + 2 * n_tiles + n_entries)
    links = torch.empty(size, dtype=torch.int32, device=logits.device)
    entries = next_power_of_2(n_entries + 2)
    rows = max(1, min(64, 2**12 // entries, next_power_of_2(n_rows))) if INTERPRETED else max(1, 512 // entries)
    ids_of_tiles_kernel[(ceil_div(n_rows, rows),)](
        support, support if response_ids is None else response_ids, links, logits,
        n_rows, support.shape[1], n_entries, vocabulary, n_tiles,
        ROWS=rows, ENTRIES=entries, TILES=min(256, next_power_of_2(n_tiles)), COLUMNS=columns,
        CHOSEN=response_ids is not None, num_warps=4 if entries <= 1024 else 8,
    )  # fmt: skip
    return links
