"""From a truth and its errors to what an entry must return: bounds by dtype, and the eager yardstick of half precision.

``float32`` and ``float64`` may be off by FLOAT_FACTOR units. ``bfloat16`` and ``float16`` by HALF_FACTOR units and
twice what plain PyTorch is off by that computes every stage in the dtypes it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.judging.expectation import (
    EAGER_FACTOR,
    FLOAT_FACTOR,
    HALF_FACTOR,
    LARGEST_SHARE,
    SMALLEST,
    Expectation,
    Expectations,
)
from sdpo_conformance.specs.shared.oracle.truth import SpecTruth

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Errors:
    """``results`` by name, 0-dim; ``gradient``: of the gradient by the logits, shaped like them; all per unit.
    ``fragile``: float16 has no finite answer in plain PyTorch."""

    results: Mapping[str, Tensor]
    gradient: Tensor
    fragile: bool = False


@dataclass(frozen=True)
class Eager:
    """What plain PyTorch returned, float64 copies."""

    results: Mapping[str, Tensor]
    gradient: Tensor

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(one).all()) for one in (*self.results.values(), self.gradient))


def epsilon(tensor: Tensor) -> float:
    """Unit roundoff step of a floating tensor's dtype; 0 for integers and bool, which are exact."""
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0


def eager_of(plain: Callable[[Any], Mapping[str, Any]], loss_input: Any, incoming: float) -> Eager:
    """Run a plain loss on CPU copies of ``loss_input``, forward and backward."""
    from dataclasses import replace

    leaf = loss_input.student_logits.detach().clone().requires_grad_()
    result = plain(replace(loss_input, student_logits=leaf))
    loss = result["loss"]
    (gradient,) = torch.autograd.grad(loss, [leaf], torch.full_like(loss, incoming), materialize_grads=True)
    numbers = {key: torch.as_tensor(value).detach().double() for key, value in result.items()}
    return Eager(numbers, gradient.double())


def expectations_of(
    tensors: Mapping[str, Tensor],
    masks: tuple[str, ...],
    incoming: float,
    truth: SpecTruth,
    errors: Errors,
    eager: Callable[[], Eager],
    finite: bool,
) -> Expectations:
    """What the plain loss entry must return. ``masks``: fields whose dtype says nothing about rounding; ``finite``:
    whether the published code is."""
    floating = [one.dtype for key, one in tensors.items() if one.is_floating_point() and key not in masks]
    half = any(dtype in HALVES for dtype in floating)
    factor = HALF_FACTOR if half else FLOAT_FACTOR
    eps = max(torch.finfo(dtype).eps for dtype in floating)
    smallest = max(SMALLEST[dtype] for dtype in floating)
    attainable, beside = finite, None
    if errors.fragile and torch.float16 in floating:
        attainable = False
    if half and attainable:
        try:
            beside = eager()
            attainable = beside.finite
        except RuntimeError:
            attainable = False

    def expect(value: Tensor, error: Tensor, rounded: Tensor | None, least: float) -> Expectation:
        bound = factor * (error + eps * value.abs()) + least
        if rounded is not None:
            bound = bound + EAGER_FACTOR * torch.nan_to_num((rounded - value).abs(), nan=0.0, posinf=0.0)
        return Expectation(value, bound)

    values = {"loss": truth.loss, **truth.metrics}
    results = {
        key: expect(values[key], error, beside.results.get(key) if beside else None, smallest)
        for key, error in errors.results.items()
    }
    gradient = expect(
        truth.grad_logits * incoming,
        errors.gradient * abs(incoming),
        beside.gradient if beside else None,
        smallest * max(1.0, abs(incoming)),
    )
    largest = torch.finfo(tensors["student_logits"].dtype).max
    top = float(gradient.value.abs().max()) if gradient.value.numel() else 0.0
    attainable = attainable and top <= LARGEST_SHARE * largest
    attainable = attainable and abs(incoming) <= LARGEST_SHARE * min(torch.finfo(dtype).max for dtype in floating)
    return Expectations(results, {"student_logits": gradient}, attainable)
