"""The step loop that the bundled trainers share: CLaaS SDPO on a causal language model wrapped by PEFT.

    once per sample:           base log-probs and teacher top-k, adapter disabled;
                               behaviour = what the sampler recorded
    each step:                 per micro-batch forward, loss, backward; clip; optimizer step
    after each but the last:   behaviour = log-probs of the response under the updated adapter

A micro-batch is one sample, or, where the kernels can read several from one forward, as many as the token budget
admits. Its N response tokens lie one sample's after the other in one row, (1, N), and weigh 1 / T of their own
sample's T: the loss's token mean is then the mean over samples of their token means.

What differs between trainers is how one forward becomes a loss, log-probs and a top-k: ``Kernels``. Source of
the rules: claas/training/distillation.py, DistillationTrainer.distill, kfallah/CLaaS at e2331f7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from sdpo_conformance.protocol import (
    METRIC_KEYS,
    DistillResult,
    FusedSDPOLossInput,
    SDPOLossInput,
    StepMetrics,
)
from sdpo_implementations.causal_lm import (
    HeadInput,
    evaluating,
    require_linear_head,
    response_hidden,
    response_logits,
    state_as_found,
)
from sdpo_implementations.micro_batches import fitting_budget, micro_batches, validate_budget
from sdpo_implementations.packed_attention import can_pack, packing
from sdpo_implementations.shared_forward import SharedForward, lay_out
from sdpo_implementations.validation import validate_samples, validate_training

BETAS = (0.9, 0.999)
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class LossTerms:
    """All of a loss input but the student: response_mask, response_ids, base and old log-probs (1, N),
    teacher_logprobs and teacher_indices (1, N, K), and the config. ``response_mask`` holds each token's weight."""

    teacher_logprobs: Tensor
    teacher_indices: Tensor
    base_logprobs: Tensor
    response_mask: Tensor
    old_student_logprobs: Tensor
    response_ids: Tensor
    training: Any


@dataclass(frozen=True)
class Kernels:
    """How one forward becomes numbers. ``read(model, forward)`` gives whatever the other three take.

    ``loss(read, terms)``: the result of ``compute_sdpo_loss``. ``response_logprobs(read, response_ids)``:
    (1, N) float32, no graph. ``teacher_topk(read, k)``: log-probs and indices (1, N, min(k, V)), no graph.
    ``check(model, input_ids)`` raises ValueError for a model these kernels cannot serve.
    ``shares_forwards``: ``read`` takes a forward of several samples. ``refresh_from_next_forward``: the behaviour
    log-probs of step 2 on, and those that no sampler recorded, are read from the next step's own forward, whose
    weights are those the refresh would use, which saves the refresh's forward.
    """

    read: Callable[[Any, SharedForward], Any]
    loss: Callable[[Any, LossTerms], Mapping[str, Any]]
    response_logprobs: Callable[[Any, Tensor], Tensor]
    teacher_topk: Callable[[Any, int], tuple[Tensor, Tensor]]
    check: Callable[[Any, Tensor], None] | None = None
    shares_forwards: bool = False
    refresh_from_next_forward: bool = False

    @classmethod
    def from_logits(cls, compute_sdpo_loss: Callable[[Any], Mapping[str, Any]]) -> Kernels:
        """Kernels that read the model's own logits: any head, one sample at a time, (1, T, V) in memory."""

        def read(model: Any, forward: SharedForward) -> Tensor:
            return response_logits(model, forward.input_ids, len(forward.rows))

        def loss(logits: Tensor, terms: LossTerms) -> Mapping[str, Any]:
            return compute_sdpo_loss(SDPOLossInput(student_logits=logits, **vars(terms)))

        def response_logprobs(logits: Tensor, response_ids: Tensor) -> Tensor:
            return log_softmax(logits.detach()).gather(-1, response_ids.unsqueeze(-1)).squeeze(-1)

        def teacher_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
            values, indices = log_softmax(logits).topk(min(k, logits.shape[-1]), dim=-1)
            return values, indices

        def log_softmax(logits: Tensor) -> Tensor:
            return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

        return cls(read, loss, response_logprobs, teacher_topk)

    @classmethod
    def from_hidden_states(
        cls,
        compute_fused_sdpo_loss: Callable[[Any], Mapping[str, Any]],
        compute_response_logprobs: Callable[[Tensor, Tensor, Tensor], Tensor],
        compute_teacher_topk: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
    ) -> Kernels:
        """Kernels that read hidden states and the head's weight, and refuse a head that is not linear."""

        def loss(read: HeadInput, terms: LossTerms) -> Mapping[str, Any]:
            return compute_fused_sdpo_loss(
                FusedSDPOLossInput(student_hidden=read.hidden, lm_head_weight=read.head_weight, **vars(terms))
            )

        def response_logprobs(read: HeadInput, response_ids: Tensor) -> Tensor:
            return compute_response_logprobs(read.hidden.detach(), read.head_weight, response_ids)

        def teacher_topk(read: HeadInput, k: int) -> tuple[Tensor, Tensor]:
            return compute_teacher_topk(read.hidden, read.head_weight, k)

        return cls(
            response_hidden,
            loss,
            response_logprobs,
            teacher_topk,
            check=require_linear_head,
            shares_forwards=True,
            refresh_from_next_forward=True,
        )


@dataclass
class MicroBatch:
    """Samples that share a forward, on the device. ``behaviour`` (1, N) float32; ``owed`` (1, N) bool marks the
    tokens whose behaviour the next forward is to give, None where it owes nothing. The rest never changes:
    ``weights`` (1, N) is 1 / T of each token's own sample up to a factor, the others as in ``LossTerms``."""

    count: int
    forward: SharedForward
    response_ids: Tensor
    weights: Tensor
    base_logprobs: Tensor
    teacher_logprobs: Tensor
    teacher_indices: Tensor
    behaviour: Tensor
    owed: Tensor | None


def distill(
    model: Any,
    samples: Sequence[Any],
    training: Any,
    optimizer_cls: Any,
    kernels: Kernels,
    token_budget: int | None = None,
) -> DistillResult:
    """Take ``training.steps_per_batch`` optimizer steps on the adapter of ``model``, a ``PeftModel``.

    ``samples`` carry prompt_token_ids, response_token_ids, teacher_prompt_token_ids and response_logprobs
    (None: the starting policy's own log-probs stand in). The optimizer is
    ``optimizer_cls(parameters, lr=..., betas=..., weight_decay=...)``. Afterwards the model carries the
    updated adapter, without gradients, and is otherwise as found: adapter enabled, modes and requires_grad
    restored; gradient checkpointing is the caller's to turn on. Dropout acts in the gradient's forward alone.

    ``token_budget``: the most tokens of one forward (a longer sample goes alone); None: what fits the free
    memory. Kernels that share no forwards ignore it.

    Raises ValueError, nothing changed, for hyperparameters or samples out of range, for a model without
    trainable parameters and for one that the kernels cannot serve; RuntimeError, the step not taken, for a
    gradient that is not finite.
    """
    validate_training(training)
    validate_budget(token_budget)
    validate_samples(samples, model.get_input_embeddings().weight.shape[0])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("the model has no trainable parameter: is its adapter enabled and not frozen?")
    packed = kernels.shares_forwards and can_pack(model)
    with state_as_found(model), packing(model, packed):
        batches = _prepare(model, samples, training.teacher_top_k, kernels, token_budget, packed)
        _clear(parameters)
        optimizer = optimizer_cls(parameters, lr=training.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
        model.train()
        per_step_metrics: list[StepMetrics] = []
        try:
            for step in range(1, training.steps_per_batch + 1):
                sums = _accumulate_gradient(model, batches, len(samples), training, kernels)
                grad_norm = torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm, error_if_nonfinite=True)
                optimizer.step()
                _clear(parameters)
                per_step_metrics.append(_metrics(step, sums / len(samples), grad_norm))
                if step < training.steps_per_batch:
                    _refresh(model, batches, kernels)
        finally:
            _clear(parameters)
    return {"per_step_metrics": per_step_metrics}


def _prepare(
    model: Any, samples: Sequence[Any], top_k: int, kernels: Kernels, token_budget: int | None, packed: bool
) -> list[MicroBatch]:
    """Everything that no step changes, and the behaviour log-probs of step 1."""
    device = next(model.parameters()).device
    with evaluating(model):
        if kernels.check is not None:
            first = samples[0]
            kernels.check(model, torch.tensor([[*first.prompt_token_ids, *first.response_token_ids]], device=device))
        groups = [[index] for index in range(len(samples))]
        budget = 1
        if kernels.shares_forwards:
            lengths = [len(sample.prompt_token_ids) + len(sample.response_token_ids) for sample in samples]
            budget = token_budget or fitting_budget(model, max(lengths))
            groups = micro_batches(lengths, budget, packed)
        return [
            _micro_batch(model, [samples[index] for index in group], top_k, kernels, budget, packed) for group in groups
        ]


def _micro_batch(
    model: Any, samples: Sequence[Any], top_k: int, kernels: Kernels, budget: int, packed: bool
) -> MicroBatch:
    device = next(model.parameters()).device
    responses = [list(sample.response_token_ids) for sample in samples]
    forward = lay_out([(sample.prompt_token_ids, sample.response_token_ids) for sample in samples], device, packed)
    response_ids = torch.tensor([[token for response in responses for token in response]], device=device)
    longest = max(map(len, responses))
    weights = [longest / len(response) for response in responses for _ in response]
    with model.disable_adapter():
        with record_function("sdpo.base"):
            base = kernels.response_logprobs(kernels.read(model, forward), response_ids)
        with record_function("sdpo.teacher"):
            teacher_logprobs, teacher_indices = _teacher_topk(model, samples, top_k, kernels, budget, packed)
    behaviour = torch.tensor(
        [[value for sample in samples for value in sample.response_logprobs or [0.0] * len(sample.response_token_ids)]],
        dtype=torch.float32,
        device=device,
    )
    unrecorded = [sample.response_logprobs is None for sample in samples for _ in sample.response_token_ids]
    batch = MicroBatch(
        count=len(samples),
        forward=forward,
        response_ids=response_ids,
        weights=torch.tensor([weights], dtype=torch.float32, device=device),
        base_logprobs=base,
        teacher_logprobs=teacher_logprobs,
        teacher_indices=teacher_indices,
        behaviour=behaviour,
        owed=torch.tensor([unrecorded], device=device) if any(unrecorded) else None,
    )
    if batch.owed is not None and not kernels.refresh_from_next_forward:
        _settle(batch, kernels.response_logprobs(kernels.read(model, forward), response_ids))
    return batch


def _teacher_topk(
    model: Any, samples: Sequence[Any], top_k: int, kernels: Kernels, budget: int, packed: bool
) -> tuple[Tensor, Tensor]:
    """Log-probs and indices (1, N, K) in the order of the samples; teacher prompts are longer, so the samples of
    one micro-batch may take several forwards."""
    device = next(model.parameters()).device
    pairs = [(sample.teacher_prompt_token_ids, sample.response_token_ids) for sample in samples]
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    for group in micro_batches([len(prompt) + len(response) for prompt, response in pairs], budget, packed):
        read = kernels.read(model, lay_out([pairs[index] for index in group], device, packed))
        found = kernels.teacher_topk(read, max(1, top_k))
        sizes = [len(pairs[index][1]) for index in group]
        for index, *one in zip(group, *(tensor.split(sizes, dim=1) for tensor in found), strict=True):
            parts[index] = (one[0], one[1])
    logprobs, indices = zip(*(parts[index] for index in range(len(samples))), strict=True)
    return torch.cat(logprobs, dim=1), torch.cat(indices, dim=1)


def _settle(batch: MicroBatch, logprobs: Tensor) -> None:
    """The owed behaviour log-probs are these."""
    assert batch.owed is not None
    batch.behaviour = torch.where(batch.owed, logprobs.to(batch.behaviour), batch.behaviour)
    batch.owed = None


def _accumulate_gradient(
    model: Any, batches: Sequence[MicroBatch], samples: int, training: Any, kernels: Kernels
) -> Tensor:
    """Add the gradient of the mean loss over ``samples``, one micro-batch's graph at a time; returns the sums
    over samples of total_loss and the four metrics, (5,) float64 on the model's device."""
    sums: list[Tensor] = []
    for batch in batches:
        with record_function("sdpo.forward"):
            read = kernels.read(model, batch.forward)
        if batch.owed is not None:
            with record_function("sdpo.refresh"):
                _settle(batch, kernels.response_logprobs(read, batch.response_ids))
        with record_function("sdpo.loss"):
            result = kernels.loss(
                read,
                LossTerms(
                    teacher_logprobs=batch.teacher_logprobs,
                    teacher_indices=batch.teacher_indices,
                    base_logprobs=batch.base_logprobs,
                    response_mask=batch.weights,
                    old_student_logprobs=batch.behaviour,
                    response_ids=batch.response_ids,
                    training=training,
                ),
            )
        del read
        loss = result["loss"]
        with record_function("sdpo.backward"):
            (loss * (batch.count / samples)).backward()
        values = (loss.detach(), *(result[key] for key in METRIC_KEYS))
        on_device = [torch.as_tensor(value, dtype=torch.float64, device=loss.device) for value in values]
        sums.append(torch.stack(on_device) * batch.count)
    return torch.stack(sums).sum(0)


def _metrics(step: int, means: Tensor, grad_norm: Tensor) -> StepMetrics:
    """One entry of ``per_step_metrics``; the step's only transfer from the device."""
    total, distill_loss, kl_reg, mean_is_ratio, clip_fraction, norm = torch.cat(
        [means, grad_norm.to(means).reshape(1)]
    ).tolist()
    return {
        "step": step,
        "total_loss": total,
        "distill_loss": distill_loss,
        "kl_reg": kl_reg,
        "mean_is_ratio": mean_is_ratio,
        "clip_fraction": clip_fraction,
        "grad_norm": norm,
    }


def _refresh(model: Any, batches: Iterable[MicroBatch], kernels: Kernels) -> None:
    """Each sample's behaviour log-probs become those of the policy as it now stands."""
    for batch in batches:
        batch.owed = torch.ones_like(batch.response_ids, dtype=torch.bool)
    if kernels.refresh_from_next_forward:
        return
    with evaluating(model), record_function("sdpo.refresh"):
        for batch in batches:
            _settle(batch, kernels.response_logprobs(kernels.read(model, batch.forward), batch.response_ids))


def _clear(parameters: Iterable[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
