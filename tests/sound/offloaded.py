"""What autograd saves is moved out of torch and brought back for the backward, and the head's product is recomputed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import log_space


def packed(tensor: Tensor) -> tuple[Any, torch.dtype, torch.device]:
    """Bytes on the heap, in a dtype that NumPy has."""
    wide = torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.dtype
    return tensor.detach().to("cpu", wide).numpy().copy(), tensor.dtype, tensor.device


def unpacked(kept: tuple[Any, torch.dtype, torch.device]) -> Tensor:
    values, dtype, device = kept
    return torch.from_numpy(values).to(device, dtype)


def product(hidden: Tensor, head: Tensor, mask: Tensor) -> Tensor:
    """Logits in float32 at least, 0 where the mask is."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    counted = torch.where((mask != 0)[..., None], hidden.to(wide), torch.zeros((), dtype=wide, device=hidden.device))
    return counted @ head.to(wide).T


def compute_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    with torch.autograd.graph.saved_tensors_hooks(packed, unpacked):
        return log_space.compute_sdpo_loss(loss_input)


def compute_fused_sdpo_loss(loss_input: Any) -> Mapping[str, Any]:
    from sdpo_conformance.protocol import SDPOLossInput

    hidden, head = loss_input.student_hidden, loss_input.lm_head_weight
    logits = checkpoint(product, hidden, head, loss_input.response_mask, use_reentrant=False)
    others = {key: value for key, value in vars(loss_input).items() if key not in ("student_hidden", "lm_head_weight")}
    return log_space.compute_sdpo_loss(replace(SDPOLossInput(student_logits=logits, **others)))
