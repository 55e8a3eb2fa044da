"""The step loop that the bundled trainers share: CLaaS SDPO on a causal language model wrapped by PEFT.

    once per sample:           base log-probs and teacher top-k, adapter disabled;
                               behaviour = what the sampler recorded
    each step:                 per sample forward, loss, backward; clip; optimizer step
    after each but the last:   behaviour = log-probs of the response under the updated adapter

What differs between trainers is how one forward becomes a loss, log-probs and a top-k: ``Kernels``. Source of
the rules: claas/training/distillation.py, DistillationTrainer.distill, kfallah/CLaaS at e2331f7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
from sdpo_implementations.validation import validate_samples, validate_training

BETAS = (0.9, 0.999)
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class LossTerms:
    """All of a loss input but the student: response_mask, response_ids, base and old log-probs (1, T),
    teacher_logprobs and teacher_indices (1, T, K), and the config."""

    teacher_logprobs: Tensor
    teacher_indices: Tensor
    base_logprobs: Tensor
    response_mask: Tensor
    old_student_logprobs: Tensor
    response_ids: Tensor
    training: Any


@dataclass(frozen=True)
class Kernels:
    """How one forward becomes numbers. ``read(model, input_ids, T)`` gives whatever the other three take.

    ``loss(read, terms)``: the result of ``compute_sdpo_loss``. ``response_logprobs(read, response_ids)``:
    (1, T) float32, no graph. ``teacher_topk(read, k)``: log-probs and indices (1, T, min(k, V)), no graph.
    ``check(model, input_ids)`` raises ValueError for a model these kernels cannot serve.
    ``refresh_from_next_forward``: the behaviour log-probs of step 2 on are read from that step's own forward,
    whose weights are those the refresh would use, which saves the refresh's forward.
    """

    read: Callable[[Any, Tensor, int], Any]
    loss: Callable[[Any, LossTerms], Mapping[str, Any]]
    response_logprobs: Callable[[Any, Tensor], Tensor]
    teacher_topk: Callable[[Any, int], tuple[Tensor, Tensor]]
    check: Callable[[Any, Tensor], None] | None = None
    refresh_from_next_forward: bool = False

    @classmethod
    def from_logits(cls, compute_sdpo_loss: Callable[[Any], Mapping[str, Any]]) -> Kernels:
        """Kernels that read the model's own logits: any head, (1, T, V) in memory."""

        def loss(logits: Tensor, terms: LossTerms) -> Mapping[str, Any]:
            return compute_sdpo_loss(SDPOLossInput(student_logits=logits, **vars(terms)))

        def response_logprobs(logits: Tensor, response_ids: Tensor) -> Tensor:
            return log_softmax(logits.detach()).gather(-1, response_ids.unsqueeze(-1)).squeeze(-1)

        def teacher_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
            values, indices = log_softmax(logits).topk(min(k, logits.shape[-1]), dim=-1)
            return values, indices

        def log_softmax(logits: Tensor) -> Tensor:
            return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

        return cls(response_logits, loss, response_logprobs, teacher_topk)

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
            refresh_from_next_forward=True,
        )


@dataclass
class SampleState:
    """One sample on the device. ``behaviour`` (1, T) float32 is None while the next forward owes it; the
    rest never changes: ``input_ids`` (1, P + T), the others as in ``LossTerms``."""

    input_ids: Tensor
    response_ids: Tensor
    base_logprobs: Tensor
    teacher_logprobs: Tensor
    teacher_indices: Tensor
    behaviour: Tensor | None


def distill(model: Any, samples: Sequence[Any], training: Any, optimizer_cls: Any, kernels: Kernels) -> DistillResult:
    """Take ``training.steps_per_batch`` optimizer steps on the adapter of ``model``, a ``PeftModel``.

    ``samples`` carry prompt_token_ids, response_token_ids, teacher_prompt_token_ids and response_logprobs
    (None: the starting policy's own log-probs stand in). The optimizer is
    ``optimizer_cls(parameters, lr=..., betas=..., weight_decay=...)``. Afterwards the model carries the
    updated adapter, without gradients, and is otherwise as found: adapter enabled, modes and requires_grad
    restored; gradient checkpointing is the caller's to turn on. Dropout acts in the gradient's forward alone.

    Raises ValueError, nothing changed, for hyperparameters or samples out of range, for a model without
    trainable parameters and for one that the kernels cannot serve; RuntimeError, the step not taken, for a
    gradient that is not finite.
    """
    validate_training(training)
    validate_samples(samples, model.get_input_embeddings().weight.shape[0])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("the model has no trainable parameter: is its adapter enabled and not frozen?")
    with state_as_found(model):
        states = _prepare(model, samples, training.teacher_top_k, kernels)
        _clear(parameters)
        optimizer = optimizer_cls(parameters, lr=training.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
        model.train()
        per_step_metrics: list[StepMetrics] = []
        try:
            for step in range(1, training.steps_per_batch + 1):
                sums = _accumulate_gradient(model, states, training, kernels)
                grad_norm = torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm, error_if_nonfinite=True)
                optimizer.step()
                _clear(parameters)
                per_step_metrics.append(_metrics(step, sums / len(states), grad_norm))
                if step < training.steps_per_batch:
                    _refresh(model, states, kernels)
        finally:
            _clear(parameters)
    return {"per_step_metrics": per_step_metrics}


def _prepare(model: Any, samples: Sequence[Any], top_k: int, kernels: Kernels) -> list[SampleState]:
    """Everything that no step changes, and the behaviour log-probs of step 1."""
    device = next(model.parameters()).device
    states: list[SampleState] = []
    with evaluating(model):
        for sample in samples:
            response = list(sample.response_token_ids)
            input_ids = torch.tensor([[*sample.prompt_token_ids, *response]], device=device)
            teacher_ids = torch.tensor([[*sample.teacher_prompt_token_ids, *response]], device=device)
            response_ids = torch.tensor([response], device=device)
            if kernels.check is not None and not states:
                kernels.check(model, input_ids)
            if sample.response_logprobs is None:
                read = kernels.read(model, input_ids, len(response))
                behaviour = kernels.response_logprobs(read, response_ids)
            else:
                recorded = list(sample.response_logprobs)
                behaviour = torch.tensor([recorded], dtype=torch.float32, device=device)
            with model.disable_adapter():
                read = kernels.read(model, input_ids, len(response))
                base = kernels.response_logprobs(read, response_ids)
                topk = kernels.teacher_topk(kernels.read(model, teacher_ids, len(response)), max(1, top_k))
            states.append(SampleState(input_ids, response_ids, base, *topk, behaviour))
    return states


def _accumulate_gradient(model: Any, states: Sequence[SampleState], training: Any, kernels: Kernels) -> Tensor:
    """Add the gradient of the mean loss, one sample's graph at a time; returns the sums over samples of
    total_loss and the four metrics, (5,) float64 on the model's device."""
    sums: list[Tensor] = []
    for state in states:
        read = kernels.read(model, state.input_ids, state.response_ids.shape[1])
        if state.behaviour is None:
            state.behaviour = kernels.response_logprobs(read, state.response_ids)
        result = kernels.loss(
            read,
            LossTerms(
                teacher_logprobs=state.teacher_logprobs,
                teacher_indices=state.teacher_indices,
                base_logprobs=state.base_logprobs,
                response_mask=torch.ones_like(state.response_ids, dtype=torch.float32),
                old_student_logprobs=state.behaviour,
                response_ids=state.response_ids,
                training=training,
            ),
        )
        loss = result["loss"]
        (loss / len(states)).backward()
        values = (loss.detach(), *(result[key] for key in METRIC_KEYS))
        on_device = [torch.as_tensor(value, dtype=torch.float64, device=loss.device) for value in values]
        sums.append(torch.stack(on_device))
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


def _refresh(model: Any, states: Iterable[SampleState], kernels: Kernels) -> None:
    """Each sample's behaviour log-probs become those of the policy as it now stands."""
    if kernels.refresh_from_next_forward:
        for state in states:
            state.behaviour = None
        return
    with evaluating(model):
        for state in states:
            read = kernels.read(model, state.input_ids, state.response_ids.shape[1])
            state.behaviour = kernels.response_logprobs(read, state.response_ids)


def _clear(parameters: Iterable[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
