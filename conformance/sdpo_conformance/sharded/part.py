"""What one rank is handed of a case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

LOGITS, HIDDEN, HEAD = "student_logits", "student_hidden", "lm_head_weight"
"""The fields that are differentiated; tp cuts the first and the last."""


@dataclass(frozen=True)
class Part:
    """One rank's share: ``tensors`` by field, what they ask a gradient for, the first id, the vocabulary's size;
    ``extent``: the columns of all ranks together, padding included."""

    tensors: Mapping[str, Tensor]
    differentiable: tuple[str, ...]
    vocab_start: int
    vocab_size: int
    extent: int
    training: Any
    incoming: float
