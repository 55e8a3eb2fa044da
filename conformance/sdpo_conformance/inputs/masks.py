"""Masks made from masks."""

from __future__ import annotations

from torch import Tensor


def without_every_second(mask: Tensor) -> Tensor:
    """The mask, (B, T) in any dtype, with 0 for every second value above 0; as it is where one is."""
    counted = mask > 0
    place = counted.flatten().cumsum(0).reshape(mask.shape)
    return mask.masked_fill(counted & (place % 2 == 0), 0)
