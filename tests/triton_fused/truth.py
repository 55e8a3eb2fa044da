"""CLaaS SDPO in float64 by autograd: the truth these tests compare with, and inputs that reach every branch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FLOOR = math.log(1e-8)


@dataclass
class Batch:
    """One loss input: ``student_hidden`` and ``lm_head_weight``, and the logits entry's fields on demand."""

    student_hidden: Tensor
    lm_head_weight: Tensor
    teacher_logprobs: Tensor
    teacher_indices: Tensor
    base_logprobs: Tensor
    response_mask: Tensor
    old_student_logprobs: Tensor
    response_ids: Tensor
    training: Any = field(default_factory=lambda: SimpleNamespace(alpha=0.5, is_clip=5.0, kl_reg_weight=0.0))

    def to(self, device: torch.device) -> Batch:
        return replace(
            self, **{k: v.detach().clone().to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        )

    def with_training(self, **values: float) -> Batch:
        return replace(self, training=SimpleNamespace(**{**vars(self.training), **values}))

    def logits(self) -> Tensor:
        return self.student_hidden.double() @ self.lm_head_weight.double().T


def make_batch(
    shape: tuple[int, int], vocabulary: int, width: int, k: int, dtype: torch.dtype = torch.float32,
    seed: int = 0, spread: float = 1.0, least_likely_support: bool = False,
) -> Batch:  # fmt: skip
    """Random but typical: a teacher near the student, old and base log-probs off by a little, a fractional
    mask with zeros. ``least_likely_support``: at every other token, whose mass on the support then lies below
    the floor where ``spread`` is large."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    hidden = normal(*shape, width).to(dtype)
    head = (normal(vocabulary, width) * spread / math.sqrt(width)).to(dtype)
    z = hidden.double() @ head.double().T
    teacher = (z + normal(*shape, vocabulary)).log_softmax(-1)
    support = teacher.topk(k, dim=-1).indices
    if least_likely_support:
        support[:, 1::2] = (-z).topk(k, dim=-1).indices[:, 1::2]
    ids = torch.randint(0, vocabulary, shape, generator=generator)
    ids[:, ::2] = z.argmax(-1)[:, ::2]
    chosen = z.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    mask = torch.rand(shape, generator=generator).round(decimals=1)
    mask = torch.where(torch.rand(shape, generator=generator) < 0.25, 0.0, mask)
    return Batch(
        student_hidden=hidden,
        lm_head_weight=head,
        teacher_logprobs=teacher.gather(-1, support).float(),
        teacher_indices=support,
        base_logprobs=(chosen + 0.5 * normal(*shape)).float(),
        response_mask=mask,
        old_student_logprobs=(chosen + normal(*shape)).float(),
        response_ids=ids,
    )


def xlogy_difference(weight: Tensor, difference: Tensor) -> Tensor:
    return torch.where(weight > 0, weight * torch.where(weight > 0, difference, 0.0), 0.0)


def divergence(logprobs: Tensor, teacher_logprobs: Tensor, support: Tensor, alpha: float) -> Tensor:
    """D (B, T) for alpha < 1."""
    log_q = logprobs.gather(-1, support)
    log_q = log_q - log_q.logsumexp(-1, keepdim=True).clamp(min=FLOOR)
    log_p = teacher_logprobs.double()
    log_p = log_p - log_p.logsumexp(-1, keepdim=True).clamp(min=FLOOR)
    p, q = log_p.exp(), log_q.exp()
    log_m = (alpha * p + (1 - alpha) * q).log()
    to_mixture = alpha * xlogy_difference(p, log_p - log_m) + (1 - alpha) * xlogy_difference(q, log_q - log_m)
    return to_mixture.sum(-1) if alpha > 0 else 0.0 * q.sum(-1)


def loss_from_logits(z: Tensor, batch: Batch) -> dict[str, Tensor]:
    """All five results, ``z`` (B, T, V) float64."""
    training = batch.training
    counted = batch.response_mask != 0
    logprobs = torch.where(counted.unsqueeze(-1), z, 0.0).log_softmax(-1)
    support = torch.where(counted.unsqueeze(-1), batch.teacher_indices.long(), 0)
    ids = torch.where(counted, batch.response_ids.long(), 0)
    chosen = logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    tau = torch.where(counted.unsqueeze(-1), batch.teacher_logprobs.double(), 0.0)
    if training.alpha < 1:
        per_token = divergence(logprobs, tau, support, training.alpha)
    else:
        match = support == ids.unsqueeze(-1)
        teacher = torch.where(match.any(-1), torch.where(match, tau, 0.0).sum(-1), -20.0)
        per_token = (chosen - teacher).detach() * chosen
    old = torch.where(counted, batch.old_student_logprobs.double(), 0.0)
    ratio = (chosen.detach() - old).clamp(-20, 20).exp().clamp(max=training.is_clip)
    d = (chosen - torch.where(counted, batch.base_logprobs.double(), 0.0)).clamp(-20, 20)
    weight = batch.response_mask.double()
    weight = weight / weight.sum().clamp(min=1)
    distill_loss, kl_reg = (per_token * ratio * weight).sum(), ((torch.expm1(d) - d) * weight).sum()
    return {
        "loss": distill_loss + training.kl_reg_weight * kl_reg if training.kl_reg_weight else distill_loss,
        "distill_loss": distill_loss,
        "kl_reg": kl_reg,
        "mean_is_ratio": (ratio * weight).sum(),
        "clip_fraction": ((ratio >= training.is_clip) * weight).sum(),
    }


def true_loss(batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """(results, gradients to hidden, head and logits), float64."""
    counted = (batch.response_mask != 0).unsqueeze(-1)
    hidden = torch.where(counted, batch.student_hidden.double(), 0.0).requires_grad_()
    head = batch.lm_head_weight.double().requires_grad_()
    z = hidden @ head.T
    results = loss_from_logits(z, batch)
    gradients = torch.autograd.grad(results["loss"], (hidden, head, z), allow_unused=True)
    return results, *(
        torch.zeros_like(x) if g is None else g for x, g in zip((hidden, head, z), gradients, strict=True)
    )


def error(got: Tensor, true: Tensor) -> float:
    """Worst row's distance over the largest row's norm: a wrong token does not hide in the batch's norm."""
    got, true = got.detach().double().cpu(), true.detach()
    assert got.shape == true.shape
    if true.dim() == 0:
        return float((got - true).abs() / (true.abs() + 1e-30))
    distance, size = (got - true).norm(dim=-1), true.norm(dim=-1)
    return float(torch.nan_to_num(distance, nan=math.inf).max() / (size.max() + 1e-30))
