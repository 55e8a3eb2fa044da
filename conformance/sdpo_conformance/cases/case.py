"""One input of an entry, frozen: what the harness asks of it, whatever the spec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class Case(Protocol):
    """The tensors and options that an entry is called with, on the CPU, and how they are handed over.

    ``loss_input``: a dataclass of tensors with a ``training`` of options; ``layout``: of the tensors in memory;
    ``incoming``: the gradient that arrives at the loss; ``name`` of a recorded case, or empty; ``differentiable``: the
    fields whose gradient the implementation owes; ``truth``: the spec's oracle on it.
    """

    @property
    def loss_input(self) -> Any: ...
    @property
    def training(self) -> Any: ...
    @property
    def layout(self) -> str: ...
    @property
    def incoming(self) -> float: ...
    @property
    def name(self) -> str: ...
    @property
    def fused(self) -> bool: ...
    @property
    def differentiable(self) -> tuple[str, ...]: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def truth(self) -> Any: ...

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its field."""

    def rows(self, keep: Tensor) -> Case:
        """Only the batch rows ``keep`` (int64), in that order."""

    def columns(self, keep: Sequence[int]) -> Case:
        """Only the positions ``keep`` of each row, in that order."""

    def tokens_alone(self) -> Iterator[Case]:
        """Every token that counts, as a batch of its own."""

    def save(self, path: Path, extra: Mapping[str, Tensor] | None = None, scratch: bool = False) -> None:
        """Write the case (.safetensors) whole, with ``extra`` tensors beside the inputs; ``scratch``: in place."""


def support_width(case: Case) -> int:
    """K of the support that the input carries, 0 where it carries none."""
    indices = case.tensors().get("teacher_indices")
    return 0 if indices is None else int(indices.shape[-1])


def divergence_incoming(case: Case) -> Tensor:
    """The (B, T) float64 gradient that arrives at ``compute_divergence``'s output: it differs from token to
    token, so that a kernel which ignores or sums it is seen. Multiples of 1/4 are exact in every dtype."""
    mask = case.loss_input.response_mask
    pattern = (torch.arange(mask.numel()) * 7 % 5 + 2).reshape(mask.shape) / 4
    return case.incoming * pattern.to(torch.float64)
