"""How near a number is to what a known mistake would have returned on the same input."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

ROUNDING = 64.0
"""Roundings of the coarsest dtype by which two implementations of one mistake may differ."""

MOST_ERROR = 0.05
"""Relative deviation beyond which a prediction is no evidence, however wide the bound."""

NEARER, NEARER_IN_HALF = 0.2, 0.5
"""A prediction has to come nearer to a wrong number than this share of the truth's distance from it. In half precision
rounding alone may be as large."""


class Input(Protocol):
    """What an entry was called with."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its field."""


def coarsest(case: Input) -> torch.dtype:
    """Of the dtypes that a case's numbers come in, the one that rounds most."""
    floats = [one.dtype for one in case.tensors().values() if one.is_floating_point()]
    return max(floats, key=roundoff)


def roundoff(dtype: torch.dtype) -> float:
    """The relative size of a rounding in this dtype."""
    return torch.finfo(dtype).eps


def largest(*sizes: Tensor) -> float:
    """The largest finite number among these."""
    return max(float(torch.nan_to_num(one, posinf=0.0).max()) for one in sizes)


def likeness(got: Tensor, predicted: Tensor, bound: Tensor, eps: float) -> tuple[bool, float]:
    """Whether ``got`` is ``predicted`` up to rounding, and the largest distance. NaN matches NaN; another shape is
    infinitely far.

    The oracle's ``bound`` says what cancels; beyond it a prediction may be off by its own rounding, ``eps``, token by
    token."""
    if got.shape != predicted.shape:
        return False, math.inf
    if got.numel() == 0:
        return True, 0.0
    same = (got == predicted) | (got.isnan() & predicted.isnan())
    distance = torch.where(same, 0.0, (got - predicted).abs())
    size = predicted.abs().amax(-1, keepdim=True) if predicted.dim() else predicted.abs()
    allowed = bound + ROUNDING * eps * torch.nan_to_num(size, posinf=0.0)
    off = float(distance.max())
    return bool((distance <= allowed).all()), math.inf if math.isnan(off) else off


def left(got: Tensor, predicted: Tensor, truth: Tensor) -> float:
    """What a prediction leaves of a wrong number's distance from the truth, as far as both are finite."""
    off, wrong = (got - predicted).abs(), (got - truth).abs()
    known = off.isfinite() & wrong.isfinite()
    return share(float(off[known].max()), float(wrong[known].max())) if bool(known.any()) else 0.0


def nearer(left: float, eps: float) -> bool:
    """Whether a prediction that leaves so much tells a wrong number; ``eps``: the roundoff of what was given."""
    return left <= (NEARER_IN_HALF if eps > roundoff(torch.float32) else NEARER)


def share(off: float, size: float) -> float:
    """A distance in parts of a size; as it is where that is 0."""
    return off / size if size else off
