"""Long sums whose terms all have one sign and size: kept in half precision, they stop growing.

bfloat16 holds 8 bits: once a running sum is 256 times its next term, the term is lost. Random terms hide that
behind the rounding of each of them; equal ones lose half of the sum or more. Partial sums over a few tokens that
autograd adds up in the dtype of the head, as chunked losses without a buffer of their own do, stay right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.judging.call import is_fused_entry
from sdpo_conformance.protocol import Capability, FusedSDPOLossInput, SDPOLossInput, TrainingConfig
from sdpo_conformance.specs.claas.loss_case import LossCase


@dataclass(frozen=True)
class LongSum:
    """A sum over ``t`` tokens (the head's gradient, the means), over ``v`` columns (the hidden states' gradient
    at alpha = 1), or over ``k`` support tokens."""

    t: int
    v: int
    k: int
    alpha: float
    head: bool = False


OVER_TOKENS = LongSum(t=513, v=37, k=8, alpha=0.5, head=True)
OVER_TOKENS_REVERSE = LongSum(t=513, v=37, k=8, alpha=1.0, head=True)
OVER_COLUMNS = LongSum(t=2, v=33001, k=8, alpha=1.0)
OVER_SUPPORT = LongSum(t=2, v=1100, k=1025, alpha=0.5)


def long_sums(entry: Capability, dtype: torch.dtype) -> Iterator[LossCase]:
    """One case for each sum that ``entry`` owes."""
    kinds = [OVER_TOKENS, OVER_SUPPORT]
    if entry is not Capability.DIVERGENCE:
        kinds.append(OVER_TOKENS_REVERSE)
    if entry is Capability.FUSED:
        kinds.append(OVER_COLUMNS)
    for seed, kind in enumerate(kinds):
        yield long_sum_case(kind, is_fused_entry(entry), dtype, seed)


def long_sum_case(kind: LongSum, fused: bool, dtype: torch.dtype, seed: int) -> LossCase:
    """Every token has nearly the same hidden state, support, response and teacher; so do the rows of the head,
    with the sign that the teacher's opinion of their token has. The response's own row is 0."""
    generator = torch.Generator().manual_seed(seed)
    width = 8

    def near(*shape: int) -> Tensor:
        return 1 + 0.1 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    liked = torch.where(torch.arange(kind.k) % 2 == 0, 1.0, -1.0).double()
    sign = torch.ones(kind.v, dtype=torch.float64)
    if kind.alpha < 1:
        sign[: kind.k] = liked
    y = kind.v - 1
    sign[y] = 0.0
    hidden = near(1, kind.t, width).to(dtype)
    head = (0.05 * sign.unsqueeze(-1) * near(kind.v, width)).to(dtype)
    z = hidden.double() @ head.double().T
    support = torch.arange(kind.k).expand(1, kind.t, kind.k).contiguous()
    tau = (0.9 * liked * near(1, kind.t, 1)).log_softmax(-1).to(dtype)
    ids = torch.full((1, kind.t), y)
    chosen = z.log_softmax(-1)[..., y]
    training = TrainingConfig(alpha=kind.alpha, kl_reg_weight=0.1)
    shared: dict[str, Any] = {
        "teacher_logprobs": tau,
        "teacher_indices": support,
        "base_logprobs": (chosen - 0.5).float(),
        "response_mask": torch.ones(1, kind.t),
        "old_student_logprobs": (chosen - 0.25).float(),
        "response_ids": ids,
        "training": training,
    }
    if fused:
        return LossCase(FusedSDPOLossInput(hidden, head, **shared), trainable_head=kind.head)
    return LossCase(SDPOLossInput(z.to(dtype), **shared))
