"""The loss as a composition of named parts, so that a way to get it wrong is one part replaced.

Plain PyTorch with autograd. Unchanged, the parts are a right implementation, finite in the corners where
upstream's is not. They compute in float32, in float64 for float64 input, or in the precision that the caller
asks for: a defect run in float64 predicts what an implementation that has it returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo_conformance.protocol import (
    MASS_FLOOR,
    RATIO_LOG_CLAMP,
    RKL_FLOOR_LOGPROB,
    FusedSDPOLossInput,
    TrainingConfig,
)

LOG_ZERO = -1e4
"""Stands for log 0: exp of it is 0 in every dtype, and no product or difference with it is NaN."""


@dataclass
class Work:
    """What the parts read and leave behind for the parts after them.

    Given, in the working precision unless said otherwise: ``z`` (B, T, V) logits, ``tau`` (B, T, K) and
    ``support`` (B, T, K, int64), ``base``, ``old``, ``mask`` (B, T), ``y`` (B, T, int64), the
    hyperparameters, and ``given``, the dtype of the logits or hidden states handed over. In the fused
    entries ``head`` is (V, H), and ``z`` the hidden states (B, T, H) until the part ``logits`` has run.
    Every other tensor is left by the part of the same name.
    """

    z: Tensor
    tau: Tensor
    support: Tensor
    base: Tensor
    old: Tensor
    mask: Tensor
    y: Tensor
    alpha: float
    is_clip: float
    kl_reg_weight: float
    given: torch.dtype
    head: Tensor | None = None

    l: Tensor = field(init=False)  # noqa: E741  (the symbol of the spec)
    chosen: Tensor = field(init=False)
    l_k: Tensor = field(init=False)
    log_p: Tensor = field(init=False)
    log_q: Tensor = field(init=False)
    log_m: Tensor = field(init=False)
    tau_y: Tensor = field(init=False)
    divergence: Tensor = field(init=False)
    log_ratio: Tensor = field(init=False)
    ratio: Tensor = field(init=False)
    drift: Tensor = field(init=False)
    k3: Tensor = field(init=False)
    weighted: Tensor = field(init=False)
    count: Tensor = field(init=False)
    distill_loss: Tensor = field(init=False)
    kl_reg: Tensor = field(init=False)
    loss: Tensor = field(init=False)

    @property
    def reverse(self) -> bool:
        """Whether the objective is the reverse-KL surrogate."""
        return self.alpha >= 1


Part = Callable[[Work], Tensor]
Result = Mapping[str, Any]


def log_softmax(w: Work) -> Tensor:
    """l, (B, T, V)."""
    return F.log_softmax(w.z, dim=-1)


def chosen(w: Work) -> Tensor:
    """l[y], (B, T)."""
    return w.l.gather(-1, w.y.unsqueeze(-1)).squeeze(-1)


def student_at_support(w: Work) -> Tensor:
    """l[S], (B, T, K)."""
    return w.l.gather(-1, w.support).clamp(min=LOG_ZERO)


def renormalise(logprobs: Tensor, floor: float = MASS_FLOOR) -> Tensor:
    """log of exp(x_k) / max(sum_k exp(x_k), floor)."""
    return logprobs - torch.logsumexp(logprobs, dim=-1, keepdim=True).clamp(min=math.log(floor))


def teacher_distribution(w: Work) -> Tensor:
    """log p, (B, T, K)."""
    return renormalise(w.tau.clamp(min=LOG_ZERO))


def student_distribution(w: Work) -> Tensor:
    """log q, (B, T, K)."""
    return renormalise(w.l_k)


def log_of(probability: float) -> float:
    """log with log 0 = -inf."""
    return math.log(probability) if probability > 0 else -math.inf


def mix(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """log(alpha p + (1 - alpha) q)."""
    return torch.logaddexp(log_p + log_of(alpha), log_q + log_of(1 - alpha))


def mixture(w: Work) -> Tensor:
    """log m, (B, T, K)."""
    return mix(w.log_p, w.log_q, w.alpha)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum_k a (log a - log b), (B, T)."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def jensen_shannon(w: Work) -> Tensor:
    """D for alpha < 1, (B, T)."""
    return w.alpha * kl(w.log_p, w.log_m) + (1 - w.alpha) * kl(w.log_q, w.log_m)


def teacher_at_response(w: Work) -> Tensor:
    """tau_y, (B, T)."""
    match = w.support == w.y.unsqueeze(-1)
    found = torch.where(match, w.tau, 0.0).sum(-1)
    return torch.where(match.any(-1), found, RKL_FLOOR_LOGPROB)


def reverse_kl(w: Work) -> Tensor:
    """D for alpha >= 1, (B, T)."""
    return (w.chosen - w.tau_y).detach() * w.chosen


def per_token(w: Work) -> Tensor:
    """D whichever the objective, (B, T): a hook for what happens to both alike."""
    return w.divergence


def log_ratio(w: Work) -> Tensor:
    """log of the importance ratio before the cap, (B, T)."""
    return (w.chosen - w.old).detach().clamp(-RATIO_LOG_CLAMP, RATIO_LOG_CLAMP)


def ratio(w: Work) -> Tensor:
    """r, (B, T)."""
    return w.log_ratio.exp().clamp(max=w.is_clip)


def weighted(w: Work) -> Tensor:
    """D r, (B, T)."""
    return w.divergence * w.ratio


def drift(w: Work) -> Tensor:
    """The anchor's log-ratio d, (B, T)."""
    return (w.chosen - w.base).clamp(-RATIO_LOG_CLAMP, RATIO_LOG_CLAMP)


def k3(w: Work) -> Tensor:
    """(B, T)."""
    return torch.expm1(w.drift) - w.drift


def count(w: Work) -> Tensor:
    """n, 0-dim."""
    return w.mask.sum().clamp(min=1.0)


def token_mean(w: Work, values: Tensor) -> Tensor:
    """sum(values mask) / n, 0-dim."""
    return (values * w.mask).sum() / w.count


def distill_loss(w: Work) -> Tensor:
    """0-dim."""
    return token_mean(w, w.weighted)


def kl_reg(w: Work) -> Tensor:
    """0-dim."""
    return token_mean(w, w.k3)


def loss(w: Work) -> Tensor:
    """0-dim."""
    return w.distill_loss + w.kl_reg_weight * w.kl_reg


def mean_is_ratio(w: Work) -> Tensor:
    """0-dim."""
    return token_mean(w, w.ratio)


def clip_fraction(w: Work) -> Tensor:
    """0-dim."""
    return token_mean(w, (w.ratio >= w.is_clip).to(w.ratio))


def result(w: Work, metrics: Mapping[str, Tensor]) -> Result:
    """The mapping that the entry returns."""
    return {"loss": w.loss, **{key: value.item() for key, value in metrics.items()}}


def accept(loss_input: Any, clean: bool = True) -> Work:
    """Upcast, and put zeros where the mask is zero: nothing that stands there may reach a product.
    ``clean`` off leaves them, as an implementation does that does not know the mask."""
    fused = hasattr(loss_input, "student_hidden")
    given = loss_input.student_hidden if fused else loss_input.student_logits
    inside = working_dtype(given.dtype)
    mask = loss_input.response_mask.to(inside)
    counted = mask != 0 if clean else torch.ones_like(mask, dtype=torch.bool)

    def upcast(tensor: Tensor) -> Tensor:
        where = counted if tensor.dim() == 2 else counted.unsqueeze(-1)
        return torch.where(where, tensor.to(inside), 0.0)

    training = loss_input.training
    return Work(
        z=upcast(given),
        head=loss_input.lm_head_weight.to(inside) if fused else None,
        tau=upcast(loss_input.teacher_logprobs.detach()),
        support=loss_input.teacher_indices.long(),
        base=upcast(loss_input.base_logprobs.detach()),
        old=upcast(loss_input.old_student_logprobs.detach()),
        mask=mask.detach(),
        y=loss_input.response_ids.long(),
        alpha=training.alpha,
        is_clip=training.is_clip,
        kl_reg_weight=training.kl_reg_weight,
        given=given.dtype,
    )


def project(hidden: Tensor, head: Tensor) -> Tensor:
    """Logits (B, T, V) of hidden states (B, T, H) and head (V, H)."""
    return hidden @ head.T


def logits(w: Work) -> Tensor:
    """z (B, T, V): what was given, or the projection of the hidden states in its place."""
    return w.z if w.head is None else project(w.z, w.head)


def as_given(w: Work, gradient: Tensor) -> Tensor:
    """A gradient, unchanged."""
    return gradient


def received(incoming: Tensor) -> Tensor:
    """The gradient that arrives at the loss, unchanged."""
    return incoming


def logprobs_of(hidden: Tensor, head: Tensor) -> Tensor:
    """l (B, T, V) from hidden states, in the working precision."""
    inside = working_dtype(hidden.dtype)
    return F.log_softmax(project(hidden.to(inside), head.to(inside)), dim=-1)


def response_logprobs(hidden: Tensor, head: Tensor, response_ids: Tensor) -> Tensor:
    """l[y] (B, T), without graph."""
    with torch.no_grad():
        return logprobs_of(hidden, head).gather(-1, response_ids.long().unsqueeze(-1)).squeeze(-1)


def teacher_topk(hidden: Tensor, head: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest log-probs and their token ids, each (B, T, K), without graph."""
    with torch.no_grad():
        values, ids = logprobs_of(hidden, head).topk(min(max(1, k), head.shape[0]), dim=-1)
        return values, ids


def working_dtype(given: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if given == torch.float64 else torch.float32


@dataclass(frozen=True)
class Parts:
    """The parts in the order of their evaluation; the defaults are right.

    ``incoming``, ``logits_gradient``, ``hidden_gradient`` and ``head_gradient`` are passed gradients in the
    backward. ``entry`` is the whole loss entry, for what goes wrong around the formulas.
    """

    accept: Callable[[Any], Work] = accept
    logits: Part = logits
    log_softmax: Part = log_softmax
    chosen: Part = chosen
    student_at_support: Part = student_at_support
    teacher_distribution: Part = teacher_distribution
    student_distribution: Part = student_distribution
    mixture: Part = mixture
    jensen_shannon: Part = jensen_shannon
    teacher_at_response: Part = teacher_at_response
    reverse_kl: Part = reverse_kl
    per_token: Part = per_token
    log_ratio: Part = log_ratio
    ratio: Part = ratio
    drift: Part = drift
    k3: Part = k3
    weighted: Part = weighted
    count: Part = count
    distill_loss: Part = distill_loss
    kl_reg: Part = kl_reg
    loss: Part = loss
    mean_is_ratio: Part = mean_is_ratio
    clip_fraction: Part = clip_fraction
    incoming: Callable[[Tensor], Tensor] = received
    logits_gradient: Callable[[Work, Tensor], Tensor] = as_given
    hidden_gradient: Callable[[Work, Tensor], Tensor] = as_given
    head_gradient: Callable[[Work, Tensor], Tensor] = as_given
    result: Callable[[Work, Mapping[str, Tensor]], Result] = result
    entry: Callable[[Parts, Any], Result] = lambda parts, loss_input: enter(parts, loss_input)
    response_logprobs: Callable[[Tensor, Tensor, Tensor], Tensor] = response_logprobs
    teacher_topk: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] = teacher_topk


def hooked(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The same values; in the backward their gradient passes through ``change``."""
    passed = tensor.view_as(tensor)
    if passed.requires_grad:
        passed.register_hook(change)
    return passed


def evaluate_divergence(parts: Parts, w: Work) -> None:
    """Logits, log-probs and D."""
    if w.head is not None:
        w.z = hooked(w.z, lambda gradient: parts.hidden_gradient(w, gradient))
        w.head = hooked(w.head, lambda gradient: parts.head_gradient(w, gradient))
    w.z = hooked(parts.logits(w), lambda gradient: parts.logits_gradient(w, gradient))
    w.l = parts.log_softmax(w)
    w.chosen = parts.chosen(w)
    if w.reverse:
        w.tau_y = parts.teacher_at_response(w)
        w.divergence = parts.reverse_kl(w)
    else:
        w.l_k = parts.student_at_support(w)
        w.log_p, w.log_q = parts.teacher_distribution(w), parts.student_distribution(w)
        w.log_m = parts.mixture(w)
        w.divergence = parts.jensen_shannon(w)
    w.divergence = parts.per_token(w)


def evaluate_loss(parts: Parts, w: Work) -> dict[str, Tensor]:
    """Everything; returns the metrics without graph and leaves the loss in ``w.loss``."""
    evaluate_divergence(parts, w)
    w.log_ratio = parts.log_ratio(w)
    w.ratio = parts.ratio(w)
    w.drift = parts.drift(w)
    w.k3 = parts.k3(w)
    w.weighted = parts.weighted(w)
    w.count = parts.count(w)
    w.distill_loss, w.kl_reg = parts.distill_loss(w), parts.kl_reg(w)
    w.loss = hooked(parts.loss(w), parts.incoming)
    return {
        "distill_loss": w.distill_loss.detach(),
        "kl_reg": w.kl_reg.detach(),
        "mean_is_ratio": parts.mean_is_ratio(w).detach(),
        "clip_fraction": parts.clip_fraction(w).detach(),
    }


def enter(parts: Parts, loss_input: Any) -> Result:
    """Either loss entry, from the caller's input to the mapping it gets back."""
    w = parts.accept(loss_input)
    return parts.result(w, evaluate_loss(parts, w))


def enter_divergence(
    parts: Parts,
    hidden: Tensor,
    head: Tensor,
    teacher_logprobs: Tensor,
    teacher_indices: Tensor,
    alpha: float,
) -> Tensor:
    """The divergence entry: D (B, T) for alpha < 1."""
    tokens = hidden.new_zeros(hidden.shape[:2])
    everything = FusedSDPOLossInput(
        student_hidden=hidden,
        lm_head_weight=head,
        teacher_logprobs=teacher_logprobs,
        teacher_indices=teacher_indices,
        base_logprobs=tokens,
        response_mask=torch.ones_like(tokens),
        old_student_logprobs=tokens,
        response_ids=tokens.long(),
        training=TrainingConfig(alpha=alpha),
    )
    w = parts.accept(everything)
    evaluate_divergence(parts, w)
    return hooked(w.divergence, parts.incoming)
