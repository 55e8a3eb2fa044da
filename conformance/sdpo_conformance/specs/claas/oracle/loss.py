"""The CLaaS SDPO loss in float64: per-token parts, their reduction, and the gradient.

    n = max(sum mask, 1);  distill_loss = sum(D r mask)/n;  kl_reg = sum(k3 mask)/n
    loss = distill_loss + kl_reg_weight * kl_reg
    mean_is_ratio = sum(r mask)/n;  clip_fraction = sum([r >= is_clip] mask)/n

A position whose mask is 0 counts for nothing, whatever stands there.
Source: claas/training/sdpo_loss.py, compute_sdpo_loss, kfallah/CLaaS at e2331f7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdpo_conformance.protocol import FusedSDPOLossInput, SDPOLossInput
from sdpo_conformance.specs.claas.oracle.anchor import k3
from sdpo_conformance.specs.claas.oracle.divergence import Divergence, divergence_gradient, generalised_jensen_shannon
from sdpo_conformance.specs.claas.oracle.importance import importance_ratio
from sdpo_conformance.specs.claas.oracle.reverse_kl import reverse_kl_weight, teacher_logprob_of_response


@dataclass(frozen=True)
class LossTruth:
    """The truth about one input, all float64 on the CPU.

    0-dim: ``loss``, ``distill_loss``, ``kl_reg``, ``mean_is_ratio``, ``clip_fraction``. (B, T):
    ``per_token`` D, ``ratio`` r, ``k3``, ``chosen`` l[y], ``logsumexp``, ``weight`` mask/n, and the
    derivatives with respect to l[y]: ``reverse_kl_slope`` (0 for alpha < 1) and ``k3_slope``.
    ``logits`` z and ``grad_logits`` (B, T, V). ``divergence`` is None for alpha >= 1.
    """

    loss: Tensor
    distill_loss: Tensor
    kl_reg: Tensor
    mean_is_ratio: Tensor
    clip_fraction: Tensor
    per_token: Tensor
    ratio: Tensor
    k3: Tensor
    logits: Tensor
    chosen: Tensor
    logsumexp: Tensor
    weight: Tensor
    reverse_kl_slope: Tensor
    k3_slope: Tensor
    grad_logits: Tensor
    divergence: Divergence | None


def upcast(tensor: Tensor) -> Tensor:
    """The exact float64 value of what the implementation was given, on the CPU."""
    return tensor.detach().to(device="cpu", dtype=torch.float64)


def indices(tensor: Tensor) -> Tensor:
    """Token ids as torch indexes them: int64 on the CPU."""
    return tensor.detach().to(device="cpu", dtype=torch.int64)


def logits_of(loss_input: SDPOLossInput | FusedSDPOLossInput) -> Tensor:
    """(B, T, V) float64 logits; for the fused input the product of hidden states and head."""
    if isinstance(loss_input, FusedSDPOLossInput):
        return upcast(loss_input.student_hidden) @ upcast(loss_input.lm_head_weight).T
    return upcast(loss_input.student_logits)


def sdpo_loss(loss_input: SDPOLossInput | FusedSDPOLossInput) -> LossTruth:
    """The spec, executed: every part of the loss and its gradient with respect to the logits."""
    training = loss_input.training
    mask = upcast(loss_input.response_mask)
    counted = mask != 0
    z = logits_of(loss_input)
    z = torch.where(counted.unsqueeze(-1), z, torch.zeros_like(z))
    tau = torch.where(counted.unsqueeze(-1), upcast(loss_input.teacher_logprobs), 0.0)
    old = torch.where(counted, upcast(loss_input.old_student_logprobs), 0.0)
    base = torch.where(counted, upcast(loss_input.base_logprobs), 0.0)
    support, y = indices(loss_input.teacher_indices), indices(loss_input.response_ids)

    log_z = torch.logsumexp(z, dim=-1, keepdim=True)
    l = z - log_z  # noqa: E741  (the symbol of the spec)
    chosen = l.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    onehot_minus_softmax = -l.exp()
    onehot_minus_softmax.scatter_add_(-1, y.unsqueeze(-1), torch.ones_like(chosen).unsqueeze(-1))

    divergence: Divergence | None = None
    if training.alpha < 1:
        divergence = generalised_jensen_shannon(l.gather(-1, support), tau, training.alpha)
        per_token = divergence.value
        reverse_kl_slope = torch.zeros_like(chosen)
        grad_per_token = divergence_gradient(divergence, l, support)
    else:
        reverse_kl_slope = reverse_kl_weight(chosen, teacher_logprob_of_response(tau, support, y))
        per_token = reverse_kl_slope * chosen
        grad_per_token = reverse_kl_slope.unsqueeze(-1) * onehot_minus_softmax

    ratio = importance_ratio(chosen, old, training.is_clip)
    k3_per_token, k3_slope = k3(chosen, base)

    weight = mask / mask.sum().clamp(min=1.0)
    distill_loss = (per_token * ratio * weight).sum()
    kl_reg = (k3_per_token * weight).sum()
    grad_logits = (ratio * weight).unsqueeze(-1) * grad_per_token
    if training.kl_reg_weight != 0:
        anchor = training.kl_reg_weight * k3_slope * weight
        grad_logits = grad_logits + anchor.unsqueeze(-1) * onehot_minus_softmax
    return LossTruth(
        loss=distill_loss + training.kl_reg_weight * kl_reg,
        distill_loss=distill_loss,
        kl_reg=kl_reg,
        mean_is_ratio=(ratio * weight).sum(),
        clip_fraction=((ratio >= training.is_clip).to(torch.float64) * weight).sum(),
        per_token=per_token,
        ratio=ratio,
        k3=k3_per_token,
        logits=z,
        chosen=chosen,
        logsumexp=log_z.squeeze(-1),
        weight=weight,
        reverse_kl_slope=reverse_kl_slope,
        k3_slope=k3_slope,
        grad_logits=grad_logits,
        divergence=divergence,
    )
