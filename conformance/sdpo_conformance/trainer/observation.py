"""Running a trainer on a scenario and taking down everything it did; once per trainer and scenario."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.judging.call import ImplementationError, implementation_errors
from sdpo_conformance.protocol import Sample, StepMetrics, TrainingConfig
from sdpo_conformance.trainer.models import adapter_weights, build, frozen_weights
from sdpo_conformance.trainer.recording import RecordedStep, StepRecorder
from sdpo_conformance.trainer.scenarios import Scenario, samples_of

METRICS = ("total_loss", "distill_loss", "kl_reg", "mean_is_ratio", "clip_fraction", "grad_norm")


@dataclass(frozen=True, eq=False)
class Observation:
    """One run. ``metrics``: per step, a number per key that was there. ``steps``: what the recording
    optimizer saw, empty where the trainer made its own. ``start`` and ``final``: the adapter before and
    after. ``changed``: what else of the model changed, in words."""

    scenario: Scenario
    metrics: tuple[Mapping[str, float], ...]
    steps: tuple[RecordedStep, ...]
    start: Mapping[str, Tensor]
    final: Mapping[str, Tensor]
    changed: tuple[str, ...]

    @property
    def observed(self) -> bool:
        """Whether each step's gradient and weights are known."""
        return len(self.steps) > 0


@dataclass(frozen=True)
class Refusal:
    """The trainer raised. ``changed``: what the attempt changed in the model all the same, in words."""

    error: BaseException
    changed: tuple[str, ...]


class ModelState:
    """What a trainer owes back: frozen weights, trainable flags, the adapter enabled and active."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.frozen = frozen_weights(model)
        self.trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self.adapter = adapter_weights(model)
        self.active = list(model.active_adapters)

    def changed_frozen(self) -> tuple[str, ...]:
        """What differs now, the adapter's own weights apart."""
        found: list[str] = []
        now = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, before in self.frozen.items():
            if name not in now:
                found.append(f"{name} is gone")
            elif not same(before, now[name].detach().cpu()):
                found.append(f"frozen weight {name} changed")
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and name not in self.trainable:
                found.append(f"{name} now asks for a gradient")
        status = self.model.get_model_status()
        if status.enabled is not True:
            found.append("the adapter is left disabled")
        if list(self.model.active_adapters) != self.active:
            found.append(f"the active adapter is {self.model.active_adapters}, was {self.active}")
        if status.merged_adapters:
            found.append("the adapter is left merged into the base")
        return tuple(found)

    def changed(self) -> tuple[str, ...]:
        """What differs now, the adapter's weights included."""
        now = dict(self.model.named_parameters())
        moved = [name for name, weight in self.adapter.items() if not same(weight, now[name].detach().cpu())]
        return (*self.changed_frozen(), *(f"adapter weight {name} changed" for name in moved))


def same(before: Tensor, after: Tensor) -> bool:
    """Bit for bit, NaN equal to NaN."""
    if before.shape != after.shape:
        return False
    return bool(torch.equal(torch.nan_to_num(before), torch.nan_to_num(after)))


_KEPT: dict[tuple[int, Scenario, str], tuple[Any, Observation | ImplementationError]] = {}


def observe(distill: Callable[..., Any], scenario: Scenario, device: str = "cpu", owner: Any = None) -> Observation:
    """Run the trainer on the scenario, or recall that it was; raises ImplementationError if it did not
    deliver. Runs are kept by ``owner``, what ``distill`` is an attribute of: a bound method is a new object
    each time it is asked for."""
    owner = distill if owner is None else owner
    key = (id(owner), scenario, device)
    if key not in _KEPT:
        try:
            _KEPT[key] = (owner, run(distill, scenario, device))
        except ImplementationError as error:
            _KEPT[key] = (owner, error)
    found = _KEPT[key][1]
    if isinstance(found, ImplementationError):
        raise found
    return found


def run(distill: Callable[..., Any], scenario: Scenario, device: str) -> Observation:
    """One run, without the memory."""
    model = build(scenario.model, device)
    state, recorder = ModelState(model), StepRecorder(model)
    samples = samples_of(scenario)
    handed = deepcopy(samples)
    if scenario.another_first:
        with implementation_errors("distill"), seeded(scenario.seed):
            distill(disturbed(model), list(deepcopy(samples)), scenario.training, torch.optim.AdamW)
    with implementation_errors("distill"), seeded(scenario.seed):
        returned = distill(model, list(handed), scenario.training, recorder.optimizer_cls)
    with implementation_errors("reading the model after distill"):
        changed = state.changed_frozen() + changed_samples(samples, handed)
        now = dict(model.named_parameters())
        final = {name: now[name].detach().to("cpu", copy=True) for name in state.adapter if name in now}
    return Observation(
        scenario=scenario,
        metrics=read_metrics(returned),
        steps=tuple(recorder.steps),
        start=state.adapter,
        final=final,
        changed=changed,
    )


def attempt(
    distill: Callable[..., Any],
    scenario: Scenario,
    samples: Sequence[Sample],
    training: TrainingConfig,
    device: str = "cpu",
) -> Refusal | None:
    """Run the trainer on input it may refuse: what it raised and changed, or None if it raised nothing."""
    model = build(scenario.model, device)
    state, recorder = ModelState(model), StepRecorder(model)
    try:
        with implementation_errors("distill"), seeded(scenario.seed):
            try:
                distill(model, deepcopy(list(samples)), training, recorder.optimizer_cls)
            except Exception as error:
                return Refusal(error, state.changed())
    except ImplementationError as error:
        return Refusal(error, ())
    return None


def disturbed(model: Any) -> Any:
    """A copy of the model with other weights."""
    other = deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return other


def changed_samples(before: Sequence[Sample], after: Sequence[Sample]) -> tuple[str, ...]:
    """What a trainer wrote into the samples it was handed."""
    found: list[str] = []
    for index, (old, new) in enumerate(zip(before, after, strict=True), start=1):
        found += [f"{name} of sample {index} changed" for name, was in vars(old).items() if vars(new)[name] != was]
    return tuple(found)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global random state fixed inside and as found afterwards."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


def read_metrics(returned: Any) -> tuple[Mapping[str, float], ...]:
    """``per_step_metrics`` as plain numbers; raises ImplementationError where there is none."""
    if not isinstance(returned, Mapping) or "per_step_metrics" not in returned:
        kind = type(returned).__name__
        raise ImplementationError(f"distill returned a {kind} without per_step_metrics, expected a mapping")
    entries = returned["per_step_metrics"]
    if not isinstance(entries, Sequence) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ImplementationError("per_step_metrics is no list of mappings")
    found = []
    for entry in entries:
        numbers: dict[str, float] = {}
        for key in StepMetrics.__annotations__:
            if key in entry:
                try:
                    numbers[key] = float(entry[key])
                except (TypeError, ValueError, RuntimeError):
                    kind = type(entry[key]).__name__
                    raise ImplementationError(f"per_step_metrics has {key} as a {kind}, no number") from None
        found.append(numbers)
    return tuple(found)
