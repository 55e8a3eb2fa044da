"""Losses over logits that exist, token by token: what the entries of lasgroup, TRL, ms-swift and verl are made of.

Kernels go over (N, V) and (N, K). A divergence comes back as (N,) float64 with a graph to the logits; what an entry
makes of it (ratio, weights, its kind of mean) is a few operations on N numbers and is left to PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdpo_implementations.triton_fused.inputs import check_features, check_range, check_tensor, flat, require
from sdpo_implementations.triton_fused.kernels.category_loss import SupportTerms, category_terms
from sdpo_implementations.triton_fused.kernels.logits_entry import pick_tokens
from sdpo_implementations.triton_fused.kernels.row_gradient import row_gradient
from sdpo_implementations.triton_fused.kernels.row_statistics import RowStatistics, row_statistics
from sdpo_implementations.triton_fused.kernels.row_topk import row_topk
from sdpo_implementations.triton_fused.kernels.vocabulary_loss import (
    Sides,
    two_sides,
    vocabulary_gradient,
    vocabulary_values,
)
from sdpo_implementations.triton_fused.runtime import INTERPRETED, on_device

CLAIMS: dict[str, Any] = {
    "dtypes": ["float32", "bfloat16", "float16"],
    "devices": ["cpu", "cuda"] if INTERPRETED else ["cuda"],
}
"""``SDPO_CLAIMS`` of each entry's module."""

LOG_RATIO_CLAMP = 20.0

MOST_ENTRIES = 4096
"""Categories of a token that one program holds."""


@dataclass(frozen=True)
class Rows:
    """Logits (N, V) of N tokens with what one reading of them gives; ``temperature`` divides them."""

    logits: Tensor
    counted: Tensor
    temperature: float
    statistics: RowStatistics

    @classmethod
    def read(cls, logits: Tensor, counted: Tensor, temperature: float, sums: bool = True, maxima: bool = False) -> Rows:
        """``sums``: for log-probs; ``maxima``: for a top-k. Neither: the rows are not read."""
        logits = logits.detach()
        nothing = RowStatistics(None, None, None)
        with on_device(logits):
            found = row_statistics(logits, counted, temperature, sums, maxima) if sums or maxima else nothing
        return cls(logits, counted, temperature, found)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """(values float32, indices int64), each (N, k), of the k largest in no order."""
        assert self.statistics.stretch_max is not None
        require_entries(k)
        with on_device(self.logits):
            return row_topk(self.logits, self.statistics.stretch_max, k)

    def at(self, ids: Tensor) -> Tensor:
        """(N, K) float32: the logits at ``ids`` (N, K); NaN where an id lies outside the vocabulary."""
        with on_device(self.logits):
            return pick_tokens(self.logits, ids, self.counted)

    def logprobs(self, ids: Tensor) -> Tensor:
        """(N,) float64: log_softmax(logits / temperature) at ``ids`` (N,); 0 where a row does not count."""
        row_max, log_sum = self.statistics.row_max, self.statistics.log_sum
        assert row_max is not None
        assert log_sum is not None
        z = self.at(ids.unsqueeze(-1)).squeeze(-1).double()
        return torch.where(self.counted != 0, (z - row_max) / self.temperature - log_sum, 0.0)


class SupportLoss(torch.autograd.Function):
    """(logits (N, V), rows, terms) -> terms.values (N,) float64. Without a pull the logits are not kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Rows, terms: SupportTerms) -> Tensor:
        ctx.shape, ctx.dtype = tuple(logits.shape), logits.dtype
        ctx.statistics, ctx.temperature, ctx.terms = rows.statistics, rows.temperature, terms
        ctx.save_for_backward(*([] if terms.pull is None else [logits]))
        return terms.values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor, None, None]:
        logits = ctx.saved_tensors[0] if ctx.saved_tensors else None
        scale = grad_values.to(torch.float32).contiguous()
        with on_device(scale):
            gradient = row_gradient(logits, ctx.statistics, ctx.temperature, ctx.terms, scale, ctx.shape, ctx.dtype)
        return gradient.to(ctx.dtype), None, None


class VocabularyLoss(torch.autograd.Function):
    """(logits (N, V), sides, counted) -> D (N,) float64 over the whole vocabulary."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, sides: Sides, counted: Tensor) -> Tensor:
        with on_device(logits):
            values = vocabulary_values(sides, counted)
        ctx.save_for_backward(logits, sides.teacher)
        ctx.sides, ctx.values = sides, values
        return values[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor, None, None]:
        logits, _ = ctx.saved_tensors
        scale = grad_values.to(torch.float32).contiguous()
        with on_device(logits):
            gradient = vocabulary_gradient(ctx.sides, ctx.values, scale)
        return gradient.to(logits.dtype), None, None


def support_loss(logits: Tensor, rows: Rows, terms: SupportTerms) -> Tensor:
    """``terms.values`` with a graph to ``logits`` (N, V)."""
    values: Tensor = SupportLoss.apply(logits, rows, terms)
    return values


def category_loss(
    logits: Tensor, rows: Rows, at_student: Tensor, at_teacher: Tensor, teacher_rows: Rows | None,
    teacher_temperature: float, support: Tensor, alpha: float, tail: bool,
) -> Tensor:  # fmt: skip
    """A divergence over the categories of ``support`` (N, K), (N,) float64 with a graph to ``logits`` (N, V).

    ``at_student``: the logits there; ``at_teacher``: its logits, with ``teacher_rows`` where a tail needs their
    log-probs, or its log-probs; alpha 0 is the forward KL, 1 the reverse KL.
    """
    with on_device(logits):
        terms = category_terms(
            at_student, rows.statistics if tail else None, rows.temperature,
            at_teacher, None if teacher_rows is None else teacher_rows.statistics, teacher_temperature,
            support, rows.counted, alpha, tail,
        )  # fmt: skip
    return support_loss(logits, rows, terms)


def vocabulary_loss(
    logits: Tensor, teacher: Tensor, teacher_rows: Tensor, counted: Tensor, alpha: float, temperature: float
) -> tuple[Tensor, Sides]:
    """The divergence over the whole vocabulary, (N,) float64 with a graph to ``logits`` (N, V); and the sides read."""
    with on_device(logits):
        sides = two_sides(logits.detach(), teacher, teacher_rows, counted, alpha, temperature)
    values: Tensor = VocabularyLoss.apply(logits, sides, counted)
    return values, sides


def sampled_terms(chosen: Tensor, teacher_chosen: Tensor, ids: Tensor, temperature: float) -> SupportTerms:
    """sg(l[y] - lt[y]) l[y] of log-probs (N,) at the sampled ``ids`` (N,): the slope pulls y up, all else down."""
    slope = chosen - teacher_chosen
    return SupportTerms(
        values=slope * chosen,
        support=ids.unsqueeze(-1),
        at_support=(slope * -torch.expm1(chosen) / temperature).to(torch.float32).unsqueeze(-1),
        pull=(slope / temperature).to(torch.float32),
    )


def importance_ratio(chosen: Tensor, old: Tensor, counted: Tensor, cap: float) -> Tensor:
    """(N,) float64: min(exp(clamp(chosen - old, -20, 20)), cap), without graph; 1 where nothing counts."""
    log_ratio = (chosen - old.detach().double()).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return torch.where(counted != 0, log_ratio.exp().clamp(max=cap), 1.0)


def read_student(loss_input: Any, spec: str) -> Tensor:
    """``student_logits`` (B, T, V), checked. Raises ValueError, by name for what is not served."""
    if getattr(loss_input, "mesh", None) is not None:
        raise ValueError(f"triton_fused's {spec} loss is that of one process: it takes no mesh")
    if not hasattr(loss_input, "student_logits"):
        raise ValueError(f"triton_fused's {spec} loss is computed from student_logits, which the input does not have")
    logits: Tensor = loss_input.student_logits
    check_features("student_logits", logits)
    return logits


def require_entries(k: int) -> None:
    """Raise ValueError for a support larger than a program holds."""
    require(k <= MOST_ENTRIES, f"triton_fused serves supports of at most {MOST_ENTRIES} tokens, got {k}")


def require_temperature(temperature: Any) -> float:
    """A positive temperature; raises ValueError."""
    require(temperature > 0, f"temperature must be above 0, got {temperature}")
    return float(temperature)


def check_ids(name: str, ids: Any, shape: tuple[int, ...], vocabulary: int, counted: Tensor) -> Tensor:
    """Token ids of ``shape``, (B, T) or (B, T, K), flat and contiguous; on the CPU their range is checked too."""
    check_tensor(name, ids, shape, counted.device, integers=True)
    if counted.device.type == "cpu":
        check_range(name, flat(ids), vocabulary, counted != 0)
    return flat(ids).contiguous()


def check_values(name: str, values: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A tensor of ``shape`` on ``device``, without graph."""
    check_tensor(name, values, shape, device, integers=False)
    found: Tensor = values.detach()
    return found


def combined_mask(name: str, mask: Any, rows: Any, shape: tuple[int, int], device: torch.device) -> Tensor:
    """(B, T) float64: the mask times that of the rows (B,), where there is one."""
    found = check_values(name, mask, shape, device).double()
    if rows is None:
        return found
    return found * check_values("self_distillation_mask", rows, shape[:1], device).double().unsqueeze(-1)


def without_tokens(logits: Tensor) -> Tensor:
    """A loss of 0 for a batch that has no position, differentiable."""
    return logits.double().sum() * 0.0
