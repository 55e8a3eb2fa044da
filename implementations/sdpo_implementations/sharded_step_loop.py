"""The step loop on several ranks: the samples are cut over them, the step is the mean over all samples.

Two ways to hold the model, told apart by looking at it:

* a copy on every rank (as DistributedDataParallel holds it; a wrapper is taken off): the adapter's gradients are
  summed over the ranks once a step;
* ``shard_model``, FSDP2's ``fully_shard``: each rank holds a part of every decoder layer, gradients arrive reduced,
  and every forward, the refresh's among them, gathers the weights as the optimizer left them.

Every rank makes as many forward passes as the one with most samples: a rank that has run out repeats a sample whose
weight is 0. What decides about the step (the gradient's norm, whether it is finite) is computed from reduced numbers,
so that every rank decides alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sdpo_conformance.protocol import METRIC_KEYS, DistillResult, StepMetrics
from sdpo_implementations.causal_lm import evaluating, state_as_found
from sdpo_implementations.shared_forward import SharedForward, lay_out
from sdpo_implementations.step_loop import BETAS, WEIGHT_DECAY, Kernels, LossTerms
from sdpo_implementations.validation import validate_samples, validate_training


def shard_model(model: Any, mesh: Any) -> Any:
    """``fully_shard`` each decoder layer of a ``PeftModel`` and the decoder around them over the 1-D ``mesh``.

    The output head stays whole on every rank, where a fused loss reads it. Everything is sharded again after each
    forward: a weight that stayed gathered would be the one before the optimizer's step. Returns ``model``.
    """
    language_model = model.get_base_model()
    decoder = getattr(language_model, language_model.base_model_prefix)
    head = language_model.get_output_embeddings()
    tied = {parameter for parameter in head.parameters() if any(parameter is p for p in decoder.parameters())}
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True, ignored_params=tied)
    return model


@dataclass
class Held:
    """A sample on this rank. ``weight``: 1, or 0 for one that only keeps the ranks in step; the tensors as in
    ``LossTerms``."""

    weight: float
    forward: SharedForward
    response_ids: Tensor
    base_logprobs: Tensor
    teacher_logprobs: Tensor
    teacher_indices: Tensor
    behaviour: Tensor


def distill_on_ranks(
    model: Any, samples: Sequence[Any], training: Any, optimizer_cls: Any, kernels: Kernels, mesh: Any
) -> DistillResult:
    """``step_loop.distill`` with ``samples``, the same list on every rank, cut over the ranks of the 1-D ``mesh``.

    Returns the metrics of the whole batch on every rank. Raises ValueError, nothing changed, as ``step_loop.distill``
    does, and RuntimeError on every rank, the step not taken, for a gradient that is not finite.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    validate_training(training)
    validate_samples(samples, model.get_input_embeddings().weight.shape[0])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("the model has no trainable parameter: is its adapter enabled and not frozen?")
    group, place, ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    with state_as_found(model):
        held = prepared(model, samples, training.teacher_top_k, kernels, place, ranks)
        cleared(parameters)
        optimizer = optimizer_cls(parameters, lr=training.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
        model.train()
        per_step_metrics: list[StepMetrics] = []
        try:
            for step in range(1, training.steps_per_batch + 1):
                factor = (ranks if sharded else 1) / len(samples)
                sums = accumulated(model, held, training, kernels, factor)
                dist.all_reduce(sums, group=group)
                if not sharded:
                    sum_gradients(parameters, group)
                norm = gradient_norm(parameters)
                if not bool(torch.isfinite(norm)):
                    raise RuntimeError(f"the gradient's norm is {float(norm)} at step {step}: no step was taken")
                torch.nn.utils.clip_grads_with_norm_(parameters, training.max_grad_norm, norm)
                optimizer.step()
                cleared(parameters)
                means = [float(value) for value in sums / len(samples)]
                per_step_metrics.append(metrics_of(step, means, float(norm)))
                if step < training.steps_per_batch:
                    refresh(model, held, kernels)
        finally:
            cleared(parameters)
    return {"per_step_metrics": per_step_metrics}


def share(count: int, place: int, ranks: int) -> list[tuple[int, float]]:
    """(index, weight) of this rank's samples: every ``ranks``-th, and the first again with weight 0 where it has one
    fewer than others."""
    mine = [(index, 1.0) for index in range(place, count, ranks)]
    return mine + [(0, 0.0)] * (-(-count // ranks) - len(mine))


def prepared(model: Any, samples: Sequence[Any], top_k: int, kernels: Kernels, place: int, ranks: int) -> list[Held]:
    """Everything that no step changes, and the behaviour log-probs of step 1."""
    device = model.get_output_embeddings().weight.device
    held = []
    with evaluating(model):
        for index, weight in share(len(samples), place, ranks):
            sample = samples[index]
            response = list(sample.response_token_ids)
            forward = lay_out([(sample.prompt_token_ids, response)], device)
            teacher = lay_out([(sample.teacher_prompt_token_ids, response)], device)
            response_ids = torch.tensor([response], device=device)
            with model.disable_adapter():
                base = kernels.response_logprobs(kernels.read(model, forward), response_ids)
                topk = kernels.teacher_topk(kernels.read(model, teacher), max(1, top_k))
            # Every rank makes this pass, or those of FSDP that need it would wait for the others.
            behaviour = kernels.response_logprobs(kernels.read(model, forward), response_ids)
            if sample.response_logprobs is not None:
                behaviour = torch.tensor([list(sample.response_logprobs)], dtype=torch.float32, device=device)
            held.append(Held(weight, forward, response_ids, base, *topk, behaviour))
    return held


def accumulated(model: Any, held: Sequence[Held], training: Any, kernels: Kernels, factor: float) -> Tensor:
    """Add this rank's gradients, each sample's loss times ``factor``; the sums over its samples of total_loss and the
    four metrics, (5,) float64."""
    sums: list[Tensor] = []
    for sample in held:
        read = kernels.read(model, sample.forward)
        terms = LossTerms(
            teacher_logprobs=sample.teacher_logprobs,
            teacher_indices=sample.teacher_indices,
            base_logprobs=sample.base_logprobs,
            response_mask=torch.ones_like(sample.response_ids, dtype=torch.float32),
            old_student_logprobs=sample.behaviour,
            response_ids=sample.response_ids,
            training=training,
        )
        found = kernels.loss(read, terms)
        loss = found["loss"]
        (loss * (factor * sample.weight)).backward()
        values = (loss.detach(), *(found[key] for key in METRIC_KEYS))
        stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=loss.device) for v in values])
        sums.append(stacked if sample.weight else torch.zeros_like(stacked))
    return torch.stack(sums).sum(0)


def sum_gradients(parameters: Sequence[torch.nn.Parameter], group: Any) -> None:
    """Every rank gets the sum of all ranks' gradients, in one message."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def gradient_norm(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """The norm of the whole gradient, the same number on every rank."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def refresh(model: Any, held: Sequence[Held], kernels: Kernels) -> None:
    """Behaviour log-probs become those of the policy as it now stands."""
    with evaluating(model):
        for sample in held:
            read = kernels.read(model, sample.forward)
            sample.behaviour = kernels.response_logprobs(read, sample.response_ids)


def metrics_of(step: int, means: Sequence[float], norm: float) -> StepMetrics:
    """One entry of ``per_step_metrics``."""
    total, distill_loss, kl_reg, mean_is_ratio, clip_fraction = means
    return {
        "step": step,
        "total_loss": total,
        "distill_loss": distill_loss,
        "kl_reg": kl_reg,
        "mean_is_ratio": mean_is_ratio,
        "clip_fraction": clip_fraction,
        "grad_norm": norm,
    }


def cleared(parameters: Sequence[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
