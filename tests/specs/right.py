"""Right implementations of each spec that differ in method: what must never be accused.

From the reference and the stages: float64 inside; a batch in rows; the divergence in probabilities and not in logs; the
log-sum-exp stored and subtracted by hand; the tail from what lies off the support; a detached weight with the
derivative put in by hand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.shared import stages
from sdpo_conformance.specs.shared.pipeline import Flow, Pipeline

FLOATS = ("float32", "float64")
Loss = Callable[[Any], Mapping[str, Any]]


def float64_inside(plain: Loss) -> Loss:
    """Every float upcast first."""

    def loss(loss_input: Any) -> Mapping[str, Any]:
        floats = {
            key: value.double()
            for key, value in vars(loss_input).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        result = plain(replace(loss_input, **floats))
        return {**result, "loss": result["loss"].to(torch.float32) if _single(loss_input) else result["loss"]}

    return loss


def _single(loss_input: Any) -> bool:
    found: bool = loss_input.student_logits.dtype != torch.float64
    return found


def by_hand(flow: Flow) -> Tensor:
    """Log-probs from a stored log-sum-exp."""
    top = flow.student.detach().amax(-1, keepdim=True)
    total = (flow.student - top).exp().sum(-1, keepdim=True).log() + top
    found: Tensor = flow.student - total
    return found


def in_probabilities(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum a (log a - log b) with torch's own kernel for a log a."""
    return torch.nn.functional.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)


def divergence_by_kernel(flow: Flow) -> Tensor:
    """The divergence with F.kl_div."""
    log_q, log_p = flow.log_q.clamp(min=-1e4), flow.log_p.clamp(min=-1e4)
    if flow.alpha == 0:
        return in_probabilities(log_p, log_q)
    if flow.alpha == 1:
        return in_probabilities(log_q, log_p)
    log_m = flow.log_m.clamp(min=-1e4)
    return torch.lerp(in_probabilities(log_q, log_m), in_probabilities(log_p, log_m), flow.alpha)


def tail_from_the_rest(flow: Flow) -> Tensor:
    """The tail's log-prob as the log-sum-exp of what lies off the support, clamped as the spec has it."""
    if flow.finish != "tail":
        return stages.student_categories(flow)
    off = flow.l.scatter(-1, flow.support, -torch.inf).logsumexp(-1, keepdim=True)
    least = torch.log(-torch.expm1(torch.tensor(stages.TAIL_CLAMP, dtype=torch.float64))).item()
    return torch.cat((flow.a, off.clamp(min=least)), dim=-1)


class _ByHand(torch.autograd.Function):
    """A loss whose gradient is made in the forward and scaled in the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, plain: Loss, loss_input: Any) -> Tensor:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = plain(replace(loss_input, student_logits=leaf))["loss"]
            (ctx.gradient,) = torch.autograd.grad(loss, [leaf])
        found: Tensor = loss.detach()
        return found

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return (ctx.gradient * incoming).to(ctx.gradient.dtype), None, None


def eager_backward(plain: Loss) -> Loss:
    """The gradient made in the forward, where one is asked for."""

    def loss(loss_input: Any) -> Mapping[str, Any]:
        if not torch.is_grad_enabled():
            return {"loss": plain(loss_input)["loss"]}
        return {"loss": _ByHand.apply(loss_input.student_logits, plain, loss_input)}

    return loss


def only_loss(plain: Loss) -> Loss:
    """No metrics, and the inputs made contiguous first."""

    def loss(loss_input: Any) -> Mapping[str, Any]:
        tensors = {key: value.contiguous() for key, value in vars(loss_input).items() if isinstance(value, Tensor)}
        return {"loss": plain(replace(loss_input, **tensors))["loss"]}

    return loss


def right_losses(spec: str) -> dict[str, tuple[Loss, tuple[str, ...]]]:
    """Name -> loss and the dtypes that it is for."""
    found = find_spec(spec)
    folder = found.package.rpartition(".")[2]
    reference: Loss = importlib.import_module(f"sdpo_implementations.reference.{folder}").compute_sdpo_loss
    pipeline: Pipeline = importlib.import_module(f"{found.package}.pipeline").PIPELINE
    losses: dict[str, tuple[Loss, tuple[str, ...]]] = {
        "reference": (reference, found.dtypes),
        "stages": (pipeline, found.dtypes),
        "float64 inside": (float64_inside(reference), found.dtypes),
        "gradient in the forward": (eager_backward(reference), FLOATS),
        "loss alone": (only_loss(reference), found.dtypes),
    }
    if "per_token" in pipeline.stages and "log_q" in pipeline.stages:

        def per_token(flow: Flow) -> Tensor:
            return stages.surrogate(flow) if flow.sampled else divergence_by_kernel(flow)

        losses["torch's kl_div"] = (pipeline.but(per_token=per_token), found.dtypes)
    if "l" in pipeline.stages:
        losses["stored log-sum-exp"] = (pipeline.but(l=by_hand), found.dtypes)
    if spec == "lasgroup":
        losses["tail from the rest"] = (pipeline.but(log_q=tail_from_the_rest), found.dtypes)
    return losses
