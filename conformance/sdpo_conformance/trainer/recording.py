"""The optimizer handed to a trainer: AdamW that takes down each step's gradient and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SETTINGS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
"""The hyperparameters of AdamW that change its result."""


@dataclass
class RecordedStep:
    """One optimizer step. By parameter name, on the CPU in their own dtype: weights ``before`` and ``after``,
    ``gradient`` as the optimizer got it (None: the parameter had none). ``settings`` by parameter name."""

    before: dict[str, Tensor] = field(default_factory=dict)
    gradient: dict[str, Tensor | None] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


class StepRecorder:
    """Names the model's adapter parameters and collects what optimizers of ``optimizer_cls`` do to them.

    A trainer may use several optimizers for one step: calls are one step until a parameter comes up again.
    ``steps``: those of the present call; ``earlier``: those of calls before it.
    """

    def __init__(self, model: Any) -> None:
        self.names: dict[int, str] = {}
        self.keep_alive: list[Tensor] = []
        self.steps: list[RecordedStep] = []
        self.earlier: list[RecordedStep] = []
        self.begin_call(model)

    def begin_call(self, model: Any) -> None:
        """From here on steps are those of another call, which begins at the model's weights as they are."""
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names |= {id(parameter): name for name, parameter in parameters.items()}
        self.start = {name: snapshot(parameter) for name, parameter in parameters.items()}
        self.keep_alive += parameters.values()
        self.earlier += self.steps
        self.steps = []

    @property
    def optimizer_cls(self) -> type[torch.optim.AdamW]:
        """A subclass of AdamW bound to this recorder."""
        recorder = self

        class RecordingAdamW(torch.optim.AdamW):
            def step(self, closure: Callable[[], Any] | None = None) -> Any:
                loss = None
                if closure is not None:
                    with torch.enable_grad():
                        loss = closure()
                recorder.before(self)
                super().step()
                recorder.after(self)
                return loss

        return RecordingAdamW

    def name_of(self, parameter: Tensor) -> str | None:
        """The model's name of a stepped tensor; master copies are recognised by their starting value."""
        if (known := self.names.get(id(parameter))) is not None:
            return known
        value = snapshot(parameter).float()
        for name, start in self.start.items():
            if not self.steps and start.shape == value.shape and torch.equal(start.float(), value):
                self.names[id(parameter)] = name
                self.keep_alive.append(parameter)
                return name
        return None

    def stepped(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor, Mapping[str, Any]]]:
        """Every named tensor of an optimizer with its group."""
        found: list[tuple[str, Tensor, Mapping[str, Any]]] = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self.name_of(parameter)
                if name is not None:
                    found.append((name, parameter, group))
        return found

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Take down gradients and weights."""
        stepped = self.stepped(optimizer)
        if not stepped:
            return
        if not self.steps or any(name in self.steps[-1].before for name, _, _ in stepped):
            self.steps.append(RecordedStep())
        for name, parameter, group in stepped:
            record = self.steps[-1]
            record.before[name] = snapshot(parameter)
            record.gradient[name] = None if parameter.grad is None else snapshot(parameter.grad)
            record.settings[name] = {key: plain(group.get(key)) for key in SETTINGS}

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Take down the updated weights."""
        for name, parameter, _ in self.stepped(optimizer):
            self.steps[-1].after[name] = snapshot(parameter)


def snapshot(tensor: Tensor) -> Tensor:
    """A copy on the CPU that later steps do not touch."""
    return tensor.detach().to("cpu", copy=True)


def plain(value: Any) -> Any:
    """A hyperparameter as plain numbers: torch also takes 0-dim tensors for the learning rate."""
    if isinstance(value, Tensor):
        return float(value)
    if isinstance(value, (tuple, list)):
        return tuple(plain(item) for item in value)
    return value
