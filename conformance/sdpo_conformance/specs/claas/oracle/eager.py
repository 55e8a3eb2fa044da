"""What plain PyTorch makes of the loss in the very dtypes it is given: the yardstick for half precision.

Not the truth: every intermediate is rounded to the dtype that PyTorch's promotion gives it, as in any
implementation that does not upcast. ``tolerances`` allows twice the error made here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo_conformance.protocol import MASS_FLOOR, RATIO_LOG_CLAMP, FusedSDPOLossInput, SDPOLossInput
from sdpo_conformance.specs.claas.oracle.reverse_kl import teacher_logprob_of_response


@dataclass(frozen=True)
class EagerLoss:
    """All float64 copies of what came out: 0-dim results, (B, T) ``per_token``, and gradients by field."""

    loss: Tensor
    distill_loss: Tensor
    kl_reg: Tensor
    mean_is_ratio: Tensor
    per_token: Tensor
    gradients: dict[str, Tensor]
    per_token_gradients: dict[str, Tensor]

    @property
    def finite(self) -> bool:
        tensors = [self.loss, self.kl_reg, self.mean_is_ratio, *self.gradients.values()]
        return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def divergence(student_at_support: Tensor, teacher_logprobs: Tensor, alpha: float) -> Tensor:
    """(B, T), alpha < 1, in the promoted dtype of the arguments."""
    weight = torch.tensor(alpha, dtype=student_at_support.dtype)
    p, q = teacher_logprobs.exp(), student_at_support.exp()
    p = p / p.sum(-1, keepdim=True).clamp(min=MASS_FLOOR)
    q = q / q.sum(-1, keepdim=True).clamp(min=MASS_FLOOR)
    log_p, log_q = p.log(), q.log()
    log_m = torch.logaddexp(log_p + weight.log(), log_q + (1 - weight).log())
    teacher_part = (p * (log_p - log_m)).sum(-1)
    student_part = (q * (log_q - log_m)).sum(-1)
    return (1 - weight) * student_part + weight * teacher_part


def eager_loss(
    loss_input: SDPOLossInput | FusedSDPOLossInput, incoming: float = 1.0, token_incoming: Tensor | None = None
) -> EagerLoss:
    """Forward and backward on CPU tensors; never raises on finite input.

    ``incoming``: the gradient that arrives at the loss. ``token_incoming`` (B, T): the gradients of the bare divergence
    under this one, and not of the loss.
    """
    training = loss_input.training
    if isinstance(loss_input, FusedSDPOLossInput):
        leaves = {
            "student_hidden": loss_input.student_hidden.detach().clone().requires_grad_(),
            "lm_head_weight": loss_input.lm_head_weight.detach().clone().requires_grad_(),
        }
        logits = leaves["student_hidden"] @ leaves["lm_head_weight"].T
    else:
        leaves = {"student_logits": loss_input.student_logits.detach().clone().requires_grad_()}
        logits = leaves["student_logits"]
    mask = loss_input.response_mask
    support, y = loss_input.teacher_indices.long(), loss_input.response_ids.long()
    logprobs = F.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    if training.alpha < 1:
        per_token = divergence(logprobs.gather(-1, support), loss_input.teacher_logprobs, training.alpha)
    else:
        tau_y = teacher_logprob_of_response(loss_input.teacher_logprobs, support, y)
        per_token = (chosen - tau_y).detach() * chosen

    log_ratio = (chosen - loss_input.old_student_logprobs).detach().clamp(-RATIO_LOG_CLAMP, RATIO_LOG_CLAMP)
    ratio = log_ratio.exp().clamp(max=training.is_clip)
    drift = (chosen - loss_input.base_logprobs).clamp(-RATIO_LOG_CLAMP, RATIO_LOG_CLAMP)
    k3 = drift.exp() - 1 - drift
    n = mask.sum().clamp(min=1.0)
    distill_loss = (per_token * ratio * mask).sum() / n
    kl_reg = (k3 * mask).sum() / n
    loss = distill_loss + training.kl_reg_weight * kl_reg

    def gradients_of(output: Tensor, arriving: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(output, list(leaves.values()), arriving, retain_graph=True, materialize_grads=True)
        return {key: gradient.double() for key, gradient in zip(leaves, found, strict=True)}

    return EagerLoss(
        loss=loss.detach().double(),
        distill_loss=distill_loss.detach().double(),
        kl_reg=kl_reg.detach().double(),
        mean_is_ratio=((ratio * mask).sum() / n).detach().double(),
        per_token=per_token.detach().double(),
        gradients={} if token_incoming is not None else gradients_of(loss, torch.full_like(loss, incoming)),
        per_token_gradients={} if token_incoming is None else gradients_of(per_token, token_incoming.to(per_token)),
    )
