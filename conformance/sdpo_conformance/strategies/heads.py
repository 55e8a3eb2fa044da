"""Hidden states in front of an output head, for the entries that score or rank a vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

LENGTHS = (2, 3, 5, 7, 9, 12, 17)
LONG = (9, 17, 33, 63, 65, 127, 129, 200, 257, 513)
"""Past chunks of 8 to 512 tokens, never a multiple of them."""

VOCABULARIES = (5, 2, 16, 17, 33, 67, 130, 257, 1000, 2049)
WIDTHS = (4, 1, 7, 16, 33, 64)


@dataclass(frozen=True, eq=False)
class HeadCase:
    """``hidden`` (B, T, H) and ``head`` (V, H) of one dtype, ``response_ids`` (B, T) int64, and ``k``."""

    hidden: Tensor
    head: Tensor
    response_ids: Tensor
    k: int

    @property
    def words(self) -> str:
        """For people."""
        b, t, h = self.hidden.shape
        dtype = str(self.hidden.dtype).removeprefix("torch.")
        return f"B={b} T={t} V={self.head.shape[0]} H={h} k={self.k}, {dtype}"


@st.composite
def head_cases(draw: DrawFn, dtypes: Sequence[torch.dtype], lengths: Sequence[int]) -> HeadCase:
    """Cases with responses of one of ``lengths``; logits of unit to large scale, sometimes far from zero."""
    length = draw(st.sampled_from(list(lengths)))
    vocabulary = draw(st.sampled_from(VOCABULARIES if length < 60 else VOCABULARIES[:8]))
    width = draw(st.sampled_from(WIDTHS))
    rows = draw(st.integers(1, 3 if length < 60 else 2))
    scale = draw(st.sampled_from((2.0, 0.5, 8.0, 30.0)))
    shift = draw(st.sampled_from((0.0, 0.0, 3.0)))
    k = draw(st.sampled_from((1, 2, 3, 10, 20, 100, vocabulary, vocabulary + 5, 0)))
    dtype = draw(st.sampled_from(list(dtypes)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    hidden = torch.randn(rows, length, width, generator=generator) + shift
    head = torch.randn(vocabulary, width, generator=generator) * scale / math.sqrt(width)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    return HeadCase(hidden.to(dtype), head.to(dtype), ids, k)
