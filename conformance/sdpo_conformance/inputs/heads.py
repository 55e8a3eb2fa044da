"""Hidden states in front of an output head, for the entries that score or rank a vocabulary."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sdpo_conformance.files import write_tensors
from sdpo_conformance.inputs.choices import HypothesisSource, SeededSource, Source

LENGTHS = (2, 3, 5, 7, 9, 12, 17)
LONG = (9, 17, 33, 63, 65, 127, 129, 200, 257, 513)
"""Past chunks of 8 to 512 tokens, never a multiple of them."""

VOCABULARIES = (5, 2, 16, 17, 33, 67, 130, 257, 1000, 2049)
WIDTHS = (4, 1, 7, 16, 33, 64)
LAYOUTS = ("contiguous", "contiguous", "sliced", "transposed", "strided")
"""As for the loss; a trainer passes the slice of the hidden states that predicts the response."""


@dataclass(frozen=True, eq=False)
class HeadCase:
    """``hidden`` (B, T, H) and ``head`` (V, H) of one dtype, ``response_ids`` (B, T) int64, and ``k``;
    ``layout``: how they lie in memory when handed over."""

    hidden: Tensor
    head: Tensor
    response_ids: Tensor
    k: int
    layout: str = "contiguous"

    @property
    def words(self) -> str:
        """For people."""
        b, t, h = self.hidden.shape
        dtype = str(self.hidden.dtype).removeprefix("torch.")
        layout = "" if self.layout == "contiguous" else f", {self.layout}"
        return f"B={b} T={t} V={self.head.shape[0]} H={h} k={self.k}, {dtype}{layout}"

    @property
    def vocabulary(self) -> int:
        return self.head.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its field."""
        return {"hidden": self.hidden, "head": self.head, "response_ids": self.response_ids}

    def save(self, path: Path, extra: Mapping[str, Tensor]) -> None:
        """Write ``path`` (.safetensors) whole, with ``extra`` tensors beside the inputs."""
        write_tensors(path, {**self.tensors(), **extra}, {"k": str(self.k), "layout": self.layout})

    @classmethod
    def load(cls, path: Path) -> HeadCase:
        """Read what ``save`` wrote."""
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata()
        tensors = load_file(path)
        fields = {name: tensors[name] for name in ("hidden", "head", "response_ids")}
        return cls(**fields, k=int(metadata["k"]), layout=metadata["layout"])


@dataclass(frozen=True)
class HeadShape:
    """B, T, V, H and K."""

    b: int
    t: int
    v: int
    h: int
    k: int


def draw_head_shape(source: Source, lengths: Sequence[int]) -> HeadShape:
    """Small shapes, with responses of one of ``lengths``."""
    t = source.pick(list(lengths))
    v = source.pick(VOCABULARIES if t < 60 else VOCABULARIES[:8])
    h = source.pick(WIDTHS)
    b = source.integer(1, 3 if t < 60 else 2)
    return HeadShape(b, t, v, h, source.pick((1, 2, 3, 10, 20, 100, v, v + 5, 0)))


SCALES = (2.0, 0.5, 8.0, 30.0)


def build_head_case(
    source: Source, shape: HeadShape, dtypes: Sequence[torch.dtype], scales: Sequence[float] = SCALES
) -> HeadCase:
    """Logits of unit to large scale, sometimes far from zero, the likeliest tokens sometimes side by side."""
    scale = source.pick(scales)
    shift = source.pick((0.0, 0.0, 3.0))
    dtype = source.pick(list(dtypes))
    generator = torch.Generator().manual_seed(source.integer(0, 2**31 - 1))
    hidden = torch.randn(shape.b, shape.t, shape.h, generator=generator) + shift
    head = torch.randn(shape.v, shape.h, generator=generator) * scale / math.sqrt(shape.h)
    if shape.h > 1 and source.pick((False, True)):
        hidden[..., 0] = 1.0
        head[:, 0] = torch.linspace(0, 4 * scale, shape.v)
    ids = torch.randint(0, shape.v, (shape.b, shape.t), generator=generator)
    if shape.t > 1:
        ids[:, -1] = shape.v - 1
    return HeadCase(hidden.to(dtype), head.to(dtype), ids, shape.k, source.pick(LAYOUTS))


@st.composite
def head_cases(draw: DrawFn, dtypes: Sequence[torch.dtype], lengths: Sequence[int]) -> HeadCase:
    """Hypothesis's choice of the above."""
    source = HypothesisSource(draw)
    return build_head_case(source, draw_head_shape(source, lengths), dtypes)


EDGES = (
    *(HeadShape(2, 2, v, 8, k) for v, k in ((1024, 64), (4096, 20), (4099, 128), (8209, 257), (33001, 5), (70001, 3))),
    *(HeadShape(2, 3, 37, h, 5) for h in (128, 257, 513, 1025, 4097)),
    *(HeadShape(b, 2, 37, 8, 9) for b in (8, 9, 33)),
    *(HeadShape(2, 2, 2049, 16, 300) for _ in range(4)),
    HeadShape(2, 2, 1100, 16, 1025),
    *(HeadShape(2, 2, 37, 8, k) for k in (0, 1, 36, 37, 38)),
    HeadShape(5, 4, 8, 8, 7),
    HeadShape(7, 6, 64, 2, 10),
    HeadShape(4, 3, 4, 3, 2),
    HeadShape(6, 1, 100, 128, 50),
    HeadShape(2, 2, 3, 4, 10**6),
    HeadShape(2, 2, 2, 3, 2),
    HeadShape(1, 1, 151_937, 2, 100),
    *(HeadShape(2, 3, 300, 8, k) for k in (4, 8, 16, 32, 256)),
)
"""Vocabularies, hidden sizes, batches and supports past tiles or a whole number of them, small ones, and such as
coincide."""

REFUSABLE = (HeadShape(2, 3, 37, 8, -3), HeadShape(2, 2, 1, 4, 1))
"""A negative k and a vocabulary of one token: an error is an answer."""

CHUNKED = tuple(HeadShape(2, t, 17, 8, 3) for t in (8, 16, 32, 64, 128, 256, 1024, *LONG[2:], 1025))


def edge_cases(shapes: Sequence[HeadShape], dtypes: Sequence[torch.dtype], seed: int) -> Iterator[HeadCase]:
    """Each shape in a dtype drawn and in the widest, whose bounds hide nothing; in the layouts in turn, no part of the
    vocabulary negligible."""
    widest = min(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    for number, shape in enumerate(shapes):
        case = build_head_case(SeededSource(f"{seed}/{number}"), shape, dtypes, SCALES[:2])
        yield replace(case, layout=LAYOUTS[number % len(LAYOUTS)])
        if case.hidden.dtype != widest:
            yield build_head_case(SeededSource(f"{seed}/{number}"), shape, [widest], SCALES[:2])


SPECIAL = (
    *("raised", "sunk", "zero_row", "zero_hidden", "certain", "sure", "equal_rows", "uniform", "one_id", "int32"),
    *("ends", "repeated", "stairs"),
)


def special_cases(dtypes: Sequence[torch.dtype], seed: int) -> Iterator[HeadCase]:
    """For each dtype: logits far above or below 0 by what is common to a token, a head with a row of zeros, hidden
    states of zeros, a token that is certain by far or only just, two rows of the head alike, all alike, one id for
    every token, int32 ids, ids of 0 and V - 1 at both ends, rows and tokens that are there twice, logits in steps of
    four tokens, so that those at the k-th place are tied and stand before likelier ones."""
    for dtype in dtypes:
        for number, kind in enumerate(SPECIAL):
            shape = HeadShape(2, 5, 37, 8, 6)
            case = build_head_case(SeededSource(f"special/{seed}/{number}"), shape, [dtype], SCALES[:2])
            yield special_case(replace(case, layout=LAYOUTS[number % len(LAYOUTS)]), kind)


def special_case(case: HeadCase, kind: str) -> HeadCase:
    """The case made one of ``SPECIAL``."""
    hidden, head, ids = case.hidden.clone(), case.head.clone(), case.response_ids.clone()
    likely = 3
    if kind in ("raised", "sunk"):
        largest = {torch.bfloat16: 256.0, torch.float16: 1000.0}.get(hidden.dtype, 1e4)
        hidden[..., 0], head[:, 0] = (largest if kind == "raised" else -largest), 1.0
    elif kind == "zero_row":
        head[likely] = 0.0
        ids[:, 0] = likely
    elif kind == "zero_hidden":
        hidden[:, 0] = 0.0
    elif kind in ("certain", "sure"):
        head *= 1.0 if kind == "certain" else 0.1
        hidden[..., 0] = 1.0
        head[:, 0], head[likely, 0] = 0.0, 200.0 if kind == "certain" else 26.0
        ids[:, 0] = likely
    elif kind == "equal_rows":
        head[likely + 1] = head[likely]
        ids[:, 0], ids[:, 1] = likely, likely + 1
    elif kind == "uniform":
        head[:] = head[likely].clone()
    elif kind == "one_id":
        ids[:] = likely
    elif kind == "ends":
        ids[:, 0], ids[:, -1] = 0, 0
        ids[0, 0] = head.shape[0] - 1
    elif kind == "repeated":
        hidden[-1], ids[-1] = hidden[0], ids[0]
        hidden[:, 1], ids[:, 1] = hidden[:, 0], ids[:, 0]
    elif kind == "stairs":
        hidden[..., 0], head[:] = 1.0, 0.0
        head[:, 0] = (torch.arange(head.shape[0]) // 4).to(head)
    else:
        ids = ids.int()
    return replace(case, hidden=hidden, head=head, response_ids=ids)


def unlike(case: HeadCase) -> HeadCase:
    """A case of the same shapes and ids whose log-probs all differ."""
    return replace(case, hidden=case.hidden.flip(-1) * 0.5, head=case.head.roll(1, 0) * 0.75)
