"""The truth about log-probs read through an output head, and how far from it an implementation may be.

The bounds are those of ``tolerances``: a logit carries the rounding of its product, the logsumexp that of
its logits; half precision gets twice the error of plain PyTorch in that dtype besides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo_conformance.inputs.heads import HeadCase
from sdpo_conformance.specs.claas.bounds import EAGER_FACTOR, FLOAT_FACTOR, HALF_FACTOR, Expectation, tiles

ONE_BY_ONE = 100_000
"""Past so many tokens a float32 sum that is taken token by token rounds further than the other terms allow for."""


def vocabulary_logprobs(case: HeadCase) -> Expectation:
    """log_softmax(hidden @ head.T) with its bound, (B, T, V)."""
    hidden, head = case.hidden.double(), case.head.double()
    z = hidden @ head.T
    truth = z.log_softmax(-1)
    half = case.hidden.dtype in (torch.bfloat16, torch.float16)
    eps = torch.finfo(case.hidden.dtype).eps
    accumulation = min(eps, torch.finfo(torch.float32).eps)
    z_error = (eps if half else 0.0) * z.abs() + accumulation * (hidden.abs() @ head.abs().T)
    normaliser = torch.logsumexp(z, dim=-1, keepdim=True)
    error = z_error + (truth.exp() * z_error).sum(-1, keepdim=True)
    error = error + eps * (normaliser.abs() + truth.abs() + 2)
    if head.shape[0] > ONE_BY_ONE:
        error = error + accumulation * tiles(head.shape[0])
    if not half:
        return Expectation(truth, FLOAT_FACTOR * error)
    eager = (case.hidden @ case.head.T).log_softmax(-1).double()
    eager_error = torch.nan_to_num((eager - truth).abs(), nan=0.0, posinf=0.0)
    return Expectation(truth, HALF_FACTOR * error + EAGER_FACTOR * eager_error)


def at(expectation: Expectation, indices: Tensor) -> Expectation:
    """The expectation at these token ids, (B, T, K) int64."""
    return Expectation(expectation.value.gather(-1, indices), expectation.bound.gather(-1, indices))


def response_logprobs(case: HeadCase) -> Expectation:
    """l[y] with its bound, (B, T)."""
    chosen = at(vocabulary_logprobs(case), case.response_ids.long().unsqueeze(-1))
    return Expectation(chosen.value.squeeze(-1), chosen.bound.squeeze(-1))


def support_size(case: HeadCase) -> int:
    """K: k within [1, V]."""
    return min(max(1, case.k), case.head.shape[0])
