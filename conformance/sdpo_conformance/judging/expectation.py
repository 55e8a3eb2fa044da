"""What an entry must return on a case: the truth, and how far from it a right implementation may be.

``float32`` and ``float64`` may be off by FLOAT_FACTOR units of rounding. ``bfloat16`` and ``float16`` may be off by
HALF_FACTOR units plus EAGER_FACTOR times what plain PyTorch is off by on the same inputs. What a unit is, each spec's
``bounds`` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

FLOAT_FACTOR = 4.0
"""Worst-case units allowed in float32 and float64; see docs/spec.md for what sound implementations use."""

HALF_FACTOR = 0.5
"""Worst-case units allowed in bfloat16 and float16 beyond twice the eager error."""

EAGER_FACTOR = 2.0
"""How much worse than plain PyTorch in the same dtype an implementation may be."""

SMALLEST = {
    torch.float64: 4 * 2.3e-308,
    torch.float32: 4 * 1.2e-38,
    torch.bfloat16: 4 * 1.2e-38,
    torch.float16: 4 * 6.0e-8,
}
"""Results this small may be flushed to zero: a few subnormals of the dtype a gradient is stored in. A kernel that
makes the gradient in its forward pass stores it before it knows the incoming one, which then multiplies them."""

LARGEST_SHARE = 0.5
"""A gradient beyond this share of its dtype's largest number may overflow in any implementation."""


@dataclass(frozen=True)
class Expectation:
    """The true value and how far, elementwise, a right implementation may be from it (same shape)."""

    value: Tensor
    bound: Tensor

    def excess(self, got: Tensor) -> Tensor:
        """|got - value| / bound, elementwise; above 1 is wrong, NaN counts as infinitely wrong."""
        distance = (got - self.value).abs()
        ratio = torch.where(distance == 0, torch.zeros_like(distance), distance / self.bound)
        return torch.nan_to_num(ratio, nan=math.inf, posinf=math.inf)


def epsilon(tensor: Tensor) -> float:
    """Unit roundoff step of a floating tensor's dtype; 0 for integers and bool, which are exact."""
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0


class WhenAsked(Mapping[str, Expectation]):
    """Expectations that are worked out where they are first looked at: many checks look at results alone. What
    ``make`` holds must not hold the case: it would never be let go."""

    def __init__(self, make: Callable[[], Mapping[str, Expectation]]) -> None:
        self._make: Callable[[], Mapping[str, Expectation]] | None = make

    @cached_property
    def _made(self) -> Mapping[str, Expectation]:
        assert self._make is not None
        made = self._make()
        self._make = None
        return made

    def __getitem__(self, key: str) -> Expectation:
        return self._made[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


@dataclass(frozen=True)
class Expectations:
    """What an entry must return on a case. ``clip_fraction`` is an interval, held as centre and half-width:
    a token whose ratio lies within rounding of the cap may count either way. ``attainable`` is False where
    plain PyTorch itself is not finite in these dtypes, which no MUST may ask for."""

    results: dict[str, Expectation]
    gradients: Mapping[str, Expectation]
    attainable: bool
