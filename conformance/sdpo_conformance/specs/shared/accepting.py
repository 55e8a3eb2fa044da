"""Reading an input for a pipeline: upcast, blank what does not count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs.shared.pipeline import working_dtype


class Reader:
    """Upcasts tensors of one input, or, ``native``, leaves them in their dtypes; ``clean``: puts 0 where the mask is
    0, so that nothing there reaches a product."""

    def __init__(
        self, leading: Tensor, mask: Tensor, rows: Tensor | None, clean: bool = True, native: bool = False
    ) -> None:
        self.dtype = None if native else working_dtype(leading.dtype)
        exact = torch.float64 if leading.dtype == torch.float64 else torch.float32
        self.response_mask = mask.detach().to(exact)
        self.rows = None if rows is None else rows.detach().to(exact).unsqueeze(-1)
        self.mask = self.response_mask if self.rows is None else self.response_mask * self.rows
        self.clean = clean

    def __call__(self, tensor: Any, where: Tensor | None = None) -> Any:
        if tensor is None:
            return None
        value = tensor if self.dtype is None else tensor.to(self.dtype)
        if not self.clean:
            return value
        counted = (self.mask if where is None else where) != 0
        return torch.where(counted if value.dim() == 2 else counted.unsqueeze(-1), value, torch.zeros_like(value))
