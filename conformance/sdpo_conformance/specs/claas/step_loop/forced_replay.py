"""A catalogued step loop replayed in float64 with its weights forced, step by step, to those a trainer had.

What comes out of a step is then due to the loop's own parts, not to the steps before. What a loop does not replace is
shared: the student's forward of each step is run once, whatever the number of loops, and a loop pays for its loss and
one backward.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from sdpo_conformance.cases.precision import DTYPES
from sdpo_conformance.specs.claas.defects import step_loop_variants as right
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.defects.step_loop_variants import (
    ChangedLogits,
    Prepared,
    ReadWhere,
    Run,
    TrainerParts,
)
from sdpo_conformance.specs.claas.oracle.step_loop import Gradient
from sdpo_conformance.specs.claas.step_loop.ground import Ground, Weights
from sdpo_conformance.trainer.policies import chosen

RIGHT = TrainerParts()

APART = frozenset({"accept", "make_optimizer", "report", "finish"})
"""Parts that no gradient depends on, but for the parameters that an optimizer is given."""


@dataclass(frozen=True)
class ReplayOutcome:
    """One step: its reported metrics, and the gradient handed to the optimizer, clipped."""

    metrics: Mapping[str, float]
    gradient: Gradient


@dataclass
class Forced:
    """A trainer's run to replay loops along: ``history`` holds the adapter's weights before each step, ``final`` those
    after the last."""

    ground: Ground
    history: Sequence[Weights]
    final: Weights
    _graphs: dict[int, tuple[Gradient, list[Tensor]]] = field(default_factory=dict)
    _known: dict[tuple[int, float], tuple[Tensor, ...]] = field(default_factory=dict)
    _read: dict[tuple[int, tuple[int, ...], int], Tensor] = field(default_factory=dict)

    def student(self, step: int) -> tuple[Gradient, list[Tensor]]:
        """The adapter as leaves, and each sample's response logits (1, T, V) with their graph."""
        if step not in self._graphs:
            model, leaves = self.ground.model, {}
            for name, weight in self.history[step - 1].items():
                leaves[name] = weight.detach().double().clone().requires_grad_()
            logits = []
            for sample in self.ground.samples:
                ids = torch.tensor([[*sample.prompt_token_ids, *sample.response_token_ids]])
                out = functional_call(model, leaves, kwargs={"input_ids": ids, "use_cache": False}).logits
                logits.append(out[:, -len(sample.response_token_ids) - 1 : -1])
            self._graphs[step] = leaves, logits
        return self._graphs[step]

    def differentiated(self, step: int, incoming: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The adapter's gradient under these gradients of the logits; loops that differ in nothing share it."""
        leaves, logits = self.student(step)
        waves = (torch.arange(z.numel(), dtype=torch.float64).sin().reshape(z.shape) for z in incoming)
        print_of = sum(float((z * wave).sum()) for z, wave in zip(incoming, waves, strict=True))
        key = (step, float(f"{print_of:.10g}"))
        if key not in self._known:
            self._known[key] = torch.autograd.grad(
                logits, list(leaves.values()), list(incoming), retain_graph=True, materialize_grads=True
            )
        return self._known[key]

    def read(self, ids: Tensor, response: Tensor) -> Tensor:
        """The right logits (1, T, V) of the model as it stands, without gradient; those under weights of the run are
        kept."""
        standing = self.ground.standing()
        along = next((i for i, one in enumerate((*self.history, self.final)) if one is standing), None)
        at = -1 if self.ground.model.adapter_is_off else along
        if at is None:
            return right.read(self.ground.model, ids, response)
        key = (at, tuple(ids[0].tolist()), response.shape[1])
        if key not in self._read:
            self._read[key] = right.read(self.ground.model, ids, response)
        return self._read[key].clone()

    def let_go(self) -> None:
        """Forget the graphs and what was differentiated; both are made again where they are asked for."""
        self._graphs.clear()
        self._known.clear()

    def own(self, step: int) -> list[Tensor]:
        """Each sample's log-probs (1, T) under the weights before a step."""
        logits = self.student(step)[1]
        return [chosen(z.detach(), one.response_ids) for z, one in zip(logits, self.ground.prepared, strict=True)]


def parts_of(defect: Defect) -> TrainerParts | None:
    """The parts of a catalogued step loop; None where it is none."""
    arguments = getattr(defect.distill, "args", ())
    return arguments[0] if arguments and isinstance(arguments[0], TrainerParts) else None


def replaced(parts: TrainerParts) -> frozenset[str]:
    """Names of the parts that are not the right ones."""
    return frozenset(name for name, part in vars(parts).items() if part is not getattr(RIGHT, name))


def started(parts: TrainerParts, forced: Forced) -> Run:
    """Everything before the first step; what is not replaced comes from the ground."""
    ground, other = forced.ground, replaced(parts)
    model = ground.at(forced.history[0])
    adapter = ground.adapter
    for parameter in adapter.values():
        parameter.grad = None
    batch = [right.prepared(sample, torch.device("cpu")) for sample in ground.samples]
    run = Run(
        model,
        ground.scenario.training,
        list(adapter.values()),
        batch,
        forward=parts.forward,
        read=forced.read,
        earlier=ground.earlier,
        dtype=DTYPES[ground.scenario.model.dtype],
    )
    alone = "forward" not in other
    for one, known, recorded in zip(batch, ground.prepared, ground.recorded, strict=True):
        one.mask = parts.mask(run, one)
        # copies: a wrong loss may write into what it is given
        one.base = known.base_logprobs.clone() if alone and "base" not in other else parts.base(run, one)
        support = (known.teacher_logprobs.clone(), known.teacher_indices.clone())
        one.support = support if alone and "teacher" not in other else parts.teacher(run, one)
        one.behaviour = (
            recorded.clone() if alone and "first_behaviour" not in other else parts.first_behaviour(run, one)
        )
    if other & {"make_optimizer", "before_step"}:
        run.optimizer = parts.make_optimizer(run, torch.optim.AdamW)
    return run


def replayed(
    parts: TrainerParts, forced: Forced, wanted: Collection[int] | None = None
) -> Iterator[tuple[int, ReplayOutcome]]:
    """Each ``wanted`` step (all by default) with its outcome. Others are passed over where nothing of them remains."""
    run, names, other = started(parts, forced), list(forced.history[0]), replaced(parts)
    carried = bool(other & {"zero", "report", "clip"})
    last = max(wanted) if wanted else len(forced.history)
    for step in range(1, last + 1):
        run.step = step
        forced.ground.at(forced.history[step - 1])
        parts.before_step(run)
        after = forced.history[step] if step < len(forced.history) else forced.final
        if wanted is None or step in wanted or carried:
            total = backward(parts, forced, run)
            norm = parts.clip(run)
            handed = gradient_of(run, names)
            forced.ground.at(after)
            metrics = parts.report(run, total, norm)
            run.metrics.append(metrics)
            if wanted is None or step in wanted:
                yield step, ReplayOutcome(metrics, handed)
                forced.ground.at(after)
        else:
            forced.ground.at(after)
        parts.zero(run)
        if step < min(last, run.training.steps_per_batch):
            if not other & {"refresh", "forward"}:
                for one, fresh in zip(run.batch, forced.own(step + 1), strict=True):
                    one.behaviour = fresh
            else:
                parts.refresh(run)
    for parameter in run.parameters:
        parameter.grad = None


@dataclass(frozen=True)
class RightStep:
    """A right step as its report is made from it: ``total`` and ``norm`` as in the loop; by sample ``results``, and the
    ``losses``, ``logits`` and ``behaviour`` log-probs behind them; ``after``: the weights then."""

    total: Tensor
    norm: float
    results: Sequence[Mapping[str, Any]]
    losses: Sequence[Tensor]
    logits: Sequence[Tensor]
    behaviour: Sequence[Tensor]
    after: Weights


class RightSteps:
    """The right loop replayed once, for loops that differ from it in what they report."""

    def __init__(self, forced: Forced) -> None:
        self.forced = forced
        self.run = run = started(RIGHT, forced)
        self.steps: list[RightStep] = []
        self._reported: dict[tuple[str, float | None], list[Mapping[str, float]]] = {}
        for step in range(1, len(forced.history) + 1):
            run.step = step
            forced.ground.at(forced.history[step - 1])
            total = backward(RIGHT, forced, run)
            norm = RIGHT.clip(run)
            RIGHT.zero(run)
            after = forced.history[step] if step < len(forced.history) else forced.final
            losses = [loss.detach() for loss in run.losses]
            logits, behaviour = [one.logits for one in run.batch], [one.behaviour for one in run.batch]
            self.steps.append(RightStep(total, norm, run.results, losses, logits, behaviour, after))
            if step < len(forced.history):
                for one, fresh in zip(run.batch, forced.own(step + 1), strict=True):
                    one.behaviour = fresh
        forced.let_go()

    def reported(self, defect: Defect) -> list[Mapping[str, float]]:
        """What a catalogued loop that differs in its report alone makes of each step."""
        key = defect.name, defect.value
        if key not in self._reported:
            loop = parts_of(defect)
            assert loop is not None
            self._reported[key] = self._entries(loop)
        return self._reported[key]

    def _entries(self, loop: TrainerParts) -> list[Mapping[str, float]]:
        """The entry of each step."""
        run = self.run
        run.kept, run.metrics = {}, []
        for number, step in enumerate(self.steps, start=1):
            run.step, run.results, run.losses = number, list(step.results), list(step.losses)
            for one, logits, behaviour in zip(run.batch, step.logits, step.behaviour, strict=True):
                one.logits, one.behaviour = logits, behaviour
            self.forced.ground.at(step.after)
            run.metrics.append(loop.report(run, step.total, step.norm))
        return list(run.metrics)


def backward(parts: TrainerParts, forced: Forced, run: Run) -> Tensor:
    """Losses and gradients of one step, the gradients added to what the parameters hold; the step's loss."""
    changed = parts.forward.change if isinstance(parts.forward, ChangedLogits) else None
    apart = [reads_itself(parts, run, one) for one in run.batch]
    if all(apart):
        run.results = [right.sample_loss(run, one, parts.loss) for one in run.batch]
        return totalled(parts, run)
    _, logits = forced.student(run.step)
    scores = [z.detach().clone().requires_grad_() for z in logits]
    seen = scores if changed is None else [changed(z) for z in scores]
    run.results = [
        right.sample_loss(run, one, parts.loss, None if itself else z)
        for one, z, itself in zip(run.batch, seen, apart, strict=True)
    ]
    total = totalled(parts, run)
    incoming = [torch.zeros_like(z) if z.grad is None else z.grad for z in scores]
    gradients = forced.differentiated(run.step, incoming)
    for parameter, gradient in zip(run.parameters, gradients, strict=True):
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
    return total


def reads_itself(parts: TrainerParts, run: Run, one: Prepared) -> bool:
    """Whether a loop has a forward of its own for a sample: no other loop's will do."""
    if isinstance(parts.forward, ReadWhere):
        return parts.forward.concerns(run, one.ids, one.response)
    return parts.forward is not RIGHT.forward and not isinstance(parts.forward, ChangedLogits)


def totalled(parts: TrainerParts, run: Run) -> Tensor:
    """The step's loss of the samples' losses, differentiated."""
    run.losses = [result["loss"] for result in run.results]
    total = parts.reduce(run)
    if total.requires_grad:
        total.backward()
    return total.detach()


def gradient_of(run: Run, names: Sequence[str]) -> Gradient:
    """What the optimizer is handed, zero where it is handed nothing."""
    handed = set(map(id, run.parameters))
    if run.optimizer is not None:
        handed = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    return {
        name: p.grad.clone() if p.grad is not None and id(p) in handed else torch.zeros_like(p)
        for name, p in zip(names, run.parameters, strict=True)
    }


def with_loss(defect: Defect) -> TrainerParts | None:
    """The right loop around a loss with a catalogued defect."""
    from sdpo_conformance.specs.claas.defects.loss_parts import Parts

    if defect.change is None:
        return None
    wrong = defect.change(Parts())

    def loss(loss_input: Any) -> Mapping[str, Any]:
        return wrong.entry(wrong, loss_input)

    return replace(RIGHT, loss=loss)
