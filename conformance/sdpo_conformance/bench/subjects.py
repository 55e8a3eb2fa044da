"""Calling an implementation on a workload: which entry does the work, and what surrounds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.bench.bench_inputs import Inputs
from sdpo_conformance.bench.peers import COMPILE, PEERS, other_objective
from sdpo_conformance.bench.workloads import Direction, Workload
from sdpo_conformance.judging.call import as_mapping, implementation_errors
from sdpo_conformance.judging.implementation import Implementation, load_implementation
from sdpo_conformance.protocol import (
    Capability,
    Claims,
    FusedSDPOLossInput,
    SDPOLossInput,
    TrainingConfig,
)
from sdpo_conformance.specs import DEFAULT, find_spec


class NotOffered(Exception):
    """The implementation has no entry for this work; one line."""


@dataclass(frozen=True)
class TimedSubject:
    """An implementation bound to a work. ``run`` is what is timed; ``loss`` its differentiable output, for the
    directions that have one. ``entry``: the protocol's entry behind it. ``remarks`` for the row. ``other``:
    what it computes in place of the CLaaS loss, else empty. ``flops``: of a step, the operations it cannot do
    without."""

    run: Callable[[Inputs], Any]
    entry: Capability
    remarks: tuple[str, ...] = ()
    other: str = ""
    loss: Callable[[Inputs], Tensor] | None = None
    flops: float = 0.0


def load(target: str) -> Implementation:
    """``load_implementation``, with ``compile:`` for the same through torch.compile, and the peers that need no
    adapter to be timed. Raises LoadingError."""
    if target in PEERS and PEERS[target].bind is not None:
        return Implementation(target, None, (Capability.LOSS,), Claims())
    return load_implementation(target.removeprefix(COMPILE), find_spec(DEFAULT))


def bind(implementation: Implementation, target: str, work: Workload) -> TimedSubject:
    """The subject of one row; raises NotOffered or LoadingError."""
    devices = implementation.claims.devices
    if devices is not None and work.device.partition(":")[0] not in devices:
        raise NotOffered(f"claims to run on {', '.join(devices)} only")
    if target.startswith(COMPILE) and work.direction not in (Direction.FORWARD, Direction.BOTH):
        raise NotOffered("compile: is for the loss")
    if work.direction is Direction.STEP:
        return step_subject(implementation, work)
    if work.direction is Direction.LOGPROBS:
        function = offered(implementation, Capability.RESPONSE_LOGPROBS)
        return TimedSubject(
            lambda inputs: function(inputs.hidden.detach(), inputs.head, inputs.response_ids),
            Capability.RESPONSE_LOGPROBS,
        )
    if work.direction is Direction.TOPK:
        function = offered(implementation, Capability.TEACHER_TOPK)
        return TimedSubject(
            lambda inputs: function(inputs.teacher_hidden, inputs.head, work.top_k), Capability.TEACHER_TOPK
        )
    return loss_subject(implementation, target, work)


def offered(implementation: Implementation, capability: Capability) -> Callable[..., Any]:
    """The implementation's entry, or NotOffered."""
    if capability not in implementation.offered:
        raise NotOffered(f"offers no {capability.value}")
    function: Callable[..., Any] = getattr(implementation.object, capability.value)
    return function


def loss_subject(implementation: Implementation, target: str, work: Workload) -> TimedSubject:
    """The loss from hidden states: the fused entry, else the product before the entry from logits, else the
    divergence alone."""
    training = TrainingConfig(alpha=work.alpha, kl_reg_weight=work.anchor)
    entry, remarks, other = Capability.FUSED, [], other_objective(target)
    peer = PEERS.get(target)
    if peer is not None and peer.bind is not None:
        loss, entry = peer.bind(work), Capability.LOSS
    elif Capability.FUSED in implementation.offered or Capability.LOSS in implementation.offered:
        entry = Capability.FUSED if Capability.FUSED in implementation.offered else Capability.LOSS
        function = compiled(offered(implementation, entry), target)
        if entry is Capability.LOSS:
            remarks.append("from logits: h @ W.T comes first")
        loss = protocol_loss(function, entry, training)
    elif Capability.DIVERGENCE in implementation.offered:
        entry, other = Capability.DIVERGENCE, "the divergence alone: no ratio, no anchor"
        if work.alpha >= 1:
            raise NotOffered("compute_divergence ends below alpha = 1")
        divergence = compiled(offered(implementation, entry), target)

        def loss(inputs: Inputs) -> Tensor:
            support = inputs.teacher_logprobs, inputs.teacher_indices
            per_token: Tensor = divergence(inputs.hidden, inputs.head, *support, work.alpha)
            return per_token.mean()

    else:
        raise NotOffered("offers no loss")
    if work.anchor and other:
        remarks.append("the anchor plays no part")
    run = forward(loss) if work.direction is Direction.FORWARD else forward_and_backward(loss)
    return TimedSubject(run, entry, tuple(remarks), other, loss)


def protocol_loss(
    function: Callable[..., Any], entry: Capability, training: TrainingConfig
) -> Callable[[Inputs], Tensor]:
    """The loss tensor of one of the protocol's two loss entries."""

    def loss(inputs: Inputs) -> Tensor:
        fields = {
            "teacher_logprobs": inputs.teacher_logprobs,
            "teacher_indices": inputs.teacher_indices,
            "base_logprobs": inputs.base_logprobs,
            "response_mask": inputs.response_mask,
            "old_student_logprobs": inputs.old_student_logprobs,
            "response_ids": inputs.response_ids,
        }
        if entry is Capability.FUSED:
            argument: Any = FusedSDPOLossInput(inputs.hidden, inputs.head, training=training, **fields)
        else:
            argument = SDPOLossInput(inputs.hidden @ inputs.head.T, training=training, **fields)
        found: Tensor = as_mapping(function(argument))["loss"]
        return found

    return loss


def forward(loss: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    """The loss without graph."""

    def run(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return loss(inputs)

    return run


def forward_and_backward(loss: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    """The gradient to the hidden states, (1, N, H)."""

    def run(inputs: Inputs) -> Tensor:
        return torch.autograd.grad(loss(inputs), inputs.hidden)[0]

    return run


def compiled(function: Callable[..., Any], target: str) -> Callable[..., Any]:
    """Through torch.compile where the target asks for it; one compilation per shape, the fastest it can be."""
    if not target.startswith(COMPILE):
        return function
    torch._dynamo.reset()
    found: Callable[..., Any] = torch.compile(function, dynamic=False)
    return found


def step_subject(implementation: Implementation, work: Workload) -> TimedSubject:
    """``distill`` on a model built from its config; the model is built here, outside the timing."""
    function = offered(implementation, Capability.DISTILL)
    from sdpo_conformance.bench.steps import STEPS, step_batch, step_flops, step_model

    most = implementation.claims.max_steps_per_batch
    if most is not None and most < STEPS:
        raise NotOffered(f"claims at most {most} steps per batch, this work takes {STEPS}")
    with implementation_errors("building the model"):
        model, samples = step_model(work), step_batch(work)
    training = TrainingConfig(
        alpha=work.alpha, kl_reg_weight=work.anchor, steps_per_batch=STEPS, teacher_top_k=work.top_k
    )
    return TimedSubject(
        lambda _: function(model, samples, training, torch.optim.AdamW),
        Capability.DISTILL,
        flops=step_flops(work, model),
    )
