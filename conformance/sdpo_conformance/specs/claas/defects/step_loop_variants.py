"""A step loop as a composition of named parts, so that a way to get it wrong is one part replaced.

Unchanged, the parts are a right trainer in plain PyTorch, independent of the bundled implementations. The loss
is ``defects.parts``, so a loss defect makes a trainer defect too: ``trainer(loss=...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.protocol import METRIC_KEYS, SDPOLossInput
from sdpo_conformance.specs.claas.defects.loss_parts import Parts

Metrics = dict[str, float]


@dataclass
class Prepared:
    """One sample on the device: ``ids`` (1, P + T) and ``teacher_ids`` likewise, ``response`` (1, T), and what
    the parts of the same name left: ``mask``, ``base`` and ``behaviour`` (1, T), ``support`` log-probs and indices
    (1, T, K); ``logits`` (1, T, V) of the step's forward. ``recorded`` is what the sampler recorded, or None."""

    ids: Tensor
    teacher_ids: Tensor
    response: Tensor
    recorded: Tensor | None
    mask: Tensor = field(init=False)
    base: Tensor = field(init=False)
    support: tuple[Tensor, Tensor] = field(init=False)
    behaviour: Tensor = field(init=False)
    logits: Tensor = field(init=False)


@dataclass
class Run:
    """What the parts share during one call. ``step`` counts from 1; ``losses`` and ``results`` are the present
    step's, per sample; ``metrics`` those reported so far; ``kept``: what a part leaves for later; ``read``: the logits
    of a forward without gradient, where they may be known already; ``earlier``: in a replay the model that the first
    call of all on this batch was on, where that was another; ``dtype``: the base's, in a replay the observed model's.
    """

    model: Any
    training: Any
    parameters: list[torch.nn.Parameter]
    batch: list[Prepared]
    optimizer: Any = None
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)
    results: list[Mapping[str, Any]] = field(default_factory=list)
    metrics: list[Metrics] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    forward: Callable[[Run, Tensor, Tensor], Tensor] | None = None
    read: Callable[[Tensor, Tensor], Tensor] | None = None
    earlier: Any = None
    dtype: torch.dtype = torch.float32


# --- one forward ---


def forward(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """The logits that predict the response, (1, T, V), of one sample by itself."""
    if run.read is not None and not torch.is_grad_enabled():
        return run.read(ids, response)
    return read(run.model, ids, response)


def read(model: Any, ids: Tensor, response: Tensor) -> Tensor:
    """The logits of a row (1, P + T) that predict its response, (1, T, V)."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, -response.shape[1] - 1 : -1]
    return logits


@dataclass(frozen=True)
class ChangedLogits:
    """A forward that changes the right logits; ``of_student``: those with gradient alone."""

    change: Callable[[Tensor], Tensor]
    of_student: bool = False

    def __call__(self, run: Run, ids: Tensor, response: Tensor) -> Tensor:
        logits = forward(run, ids, response)
        return logits if self.of_student and not torch.is_grad_enabled() else self.change(logits)


@dataclass(frozen=True)
class ReadWhere:
    """A forward of its own for some rows (1, P + T) alone: those that ``concerns`` says; the others are read right."""

    own: Callable[[Run, Tensor, Tensor], Tensor]
    concerns: Callable[[Run, Tensor, Tensor], bool]

    def __call__(self, run: Run, ids: Tensor, response: Tensor) -> Tensor:
        return (self.own if self.concerns(run, ids, response) else forward)(run, ids, response)


def logits_at_response(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """The logits that predict the response, (1, T, V), in float32 or, of a float64 model, in float64."""
    logits = (run.forward or forward)(run, ids, response)
    return logits if logits.dtype == torch.float64 else logits.float()


@torch.no_grad()
def logprobs(run: Run, ids: Tensor, response: Tensor) -> Tensor:
    """The response's log-probs under the model as it stands, (1, T)."""
    scores = logits_at_response(run, ids, response).log_softmax(-1)
    return scores.gather(-1, response.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def topk(run: Run, ids: Tensor, response: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probs and indices of the K most likely tokens, (1, T, K)."""
    scores = logits_at_response(run, ids, response).log_softmax(-1)
    values, indices = scores.topk(min(max(1, k), scores.shape[-1]), dim=-1)
    return values, indices


# --- the parts, all right ---


def mask(run: Run, one: Prepared) -> Tensor:
    """Which tokens of the response count: all."""
    return torch.ones_like(one.response, dtype=torch.float32)


def base(run: Run, one: Prepared) -> Tensor:
    """Base log-probs of the response."""
    with run.model.disable_adapter():
        return logprobs(run, one.ids, one.response)


def teacher(run: Run, one: Prepared) -> tuple[Tensor, Tensor]:
    """The teacher's support."""
    with run.model.disable_adapter():
        return topk(run, one.teacher_ids, one.response, run.training.teacher_top_k)


def first_behaviour(run: Run, one: Prepared) -> Tensor:
    """Behaviour log-probs of step 1."""
    return logprobs(run, one.ids, one.response) if one.recorded is None else one.recorded


def refresh(run: Run) -> None:
    """After a step that is not the last."""
    for one in run.batch:
        one.behaviour = logprobs(run, one.ids, one.response)


def sample_loss(
    run: Run, one: Prepared, loss: Callable[[Any], Mapping[str, Any]], logits: Tensor | None = None
) -> Mapping[str, Any]:
    """One sample's loss with its graph, and its metrics; ``logits`` where they are known."""
    if logits is None:
        logits = (run.forward or forward)(run, one.ids, one.response)
    one.logits = logits.detach()
    return loss(
        SDPOLossInput(
            student_logits=logits,
            teacher_logprobs=one.support[0],
            teacher_indices=one.support[1],
            base_logprobs=one.base,
            response_mask=one.mask,
            old_student_logprobs=one.behaviour,
            response_ids=one.response,
            training=run.training,
        )
    )


def reduce(run: Run) -> Tensor:
    """The step's loss of the samples' losses."""
    return torch.stack(run.losses).mean()


def clip(run: Run) -> float:
    """Clip in place; the norm before."""
    return float(torch.nn.utils.clip_grad_norm_(run.parameters, run.training.max_grad_norm))


def zero(run: Run) -> None:
    """Forget the gradients after the optimizer's step."""
    for parameter in run.parameters:
        parameter.grad = None


def report(run: Run, total: Tensor, grad_norm: float) -> Metrics:
    """The step's entry of per_step_metrics."""
    means = {key: sum(float(result[key]) for result in run.results) / len(run.results) for key in METRIC_KEYS}
    return {"step": run.step, "total_loss": float(total), **means, "grad_norm": grad_norm}


def make_optimizer(run: Run, optimizer_cls: Any) -> Any:
    """The optimizer, once per call."""
    return optimizer_cls(run.parameters, lr=run.training.learning_rate, betas=(0.9, 0.999), weight_decay=0.01)


def before_step(run: Run) -> None:
    """Anything ahead of a step's forward: nothing."""


def finish(run: Run) -> None:
    """Anything after the last step: nothing."""


def accept(samples: Sequence[Any], training: Any) -> None:
    """Refuse what cannot be trained on."""
    if not samples:
        raise ValueError("samples must not be empty")
    for sample in samples:
        recorded = sample.response_logprobs
        if recorded is not None and len(recorded) != len(sample.response_token_ids):
            raise ValueError("response_logprobs must have one entry per response token")


def right_loss(loss_input: SDPOLossInput) -> Mapping[str, Any]:
    """The loss, right."""
    parts = Parts()
    return parts.entry(parts, loss_input)


@dataclass(frozen=True)
class TrainerParts:
    """The parts in the order of their use; the defaults are right."""

    accept: Callable[[Sequence[Any], Any], None] = accept
    forward: Callable[[Run, Tensor, Tensor], Tensor] = forward
    mask: Callable[[Run, Prepared], Tensor] = mask
    base: Callable[[Run, Prepared], Tensor] = base
    teacher: Callable[[Run, Prepared], tuple[Tensor, Tensor]] = teacher
    first_behaviour: Callable[[Run, Prepared], Tensor] = first_behaviour
    make_optimizer: Callable[[Run, Any], Any] = make_optimizer
    before_step: Callable[[Run], None] = before_step
    loss: Callable[[Any], Mapping[str, Any]] = right_loss
    reduce: Callable[[Run], Tensor] = reduce
    clip: Callable[[Run], float] = clip
    report: Callable[[Run, Tensor, float], Metrics] = report
    zero: Callable[[Run], None] = zero
    refresh: Callable[[Run], None] = refresh
    finish: Callable[[Run], None] = finish


def distill(
    parts: TrainerParts, model: Any, samples: Sequence[Any], training: Any, optimizer_cls: Any
) -> dict[str, list[Metrics]]:
    """The loop made of ``parts``; otherwise as the protocol has it."""
    parts.accept(samples, training)
    device = next(model.parameters()).device
    batch = [prepared(sample, device) for sample in samples]
    model.train()
    adapter = [p for p in model.parameters() if p.requires_grad]
    base = next(p.dtype for p in model.parameters() if not p.requires_grad)
    run = Run(model, training, adapter, batch, forward=parts.forward, dtype=base)
    for one in batch:
        one.mask = parts.mask(run, one)
        one.base = parts.base(run, one)
        one.support = parts.teacher(run, one)
        one.behaviour = parts.first_behaviour(run, one)
    run.optimizer = parts.make_optimizer(run, optimizer_cls)
    for step in range(1, training.steps_per_batch + 1):
        run.step = step
        parts.before_step(run)
        run.results = [sample_loss(run, one, parts.loss) for one in batch]
        run.losses = [result["loss"] for result in run.results]
        total = parts.reduce(run)
        total.backward()
        grad_norm = parts.clip(run)
        run.optimizer.step()
        parts.zero(run)
        run.metrics.append(parts.report(run, total.detach(), grad_norm))
        if step < training.steps_per_batch:
            parts.refresh(run)
    parts.finish(run)
    return {"per_step_metrics": run.metrics}


def prepared(sample: Any, device: torch.device) -> Prepared:
    """A sample's token ids and recorded log-probs as tensors."""
    response = list(sample.response_token_ids)
    recorded = sample.response_logprobs
    return Prepared(
        ids=torch.tensor([[*sample.prompt_token_ids, *response]], device=device),
        teacher_ids=torch.tensor([[*sample.teacher_prompt_token_ids, *response]], device=device),
        response=torch.tensor([response], device=device),
        recorded=None if recorded is None else torch.tensor([list(recorded)], device=device),
    )


def trainer(**replaced: Callable[..., Any]) -> Callable[..., dict[str, list[Metrics]]]:
    """``distill`` with these parts in place of the right ones."""
    return partial(distill, TrainerParts(**replaced))
