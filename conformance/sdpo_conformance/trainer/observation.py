"""Running a trainer on a scenario and taking down everything it did; once per trainer and scenario."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.judging.call import ImplementationError, implementation_errors
from sdpo_conformance.judging.settings import process_settings, random_state, restore_settings, seeded
from sdpo_conformance.protocol import Sample, StepMetrics, TrainingConfig
from sdpo_conformance.trainer.models import adapter_weights, build, frozen_weights
from sdpo_conformance.trainer.recording import RecordedStep, StepRecorder
from sdpo_conformance.trainer.scenarios import Scenario, sampled_otherwise, samples_of

METRICS = ("total_loss", "distill_loss", "kl_reg", "mean_is_ratio", "clip_fraction", "grad_norm")


@dataclass(frozen=True, eq=False)
class Observation:
    """One run. ``metrics``: per step, a number per key that was there. ``steps``: what the recording
    optimizer saw, empty where the trainer made its own; ``earlier``: those of calls on this model before this one.
    ``start`` and ``final``: the adapter before and after. ``changed``: what else of the model changed, in words.
    ``notes``: why another model than the scenario's was taken, in words."""

    scenario: Scenario
    metrics: tuple[Mapping[str, float], ...]
    steps: tuple[RecordedStep, ...]
    start: Mapping[str, Tensor]
    final: Mapping[str, Tensor]
    changed: tuple[str, ...]
    earlier: tuple[RecordedStep, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def observed(self) -> bool:
        """Whether each step's gradient and weights are known."""
        return len(self.steps) > 0


@dataclass(frozen=True)
class Refusal:
    """The trainer raised. ``changed``: what the attempt changed in the model all the same, in words."""

    error: BaseException
    changed: tuple[str, ...]


PROBE = (1, 3, 0, 2, 5, 4)
"""The token ids that a model's logits are compared at before and after."""


class ModelState:
    """What a trainer owes back: frozen weights, trainable flags, the adapter enabled and active, training modes, no
    hooks of its own, and the process's settings. With its first weights the model computes what it did."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.frozen = frozen_weights(model)
        self.trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self.adapter = adapter_weights(model)
        self.active = list(model.active_adapters)
        self.modes = {name for name, module in model.named_modules() if module.training}
        self.hooks = hooks_of(model)
        self.settings = process_settings()
        self.logits = self.probe()

    @torch.no_grad()
    def probe(self) -> Tensor:
        """The logits of a few tokens, (1, L, V) on the CPU, the modules' modes left as they are."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        ids = torch.tensor([PROBE], device=next(self.model.parameters()).device)
        try:
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits.to("cpu", copy=True)
        finally:
            for module, mode in modes:
                module.training = mode

    def computes_another(self) -> bool:
        """Whether the model with its first weights now gives other logits: a hook, a setting, a buffer."""
        parameters = dict(self.model.named_parameters())
        if any(name not in parameters for name in self.adapter):
            return True
        now = {name: parameters[name].detach().clone() for name in self.adapter}
        with torch.no_grad():
            for name, start in self.adapter.items():
                parameters[name].copy_(start)
            logits = self.probe()
            for name, weight in now.items():
                parameters[name].copy_(weight)
        scale = float(self.logits.abs().max())
        return not bool((logits - self.logits).abs().max() <= 8 * torch.finfo(logits.dtype).eps * scale)

    def changed_frozen(self) -> tuple[str, ...]:
        """What differs now, the adapter's own weights apart."""
        found: list[str] = []
        if (active := list(self.model.active_adapters)) != self.active:
            found.append(f"the active adapter is {', '.join(active)}, was {', '.join(self.active)}")
        now = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, before in self.frozen.items():
            if name not in now:
                found.append(f"{name} is gone")
            elif not same(before, after := now[name].detach().cpu()):
                rounding = rounded_alike(before, after)
                found.append(f"frozen weight {name} {'is off by rounding' if rounding else 'changed'}")
        for name, parameter in self.model.named_parameters():
            if name in self.adapter and parameter.dtype != self.adapter[name].dtype:
                found.append(f"{name} is left in {parameter.dtype}, was {self.adapter[name].dtype}")
            if parameter.requires_grad and name not in self.trainable:
                found.append(f"{name} now asks for a gradient")
            elif not parameter.requires_grad and name in self.trainable:
                found.append(f"{name} of the adapter no longer asks for a gradient")
            elif name not in self.trainable and parameter.grad is not None:
                found.append(f"a gradient is left on the frozen {name}")
        status = self.model.get_model_status()
        if status.enabled is not True:
            found.append("the adapter is left disabled")
        if status.merged_adapters:
            found.append("the adapter is left merged into the base")
        stopped = sorted(self.modes - {name for name, module in self.model.named_modules() if module.training})
        if stopped:
            what = stopped[0] or "the model"
            found.append(f"{what} is left in evaluation mode, came in training mode")
        found += [f"a hook is left on {name}" for name in sorted(hooks_of(self.model) - self.hooks)]
        found += [
            f"{name} is left {value}, was {self.settings[name]}"
            for name, value in process_settings().items()
            if value != self.settings[name]
        ]
        if not found and self.computes_another():
            found.append("with the weights it came with, the model now computes other logits")
        return tuple(found)

    def changed(self) -> tuple[str, ...]:
        """What differs now, the adapter's weights included."""
        now = dict(self.model.named_parameters())
        moved = [name for name, weight in self.adapter.items() if not same(weight, now[name].detach().cpu())]
        return (*self.changed_frozen(), *(f"adapter weight {name} changed" for name in moved))


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")

HARMLESS_HOOK = "make_inputs_require_grads"
"""What ``enable_input_require_grads`` of transformers hangs on the embedding, for checkpointing; it stays there."""


def hooks_of(model: Any) -> set[str]:
    """Where hooks hang: a module's or parameter's name with the hook's."""
    found: set[str] = set()
    owners: list[tuple[str, Any, tuple[str, ...]]] = [(name, module, HOOKS) for name, module in model.named_modules()]
    owners += [(name, parameter, OF_PARAMETERS) for name, parameter in model.named_parameters()]
    for name, owner, kinds in owners:
        for kind in kinds:
            for key, hook in (getattr(owner, kind, None) or {}).items():
                words = getattr(hook, "__qualname__", type(hook).__name__)
                if HARMLESS_HOOK not in words:
                    found.add(f"{name or 'the model'} ({words}, {key})")
    return found


def same(before: Tensor, after: Tensor) -> bool:
    """Bit for bit, NaN equal to NaN."""
    if before.shape != after.shape:
        return False
    return bool(torch.equal(torch.nan_to_num(before), torch.nan_to_num(after)))


ROUNDINGS = 4
"""Units in the last place of the largest weight that a merge and an unmerge may leave behind."""


def rounded_alike(before: Tensor, after: Tensor) -> bool:
    """Whether the two differ by no more than rounding."""
    if before.shape != after.shape or before.dtype != after.dtype or not before.dtype.is_floating_point:
        return False
    most = ROUNDINGS * torch.finfo(before.dtype).eps * float(before.abs().max())
    return bool((after.double() - before.double()).abs().max() <= most)


KEPT_OF = 3
"""Implementations whose runs are kept: a process that judges more forgets the oldest's."""

_KEPT: dict[tuple[int, Scenario, str], tuple[Any, Observation | Refusal | ImplementationError]] = {}


def observe(
    distill: Callable[..., Any], scenario: Scenario, device: str = "cpu", owner: Any = None
) -> Observation | Refusal:
    """Run the trainer on the scenario, or recall that it was; raises ImplementationError if it did not
    deliver. A ``Refusal`` where the scenario is one that may be refused. Runs are kept by ``owner``, what
    ``distill`` is an attribute of: a bound method is a new object each time it is asked for."""
    owner = distill if owner is None else owner
    key = (id(owner), scenario, device)
    if key not in _KEPT:
        forget_all_but(KEPT_OF - 1, id(owner))
        try:
            _KEPT[key] = (owner, run_or_refusal(distill, scenario, device))
        except ImplementationError as error:
            _KEPT[key] = (owner, error)
    found = _KEPT[key][1]
    if isinstance(found, ImplementationError):
        raise found
    return found


def forget_all_but(others: int, present: int) -> None:
    """Drop the runs of all but the latest ``others`` owners beside the present one."""
    owners = [owner for owner in dict.fromkeys(key[0] for key in _KEPT) if owner != present]
    old = set(owners[: max(0, len(owners) - others)])
    for key in [key for key in _KEPT if key[0] in old]:
        del _KEPT[key]


def run(distill: Callable[..., Any], scenario: Scenario, device: str) -> Observation:
    """One run, without the memory; a refusal is an ImplementationError."""
    found = run_or_refusal(distill, scenario, device)
    if isinstance(found, Refusal):
        raise ImplementationError(f"distill raised {type(found.error).__name__}: {found.error}")
    return found


UNKNOWN_MODEL = (AttributeError, NotImplementedError, ValueError)
"""What a trainer raises on a kind of model that it was not written for."""

CACHE_DROPPED = (
    "hands a KV cache to a model in training mode, which transformers drops under gradient checkpointing: "
    "judged without checkpointing"
)
MASK_ADDED = (
    "hands a model a boolean mask of four dimensions, which transformers' eager attention adds to the scores: "
    "judged with sdpa, which masks by it, and on llama for gemma2, which has no sdpa"
)


def run_or_refusal(distill: Callable[..., Any], scenario: Scenario, device: str) -> Observation | Refusal:
    """The run, or what the trainer raised where the scenario may be refused.

    A trainer need not know GPT-2's architecture, nor peft's layers in place of an embedding: where it raises there, it
    is run on a plainer model.
    """
    try:
        return run_as_handled(distill, scenario, device)
    except ImplementationError as error:
        plainer = scenario.model.plainer
        if plainer is None or error.kind is None or not issubclass(error.kind, UNKNOWN_MODEL):
            raise
        found = run_or_refusal(distill, replace(scenario, model=plainer), device)
        if isinstance(found, Refusal):
            return found
        family = scenario.model.family
        where = "with an adapter on the embedding: judged without that adapter"
        if plainer.family != family:
            where = f"on {family}: judged on {plainer.family} in its place"
        return replace(found, notes=(f"{error.summary}, {where}", *found.notes))


def run_as_handled(distill: Callable[..., Any], scenario: Scenario, device: str) -> Observation | Refusal:
    """The run, on a model that heeds what the trainer hands it.

    Under gradient checkpointing transformers drops a KV cache that a model in training mode is handed, and computes as
    if the prompt were not there. Eager attention adds a mask of four dimensions to the scores, a boolean one too. A
    trainer that hands over either is run without checkpointing, or with sdpa, as its user has to.
    """
    handed: set[str] = set()
    model = build(scenario.model, device)
    with watched_inputs(model, handed):
        try:
            found = run_on(model, distill, scenario)
        except ImplementationError:
            if not handed:
                raise
    if not handed:
        return found
    other = scenario.model
    if CACHE_DROPPED in handed:
        other = replace(other, checkpointing=False)
    if MASK_ADDED in handed:
        other = other.with_sdpa
    heeding = replace(scenario, model=other)
    again = run_on(build(other, device), distill, heeding)
    return again if isinstance(again, Refusal) else replace(again, notes=tuple(sorted(handed)))


@contextmanager
def watched_inputs(model: Any, handed: set[str]) -> Iterator[None]:
    """Adds the words for what a model is handed and does not heed: keys and values for checkpointed layers in training
    mode, a boolean mask of four dimensions for eager attention."""

    def watch_cache(module: Any, _: Any, kwargs: Mapping[str, Any]) -> None:
        if module.training and (kwargs.get("past_key_values") is not None or kwargs.get("use_cache") is True):
            handed.add(CACHE_DROPPED)

    def watch_mask(module: Any, _: Any, kwargs: Mapping[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.bool:
            handed.add(MASK_ADDED)

    handles = [
        module.register_forward_pre_hook(watch_cache, with_kwargs=True)
        for module in model.modules()
        if any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
    ]
    base = model.get_base_model()
    if base.config._attn_implementation == "eager":
        handles += [
            module.register_forward_pre_hook(watch_mask, with_kwargs=True)
            for module in {base, base.base_model}  # the whole model and its decoder
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_on(model: Any, distill: Callable[..., Any], scenario: Scenario) -> Observation | Refusal:
    """One run on this model, built for the scenario."""
    samples = samples_of(scenario)
    handed = deepcopy(list(samples))
    refused: Refusal | None = None
    random_states: list[Mapping[str, bytes]] = []
    settings = process_settings()
    recorder = StepRecorder(model)

    def call(on: Any, batch: list[Sample], optimizer_cls: type[torch.optim.Optimizer], seed: int) -> Any:
        nonlocal refused
        state = ModelState(on) if scenario.may_refuse else None
        with implementation_errors("distill"), seeded(seed):
            try:
                return distill(on, batch, scenario.training, optimizer_cls)
            except Exception as error:
                if state is None or not scenario.accepts(error):
                    raise
                refused = Refusal(error, state.changed())
            finally:
                random_states.append(random_state())

    for number, kind in enumerate(scenario.history, start=1):
        on, batch = (
            (disturbed(model, scenario.seed), samples) if kind == "another" else (model, sampled_otherwise(samples))
        )
        optimizer_cls = recorder.optimizer_cls if on is model else torch.optim.AdamW
        call(on, deepcopy(list(batch)), optimizer_cls, scenario.seed + number)
        restore_settings(settings)  # what it leaves changed is to be seen at the judged call
    state = ModelState(model)
    recorder.begin_call(model)
    try:
        given = list(handed)
        returned = call(model, given, recorder.optimizer_cls, scenario.seed)
        if refused is not None and not refused.changed:
            return refused
        with implementation_errors("reading the model after distill"):
            changed = state.changed_frozen() + changed_samples(samples, handed)
            if [id(one) for one in given] != [id(one) for one in handed]:
                changed = (*changed, "the list of samples changed")
            now = dict(model.named_parameters())
            final = {name: now[name].detach().to("cpu", copy=True) for name in state.adapter if name in now}
    finally:
        restore_settings(settings)
    if refused is not None:
        changed = (*changed, f"the batch was refused ({refused.error}), but {refused.changed[0]}")
        raise ImplementationError(changed[-1])
    if len(random_states) > 1:
        changed += tuple(
            f"the random state of {whose} is the same after calls that began with different ones: seeded inside"
            for whose, after in random_states[-1].items()
            if after == random_states[-2][whose]
        )
    return Observation(
        scenario=scenario,
        metrics=read_metrics(returned),
        steps=tuple(recorder.steps),
        start=state.adapter,
        final=final,
        changed=changed,
        earlier=tuple(recorder.earlier),
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


def disturbed(model: Any, seed: int) -> Any:
    """A copy of the model with other weights, without gradients."""
    other = deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(0.1 * noise.to(parameter))
            parameter.grad = None
    return other


def changed_samples(before: Sequence[Sample], after: Sequence[Sample]) -> tuple[str, ...]:
    """What a trainer wrote into the samples it was handed."""
    found: list[str] = []
    for index, (old, new) in enumerate(zip(before, after, strict=True), start=1):
        found += [f"{name} of sample {index} changed" for name, was in vars(old).items() if vars(new)[name] != was]
    return tuple(found)


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
