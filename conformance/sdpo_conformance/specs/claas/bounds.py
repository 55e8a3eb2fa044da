"""Every bound of the suite, stated once, with its reason.

The truth is the float64 oracle on the very inputs the implementation got. What a right implementation may
be off by follows from where rounding enters:

* a logit carries ``eps |z|`` (through hidden states: the float32 accumulation of ``|h| |W|`` besides), the
  logsumexp ``eps |logsumexp|``, a log-prob the sum of both: implementations that store the logsumexp in
  float32 are right;
* a divergence is a small difference of large terms, so ``eps`` times the sum of the absolute terms; the
  gradient likewise, element by element and token by token, so that nothing hides in a norm;
* the ratio's relative error is the absolute error of its logarithm, and none where it is saturated;
* ``alpha`` itself is rounded to the working dtype (upstream makes a tensor of it).

``float32`` and ``float64`` may be off by FLOAT_FACTOR of that. ``bfloat16`` and ``float16`` may be off by
HALF_FACTOR of that plus twice what plain PyTorch (``oracle.eager``) is off by on the same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sdpo_conformance.cases.case import divergence_incoming
from sdpo_conformance.judging.expectation import (
    EAGER_FACTOR,
    FLOAT_FACTOR,
    HALF_FACTOR,
    LARGEST_SHARE,
    SMALLEST,
    Expectation,
    Expectations,
    WhenAsked,
    epsilon,
)
from sdpo_conformance.protocol import RATIO_LOG_CLAMP, Capability, FusedSDPOLossInput, SDPOLossInput
from sdpo_conformance.specs.claas.loss_case import LossCase
from sdpo_conformance.specs.claas.oracle.divergence import Divergence, divergence_gradient
from sdpo_conformance.specs.claas.oracle.eager import eager_loss
from sdpo_conformance.specs.claas.oracle.loss import LossTruth, indices, upcast

MANY_TERMS = 1000
"""From this many columns on, the rounding of a float32 sum over the vocabulary grows as the root of their number."""

COLUMNS_PER_ROUNDING = 16
"""An online logsumexp rounds once per tile, and all of its roundings may go one way: tiles of 16 columns or more."""

TOKENS_PER_ROUNDING = 16
"""A mean that is summed token by token rounds at every token, and equal terms round one way."""

CAP_MARGIN = 4.0
"""Units within which a ratio may fall on either side of the cap."""


def tiles(columns: int) -> float:
    """Roundings of a logsumexp that is kept online, tile by tile: all of them may go one way."""
    return max(1.0, columns / COLUMNS_PER_ROUNDING) if columns > MANY_TERMS else 1.0


def is_half(eps: float) -> bool:
    """Whether an epsilon is bfloat16's or float16's."""
    return eps > 1e-5


class TokenErrors:
    """First-order rounding analysis of the formulas in ``oracle``: absolute errors per unit factor, each worked out
    where it is asked for. (B, T): ``divergence``, ``ratio`` (relative), ``k3``; ``weight`` (relative). (B, T, V):
    ``divergence_gradient`` (of D alone), ``loss_gradient`` (of the loss)."""

    def __init__(self, truth: LossTruth, loss_input: SDPOLossInput | FusedSDPOLossInput) -> None:
        self.truth, self.loss_input, self.training = truth, loss_input, loss_input.training
        self.counted = upcast(loss_input.response_mask) != 0
        self.support, self.y = indices(loss_input.teacher_indices), indices(loss_input.response_ids)
        z = truth.logits
        if isinstance(loss_input, FusedSDPOLossInput):
            hidden, head = upcast(loss_input.student_hidden), upcast(loss_input.lm_head_weight)
            eps_z = max(epsilon(loss_input.student_hidden), epsilon(loss_input.lm_head_weight))
            accumulation = min(eps_z, torch.finfo(torch.float32).eps)
            z_error = eps_z * z.abs() + accumulation * torch.nan_to_num(hidden.abs() @ head.abs().T)
        else:
            eps_z = epsilon(loss_input.student_logits)
            z_error = eps_z * torch.where(z.isinf(), 0.0, z.abs())
        self.eps_z, self.eps_tau = eps_z, epsilon(loss_input.teacher_logprobs)
        self.eps = max(eps_z, self.eps_tau)
        self.eps_old = max(eps_z, epsilon(loss_input.old_student_logprobs))
        self.eps_base = max(eps_z, epsilon(loss_input.base_logprobs))

        logprobs = z - truth.logsumexp.unsqueeze(-1)
        self.softmax = logprobs.exp()
        finite_logprobs = torch.where(logprobs.isinf(), 0.0, logprobs)
        size = truth.logsumexp.abs().unsqueeze(-1) + 1 + (1.0 if is_half(eps_z) else tiles(z.shape[-1]))
        logsumexp_error = (self.softmax * z_error).sum(-1, keepdim=True) + eps_z * size
        self.l_error = z_error + logsumexp_error + eps_z * (finite_logprobs.abs() + 2)
        self.chosen_error = self.l_error.gather(-1, self.y.unsqueeze(-1)).squeeze(-1)

    @cached_property
    def onehot(self) -> Tensor:
        """(B, T, V): 1 at the response."""
        return torch.zeros_like(self.softmax).scatter_(-1, self.y.unsqueeze(-1), 1.0)

    @cached_property
    def weight(self) -> float:
        eps_sum = torch.finfo(torch.float32).eps if self.eps_z > 1e-12 else self.eps_z
        weight_error = 2 * max(epsilon(self.loss_input.response_mask), eps_sum)
        return weight_error + eps_sum * float(self.counted.sum()) / TOKENS_PER_ROUNDING

    @cached_property
    def ratio(self) -> Tensor:
        old = torch.where(self.counted, upcast(self.loss_input.old_student_logprobs), 0.0)
        log_ratio = self.truth.chosen - old
        saturated = (log_ratio.abs() > RATIO_LOG_CLAMP + 1) | (log_ratio > math.log(self.training.is_clip) + 1)
        size = torch.nan_to_num(old.abs() + log_ratio.abs(), posinf=0.0) + 2
        return torch.where(saturated, 2 * self.eps_old, self.chosen_error + self.eps_old * size)

    @cached_property
    def _divergence(self) -> tuple[Tensor, Callable[[], Tensor]]:
        """The error of D, and its gradient's where that is asked for."""
        truth, loss_input = self.truth, self.loss_input
        if truth.divergence is not None:
            tau = torch.where(self.counted.unsqueeze(-1), upcast(loss_input.teacher_logprobs), 0.0)
            return _divergence_errors(
                truth.divergence,
                self.training.alpha,
                tau,
                self.l_error,
                self.softmax,
                self.support,
                self.eps,
                self.eps_tau,
            )
        slope = truth.reverse_kl_slope
        tau_y = truth.chosen - slope
        slope_error = self.chosen_error + self.eps_tau * tau_y.abs() + self.eps * slope.abs()
        of_value = truth.chosen.abs() * slope_error + slope.abs() * self.chosen_error
        return of_value + self.eps * truth.per_token.abs(), lambda: self._of_chosen(slope, slope_error, self.eps)

    @property
    def divergence(self) -> Tensor:
        return self._divergence[0]

    @cached_property
    def divergence_gradient(self) -> Tensor:
        return self._divergence[1]()

    @cached_property
    def _k3(self) -> tuple[Tensor, Tensor]:
        """The errors of k3 and of its slope."""
        base = torch.where(self.counted, upcast(self.loss_input.base_logprobs), 0.0)
        difference = self.truth.chosen - base
        d = difference.clamp(-RATIO_LOG_CLAMP, RATIO_LOG_CLAMP)
        outside = difference.abs() > RATIO_LOG_CLAMP
        d_rounding = self.chosen_error + self.eps_base * torch.nan_to_num(base.abs() + d.abs(), posinf=0.0)
        near_clamp = (difference.abs() - RATIO_LOG_CLAMP).abs() <= 8 * d_rounding
        flat, exp_d, steep = outside & ~near_clamp, d.exp(), torch.expm1(d).abs()
        error = torch.where(flat, 0.0, steep * d_rounding)
        error = error + self.eps_base * (exp_d + 1 + d.abs()) + torch.where(outside, 0.0, exp_d * d_rounding**2)
        slope_error = torch.where(flat, 0.0, exp_d * d_rounding + self.eps_base * (exp_d + 1))
        return error, slope_error + torch.where(near_clamp, steep, 0.0)

    @property
    def k3(self) -> Tensor:
        return self._k3[0]

    @cached_property
    def loss_gradient(self) -> Tensor:
        truth = self.truth
        scale = (truth.ratio * truth.weight).unsqueeze(-1)
        divergence_part = _gradient_of_divergence(truth, self)
        loss_gradient = scale * (
            self.divergence_gradient + divergence_part * (self.ratio.unsqueeze(-1) + self.weight + 3 * self.eps_old)
        )
        if self.training.kl_reg_weight:
            anchor = self._of_chosen(truth.k3_slope, self._k3[1], self.eps_base)
            loss_gradient = loss_gradient + abs(self.training.kl_reg_weight) * truth.weight.unsqueeze(-1) * (
                anchor + self.weight * (truth.k3_slope.unsqueeze(-1) * (self.onehot - self.softmax)).abs()
            )
        return loss_gradient

    def _of_chosen(self, slope: Tensor, slope_error: Tensor, eps: float) -> Tensor:
        """Error of slope * (onehot(y) - softmax), (B, T, V). The product of both errors counts: at a token that is sure
        and at its base, slope and direction vanish together."""
        slope, slope_error = slope.abs().unsqueeze(-1), slope_error.unsqueeze(-1)
        direction_error = self.softmax * (self.l_error + 2 * eps) + 2 * eps * self.onehot
        return slope_error * (self.onehot - self.softmax).abs() + (slope + slope_error) * direction_error


def _gradient_of_divergence(truth: LossTruth, errors: TokenErrors) -> Tensor:
    """|dD/dz|, (B, T, V), undoing nothing: recomputed from the parts so that a zero ratio does no harm."""
    if truth.divergence is None:
        return (truth.reverse_kl_slope.unsqueeze(-1) * (errors.onehot - errors.softmax)).abs()
    q = truth.divergence.log_q.exp()
    push = torch.where(q > 0, q * truth.divergence.slope, 0.0)
    total = push.sum(-1, keepdim=True)
    floor = truth.divergence.on_floor.unsqueeze(-1)
    at_support = torch.where(floor, push, push - q * total).abs()
    return torch.zeros_like(errors.softmax).scatter_add(-1, errors.support, at_support) + torch.where(
        floor, total.abs() * errors.softmax, 0.0
    )


def _divergence_errors(
    divergence: Divergence,
    alpha: float,
    tau: Tensor,
    l_error: Tensor,
    softmax: Tensor,
    support: Tensor,
    eps: float,
    eps_tau: float,
) -> tuple[Tensor, Callable[[], Tensor]]:
    """Errors of D (B, T) and, where it is asked for, of dD/dz (B, T, V) for alpha < 1."""
    p, q = divergence.log_p.exp(), divergence.log_q.exp()
    log_p = torch.where(p > 0, divergence.log_p, 0.0)
    log_q = torch.where(q > 0, divergence.log_q, 0.0)
    log_m = torch.where(divergence.log_m.isinf(), 0.0, divergence.log_m)
    m = divergence.log_m.exp()
    teacher_log, student_log = torch.where(p > 0, log_p - log_m, 0.0), torch.where(q > 0, log_q - log_m, 0.0)

    l_at_support = l_error.gather(-1, support)
    q_error = l_at_support + (q * l_at_support).sum(-1, keepdim=True) + 2 * eps
    finite_tau = torch.where(tau.isinf(), 0.0, tau.abs())
    p_error = eps_tau * (finite_tau + 2)
    p_error = p_error + (p * p_error).sum(-1, keepdim=True) + 2 * eps

    terms = alpha * p * (log_p.abs() + log_m.abs() + 1) + (1 - alpha) * q * (log_q.abs() + log_m.abs() + 1)
    teacher_share = torch.where(m > 0, alpha * p / m, 0.0)
    curved = (1 - alpha) * q * teacher_share * q_error**2 + alpha * p * (1 - teacher_share) * p_error**2
    moved = q * (1 - alpha) * student_log.abs() * q_error + alpha * p * teacher_log.abs() * p_error
    of_alpha = (p * teacher_log).sum(-1).abs() + (q * student_log).sum(-1).abs()
    d_error = (2 * eps * terms + moved + curved).sum(-1) + eps * (alpha * 1.0 if alpha < 0.5 else 1.0) * of_alpha

    def of_gradient() -> Tensor:
        slope_error = (1 - alpha) * (
            eps * (log_q.abs() + log_m.abs() + 2) + teacher_share * (q_error + p_error)
        ) + eps * (alpha if alpha < 0.5 else 1.0) * student_log.abs()
        slope = divergence.slope.abs()
        push, push_error = q * slope, q * (slope_error + slope * (q_error + eps))
        on_floor = divergence.on_floor.unsqueeze(-1)
        all_push, all_push_error = push.sum(-1, keepdim=True), push_error.sum(-1, keepdim=True)
        at_support = push_error + torch.where(on_floor, 0.0, q * (all_push_error + all_push * (q_error + eps)))
        everywhere = softmax * (all_push_error + torch.where(on_floor, all_push * (l_error + eps), eps * all_push))
        return everywhere.scatter_add(-1, support, at_support)

    return d_error, of_gradient


_KNOWN: WeakKeyDictionary[LossCase, dict[Capability, Expectations]] = WeakKeyDictionary()


def expectations(case: LossCase, entry: Capability) -> Expectations:
    """Truth and bound of every result and gradient of ``entry`` on ``case``; computed once per case."""
    known = _KNOWN.setdefault(case, {})
    if entry not in known:
        known[entry] = _expectations(case, entry)
    return known[entry]


def _expectations(case: LossCase, entry: Capability) -> Expectations:
    truth, training, loss_input, trainable_head = case.truth, case.training, case.loss_input, case.trainable_head
    errors = TokenErrors(truth, loss_input)
    half = any(t.dtype in (torch.bfloat16, torch.float16) for t in case.tensors().values())
    divergence_only = entry is Capability.DIVERGENCE
    eager, attainable = None, True
    if half:
        try:
            eager = eager_loss(case.loss_input, case.incoming, divergence_incoming(case) if divergence_only else None)
        except RuntimeError:
            attainable = False
    factor = HALF_FACTOR if half else FLOAT_FACTOR
    floating = [t.dtype for key, t in case.tensors().items() if t.is_floating_point() and key != "response_mask"]
    smallest = max(SMALLEST[dtype] for dtype in floating)
    eps = max(torch.finfo(dtype).eps for dtype in floating)

    def expect(value: Tensor, error: Tensor, eager_value: Tensor | None) -> Expectation:
        bound = factor * (error + eps * value.abs()) + smallest
        if eager_value is not None:
            bound = bound + EAGER_FACTOR * torch.nan_to_num((eager_value - value).abs(), nan=0.0, posinf=0.0)
        return Expectation(value, bound)

    attainable = attainable and abs(case.incoming) <= LARGEST_SHARE * min(torch.finfo(d).max for d in floating)
    if divergence_only:
        per_token = expect(truth.per_token, errors.divergence, eager.per_token if eager else None)
        incoming = divergence_incoming(case).unsqueeze(-1)
        logits_gradient = incoming * _signed_divergence_gradient(truth, indices(case.loss_input.teacher_indices))
        gradients = WhenAsked(
            lambda: _input_gradients(
                loss_input,
                trainable_head,
                logits_gradient,
                incoming.abs() * errors.divergence_gradient,
                eager.per_token_gradients if eager else None,
                factor,
                eps,
                smallest * max(1.0, float(incoming.abs().max()) if incoming.numel() else 0.0),
            )
        )
        attainable = attainable and (
            eager is None
            or (
                bool(torch.isfinite(eager.per_token).all())
                and all(bool(torch.isfinite(g).all()) for g in eager.per_token_gradients.values())
            )
        )
        return Expectations({"divergence": per_token}, gradients, attainable and fits(case, logits_gradient, gradients))

    weight = truth.weight
    ratio_relative = errors.ratio + errors.weight + 2 * eps
    distill_error = (weight * truth.ratio * (errors.divergence + truth.per_token.abs() * ratio_relative)).sum()
    k3_error = (weight * (errors.k3 + truth.k3.abs() * (errors.weight + 2 * eps))).sum()
    loss_error = distill_error + abs(training.kl_reg_weight) * k3_error + eps * truth.distill_loss.abs()
    results = {
        "loss": expect(truth.loss, loss_error, eager.loss if eager else None),
        "distill_loss": expect(truth.distill_loss, distill_error, eager.distill_loss if eager else None),
        "kl_reg": expect(truth.kl_reg, k3_error, eager.kl_reg if eager else None),
        "mean_is_ratio": expect(
            truth.mean_is_ratio,
            (weight * truth.ratio * ratio_relative).sum(),
            eager.mean_is_ratio if eager else None,
        ),
        "clip_fraction": _clip_fraction(case, errors),
    }
    arriving, logits_gradient = abs(case.incoming), truth.grad_logits * case.incoming
    gradients = WhenAsked(
        lambda: _input_gradients(
            loss_input,
            trainable_head,
            logits_gradient,
            errors.loss_gradient * arriving,
            eager.gradients if eager else None,
            factor,
            eps,
            smallest * max(1.0, arriving),
        )
    )
    finite = eager is None or eager.finite
    return Expectations(results, gradients, attainable and finite and fits(case, logits_gradient, gradients))


def fits(case: LossCase, logits_gradient: Tensor, gradients: Mapping[str, Expectation]) -> bool:
    """Whether every true gradient can be stored in the dtype of its input; most often their sum of absolute terms can,
    and the gradients need not be looked at."""
    tensors = case.tensors()
    factors = [tensors[key] for key in ("student_hidden", "lm_head_weight") if key in tensors and tensors[key].numel()]
    largest = max([1.0, *(float(one.abs().max()) for one in factors)])
    least = min(torch.finfo(tensors[key].dtype).max for key in case.differentiable)
    if float(logits_gradient.abs().sum()) * largest <= LARGEST_SHARE * least:
        return True
    return all(
        expectation.value.numel() == 0
        or float(expectation.value.abs().max()) <= LARGEST_SHARE * torch.finfo(tensors[key].dtype).max
        for key, expectation in gradients.items()
    )


def _signed_divergence_gradient(truth: LossTruth, support: Tensor) -> Tensor:
    """dD/dz of the bare divergence, without ratio or mask."""
    assert truth.divergence is not None
    logprobs = truth.logits - truth.logsumexp.unsqueeze(-1)
    return divergence_gradient(truth.divergence, logprobs, support)


def _clip_fraction(case: LossCase, errors: TokenErrors) -> Expectation:
    truth, training = case.truth, case.training
    old = upcast(case.loss_input.old_student_logprobs)
    log_ratio = torch.where(truth.weight != 0, truth.chosen - old, 0.0).clamp(-RATIO_LOG_CLAMP, RATIO_LOG_CLAMP)
    margin = CAP_MARGIN * errors.ratio.clamp(min=1e-15)
    above = log_ratio - math.log(training.is_clip)
    surely = (truth.weight * (above > margin)).sum()
    possibly = (truth.weight * (above >= -margin)).sum()
    rounding = 1e-6 + FLOAT_FACTOR * errors.weight * possibly
    return Expectation((surely + possibly) / 2, (possibly - surely).abs() / 2 + rounding)


def _input_gradients(
    loss_input: SDPOLossInput | FusedSDPOLossInput,
    trainable_head: bool,
    logits_gradient: Tensor,
    logits_error: Tensor,
    eager: dict[str, Tensor] | None,
    factor: float,
    eps: float,
    smallest: float,
) -> dict[str, Expectation]:
    """Carry the gradient of the logits, and its error, to the fields the implementation owes a gradient."""
    if isinstance(loss_input, FusedSDPOLossInput):
        hidden, head = upcast(loss_input.student_hidden), upcast(loss_input.lm_head_weight)
        hidden = torch.where(torch.isfinite(hidden), hidden, 0.0)
        terms = head.shape[0]
        summing = math.sqrt(terms) / 4 if terms > MANY_TERMS and factor == FLOAT_FACTOR else 1.0
        spread = logits_error + summing * eps * logits_gradient.abs() + smallest
        pairs = {"student_hidden": (logits_gradient @ head, spread @ head.abs())}
        if trainable_head:
            pairs["lm_head_weight"] = (
                torch.einsum("btv,bth->vh", logits_gradient, hidden),
                torch.einsum("btv,bth->vh", spread, hidden.abs()),
            )
    else:
        pairs = {"student_logits": (logits_gradient, logits_error)}
    found = {}
    for key, (value, error) in pairs.items():
        bound = factor * (error + eps * value.abs()) + smallest
        if eager is not None:
            bound = bound + EAGER_FACTOR * torch.nan_to_num((eager[key] - value).abs(), nan=0.0, posinf=0.0)
        found[key] = Expectation(value, bound)
    return found
