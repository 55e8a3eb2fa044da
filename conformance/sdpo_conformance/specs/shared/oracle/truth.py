"""What an oracle says about one input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpecTruth:
    """``loss`` 0-dim; ``metrics``: further results by their name, 0-dim; all float64.

    ``per_token`` (B, T): D of a position before anything multiplies it; ``factor`` (B, T): what multiplies it in the
    loss, the mean's denominator included; ``grad_logits``: d loss / d student_logits, of their shape. ``aside``:
    tensors that the bounds need, named by the spec.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]
    per_token: Tensor
    factor: Tensor
    grad_logits: Tensor
    aside: Mapping[str, Tensor] = field(default_factory=dict)


def upcast(tensor: Tensor) -> Tensor:
    """float64, on the CPU, without graph."""
    return tensor.detach().to("cpu", torch.float64)
