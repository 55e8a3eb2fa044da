"""The float64 truth about some tokens of a workload, and how far plain PyTorch is from it on the same inputs.

The whole workload in float64 would not fit, so a slice of tokens is judged, spread over the whole; a token's part
of the loss does not depend on the others but through n. The logits are made in float64 on the device the inputs
lie on, from the very hidden states and head; the oracle takes it from there on the CPU.

The worst-case bounds of ``tolerances`` add up rounding over the vocabulary: at 38,000 entries and bfloat16 they
measure 30 times the gradient itself and would pass anything. What is asked here is their other half: at most
``EAGER_FACTOR`` times the error of plain PyTorch (``FLOAT_FACTOR`` in float32), compared as distributions over the
tokens, plus a few units of rounding. Conformance proper is judged by the recorded cases (``judging``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sdpo_conformance.bench.bench_inputs import Inputs, inputs_of
from sdpo_conformance.bench.workloads import Workload
from sdpo_conformance.cases.precision import DTYPES
from sdpo_conformance.judging.expectation import EAGER_FACTOR, FLOAT_FACTOR
from sdpo_conformance.protocol import FusedSDPOLossInput, TrainingConfig
from sdpo_conformance.specs import DEFAULT, find_spec
from sdpo_conformance.specs.spec import Timed

SLICE_ELEMENTS = 2**22
"""float64 logits judged: 27 tokens of a vocabulary of 152,000."""

MOST_TOKENS = 64
ROUNDING_UNITS = 8.0
QUANTILES = (0.5, 0.9)
"""Of the tokens' gradient errors: half of them, and nine in ten."""

VOCABULARY_CHUNK = 16384

AS_DRAWN = (
    "teacher_logprobs",
    "teacher_indices",
    "base_logprobs",
    "response_mask",
    "old_student_logprobs",
    "response_ids",
)
"""The fields of the loss's input that are handed over as they were drawn."""


@dataclass(frozen=True)
class SliceTruth:
    """Tokens ``keep`` (S,) of the workload. ``gradient`` (1, S, H) float64 on the CPU, that of the slice's own mean.
    ``allowed_*``: the errors a right implementation may show; ``eager_*``: plain PyTorch's own. Loss errors are
    relative to ``scale``, the sum of the tokens' absolute terms."""

    keep: Tensor
    inputs: Inputs
    loss: float
    gradient: Tensor
    scale: float
    allowed_loss: float
    allowed_gradient: tuple[float, ...]
    eager_loss: float
    eager_gradient: tuple[float, ...]

    def loss_error(self, got: float) -> float:
        return abs(got - self.loss) / self.scale

    def gradient_errors(self, got: Tensor) -> tuple[float, ...]:
        """Quantiles over the tokens of |got - true| / |true|, ``got`` (1, S, H)."""
        return token_errors(got, self.gradient)


def token_errors(got: Tensor, true: Tensor) -> tuple[float, ...]:
    """``QUANTILES`` of the tokens' relative errors; a NaN counts as infinite."""
    distance = (got.double().cpu() - true).norm(dim=-1) / true.norm(dim=-1).clamp(min=1e-300)
    distance = torch.nan_to_num(distance, nan=float("inf"), posinf=float("inf")).flatten().sort().values
    return tuple(float(distance[min(len(distance) - 1, int(q * len(distance)))]) for q in QUANTILES)


def kept_tokens(work: Workload) -> Tensor:
    """The tokens of a work that are judged."""
    return spread(work.tokens, work.head.vocabulary)


def spread(tokens: int, vocabulary: int) -> Tensor:
    """Evenly spread token positions, the first and the last among them, int64 on the CPU."""
    count = max(1, min(tokens, MOST_TOKENS, SLICE_ELEMENTS // vocabulary))
    return torch.linspace(0, tokens - 1, count).round().long().unique()


def work_inputs(work: Workload) -> Inputs:
    return inputs_of(work.workload, work.tokens, work.top_k, work.dtype, work.device, work.support)


@lru_cache(maxsize=1)
def slice_logits(workload: str, tokens: int, top_k: int, dtype: str, device: str, support: str) -> Tensor:
    """(1, S, V) float64 on the CPU; kept for the settings of alpha and anchor that share it."""
    inputs = inputs_of(workload, tokens, top_k, dtype, device, support)
    keep = spread(tokens, inputs.head.shape[0]).to(device)
    return product(inputs.hidden.detach()[:, keep], inputs.head)


def product(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden @ head.T in float64, (..., V), on the CPU."""
    parts = [hidden.double() @ part.double().T for part in head.split(VOCABULARY_CHUNK)]
    return torch.cat(parts, dim=-1).cpu()


def through_head(logits_gradient: Tensor, head: Tensor) -> Tensor:
    """logits_gradient @ head in float64, (..., H), on the CPU."""
    total = torch.zeros(*logits_gradient.shape[:-1], head.shape[1], dtype=torch.float64, device=head.device)
    for start, part in zip(range(0, len(head), VOCABULARY_CHUNK), head.split(VOCABULARY_CHUNK), strict=True):
        total += logits_gradient[..., start : start + len(part)].to(head.device) @ part.double()
    return total.cpu()


def rounding(work: Workload) -> float:
    """A few units of the working dtype."""
    return ROUNDING_UNITS * float(torch.finfo(DTYPES[work.dtype]).eps)


def factor(work: Workload) -> float:
    """How many times plain PyTorch's error is allowed."""
    return EAGER_FACTOR if DTYPES[work.dtype] in (torch.bfloat16, torch.float16) else FLOAT_FACTOR


@lru_cache(maxsize=4)
def slice_truth(work: Workload, on_policy: bool = False) -> SliceTruth:
    """The truth for a loss direction. ``on_policy``: old log-probs are the student's own, so that the ratio is 1
    and the loss the mean divergence."""
    whole = work_inputs(work)
    keep = kept_tokens(work)
    inputs = whole.tokens(keep.to(whole.hidden.device))
    logits = slice_logits(work.workload, work.tokens, work.top_k, work.dtype, work.device, work.support)
    loss_input = FusedSDPOLossInput(
        student_hidden=inputs.hidden.detach(),
        lm_head_weight=inputs.head,
        training=TrainingConfig(alpha=work.alpha, kl_reg_weight=work.anchor),
        **{name: getattr(inputs, name) for name in AS_DRAWN},
    )
    truth = timed().truth(logits, loss_input, on_policy)
    gradient = through_head(truth.gradient, inputs.head)
    eager_gradient = token_errors(truth.eager_gradient, gradient)
    return SliceTruth(
        keep=keep,
        inputs=inputs,
        loss=truth.loss,
        gradient=gradient,
        scale=truth.scale,
        allowed_loss=factor(work) * truth.eager_error + rounding(work),
        allowed_gradient=tuple(factor(work) * error + rounding(work) for error in eager_gradient),
        eager_loss=abs(truth.eager_loss - truth.loss) / truth.scale,
        eager_gradient=eager_gradient,
    )


def timed() -> Timed:
    """What the spec whose loss is timed says about it."""
    found = find_spec(DEFAULT).parts.timed
    assert found is not None
    return found()
