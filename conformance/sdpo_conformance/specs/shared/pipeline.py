"""A loss as a sequence of named stages, so that a way to get it wrong is one stage replaced.

Plain PyTorch with autograd, in float32 (float64 for float64 input): run in float64, a wrong stage predicts what an
implementation that has it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

LOG_ZERO = -1e4
"""Stands for log 0: exp of it is 0 in every dtype, and no product or difference with it is NaN."""


class Flow:
    """What the stages read and leave behind: ``accept`` sets the inputs, every stage the attribute of its name."""

    def __init__(self, **inputs: Any) -> None:
        vars(self).update(inputs)

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self)[name] = value

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no stage has left {name!r} yet")


Stage = Callable[[Flow], Any]
Result = Mapping[str, Any]


def as_given(flow: Flow, gradient: Tensor) -> Tensor:
    """A gradient, unchanged."""
    return gradient


def received(incoming: Tensor) -> Tensor:
    """The gradient that arrives at the loss, unchanged."""
    return incoming


def hooked(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The same values; in the backward their gradient passes through ``change``."""
    passed = tensor.view_as(tensor)
    if passed.requires_grad:
        passed.register_hook(change)
    return passed


def only_loss(flow: Flow) -> Result:
    """The mapping that is returned where a spec reports nothing but the loss."""
    return {"loss": flow.loss}


@dataclass(frozen=True)
class Pipeline:
    """``accept`` reads the input, the ``stages`` run in their order, the last of them is ``loss``, ``result`` makes
    the mapping. ``gradient``: what happens to the gradient of the flow's ``z``; ``incoming``: to the one that arrives.
    """

    accept: Callable[..., Flow]
    stages: Mapping[str, Stage] = field(repr=False)
    result: Callable[[Flow], Result] = only_loss
    gradient: Callable[[Flow, Tensor], Tensor] = as_given
    incoming: Callable[[Tensor], Tensor] = received

    def __call__(self, loss_input: Any) -> Result:
        flow = self.accept(loss_input)
        flow.z = hooked(flow.z, partial(self.gradient, flow))
        for name, stage in self.stages.items():
            setattr(flow, name, stage(flow))
        flow.loss = hooked(flow.loss, self.incoming)
        return self.result(flow)

    def natively(self) -> Pipeline:
        """The same with every stage in the dtypes that are given: the yardstick of half precision."""

        def accept(loss_input: Any, clean: bool = True) -> Flow:
            return self.accept(loss_input, clean, native=True)

        return replace(self, accept=accept)

    def but(self, **stages: Stage) -> Pipeline:
        """The same with these stages replaced."""
        if unknown := sorted(set(stages) - set(self.stages)):
            raise KeyError(f"no stage is called {unknown}")
        return replace(self, stages={**self.stages, **stages})

    def touched(self, other: Pipeline) -> frozenset[str]:
        """The names of what differs between two pipelines."""
        found = {name for name in self.stages if self.stages[name] is not other.stages.get(name)}
        parts = ("accept", "result", "gradient", "incoming")
        return frozenset(found | {name for name in parts if getattr(self, name) is not getattr(other, name)})


Change = Callable[[Pipeline], Pipeline]


def replacing(**stages: Stage) -> Change:
    """Put these stages in place of what was there."""
    return lambda before: before.but(**stages)


def around(stage: str, wrapper: Callable[[Stage, Flow], Any]) -> Change:
    """Wrap one stage: ``wrapper`` gets the stage as it was, then the flow."""
    return lambda before: before.but(**{stage: partial(wrapper, before.stages[stage])})


def accepting(wrapper: Callable[[Flow, Any], Flow | None]) -> Change:
    """Change what ``accept`` made of the input: ``wrapper`` gets the flow and the input."""

    def change(before: Pipeline) -> Pipeline:
        def accept(loss_input: Any, clean: bool = True) -> Flow:
            flow = before.accept(loss_input, clean)
            return wrapper(flow, loss_input) or flow

        return replace(before, accept=accept)

    return change


def graded(function: Callable[[Flow, Tensor], Tensor]) -> Change:
    """Change the gradient of the logits."""
    return lambda before: replace(before, gradient=function)


def arriving(function: Callable[[Tensor], Tensor]) -> Change:
    """Change the gradient that arrives at the loss."""
    return lambda before: replace(before, incoming=function)


def both(*changes: Change) -> Change:
    """One change after the other."""

    def change(before: Pipeline) -> Pipeline:
        for one in changes:
            before = one(before)
        return before

    return change


def working_dtype(given: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if given == torch.float64 else torch.float32
