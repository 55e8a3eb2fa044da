"""What the words "usable for" of the catalogue mean as a condition on an input of a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sdpo_conformance.specs.claas.loss_case import LossCase
from sdpo_conformance.specs.claas.oracle.loss import upcast

Kind = Callable[[LossCase], bool]


def mask(case: LossCase) -> Tensor:
    return upcast(case.loss_input.response_mask)


def log_ratio(case: LossCase) -> Tensor:
    """l[y] - old of the tokens that count."""
    return (case.truth.chosen - upcast(case.loss_input.old_student_logprobs))[mask(case) != 0]


def drift(case: LossCase) -> Tensor:
    """l[y] - base of the tokens that count."""
    return (case.truth.chosen - upcast(case.loss_input.base_logprobs))[mask(case) != 0]


def on_policy(case: LossCase) -> bool:
    return bool((log_ratio(case).abs() < 0.02).all())


def within(values: Tensor, low: float, high: float) -> bool:
    return bool(((values > low) & (values < high)).all())


def student_mass(case: LossCase) -> Tensor:
    """log of the student's mass on the support."""
    logprobs = case.truth.logits - case.truth.logsumexp.unsqueeze(-1)
    return logprobs.gather(-1, case.loss_input.teacher_indices.long()).logsumexp(-1)[mask(case) != 0]


def teacher_mass(case: LossCase) -> Tensor:
    return upcast(case.loss_input.teacher_logprobs).logsumexp(-1)[mask(case) != 0]


def masses_above(case: LossCase, log_mass: float) -> bool:
    return bool((student_mass(case) > log_mass).all()) and bool((teacher_mass(case) > log_mass).all())


def inside_support(case: LossCase) -> bool:
    """Every response token is in the teacher's support."""
    ids = case.loss_input.response_ids.long().unsqueeze(-1)
    return bool((case.loss_input.teacher_indices.long() == ids).any(-1).all())


def alpha(case: LossCase) -> float:
    return case.training.alpha


def weight(case: LossCase) -> float:
    return case.training.kl_reg_weight


def support(case: LossCase) -> int:
    return int(case.loss_input.teacher_indices.shape[-1])


def tokens(case: LossCase) -> int:
    return case.loss_input.response_ids.numel()


def length(case: LossCase) -> int:
    return int(case.loss_input.response_ids.shape[1])


def rows(case: LossCase) -> int:
    return int(case.loss_input.response_ids.shape[0])


def whole_mask(case: LossCase) -> bool:
    return bool((mask(case) == 1).all())


def leading(case: LossCase) -> Tensor:
    return case.tensors()["student_hidden" if case.fused else "student_logits"]


def dtype(case: LossCase) -> torch.dtype:
    return leading(case).dtype


def hidden_size(case: LossCase) -> int:
    return int(leading(case).shape[-1])


def equal_counts(case: LossCase) -> bool:
    """Rows with equally many tokens."""
    return rows(case) > 1 and whole_mask(case)


def anything(case: LossCase) -> bool:
    return True


def frozen(case: LossCase) -> bool:
    return case.fused and not case.trainable_head


ON_POLICY_WORDS = "steps_per_batch = 1 with log-probs recorded by the same policy and software: the ratio is 1 there."

KINDS: Mapping[str, Kind] = {
    ON_POLICY_WORDS: on_policy,
    "Training: loss and gradient are right, the metric is not.": anything,
    "kl_reg_weight = 0, the default.": lambda c: weight(c) == 0,
    "alpha < 1.": lambda c: alpha(c) < 1,
    "Reading the metrics: every value is right, the gradient is not.": anything,
    "kl_reg_weight = 0, the default; only the kl_reg metric is wrong there.": lambda c: weight(c) == 0,
    "Nothing but the full vocabulary as support (K = V), where the two agree.": lambda c: support(c) == c.vocabulary,
    "Nothing but the full vocabulary as support (K = V).": lambda c: support(c) == c.vocabulary,
    "Masks that are 1 everywhere, as the step loop makes them.": whole_mask,
    "alpha < 1, and responses inside the support.": lambda c: alpha(c) < 1 and inside_support(c),
    "kl_reg_weight = 0, the default, where every number is right.": lambda c: weight(c) == 0,
    "Vocabularies divisible by 16.": lambda c: c.vocabulary % 16 == 0,
    "Masks of zeros and ones.": lambda c: bool(((mask(c) == 0) | (mask(c) == 1)).all()) and not whole_mask(c),
    "Vocabularies of up to 65536 tokens.": lambda c: c.vocabulary <= 65536,
    "Supports of two tokens or more.": lambda c: support(c) > 1,
    "alpha = 0.5 only, where the two agree.": lambda c: alpha(c) == 0.5,
    "alpha = 0.5 and alpha = 1.": lambda c: alpha(c) == 0.5,
    "bfloat16 runs that bear its rounding.": lambda c: dtype(c) == torch.bfloat16,
    "float16 runs that bear its rounding.": lambda c: dtype(c) == torch.float16,
    "bfloat16 runs.": lambda c: dtype(c) == torch.bfloat16,
    "bfloat16 input.": lambda c: dtype(c) == torch.bfloat16,
    "float32 input.": lambda c: dtype(c) == torch.float32,
    "float32 input. Vocabularies of up to 256 tokens.": lambda c: dtype(c) == torch.float32,
    "alpha < 1. At alpha = 1 the values are right, the gradient is not.": lambda c: alpha(c) < 1,
    "Ratios below is_clip, and on-policy steps.": lambda c: (
        within(log_ratio(c), -30, math.log(c.training.is_clip)) and not on_policy(c)
    ),
    "Batches of one row, as the step loop makes them.": lambda c: rows(c) == 1,
    "Contiguous inputs.": lambda c: c.layout == "contiguous",
    "Contiguous inputs that are no slices of larger tensors.": lambda c: c.layout == "contiguous",
    "Frozen heads.": frozen,
    "alpha > 0.": lambda c: alpha(c) > 0,
    "Training: the gradient is right, the values are off by a constant.": anything,
    "Training: the gradient is right, the value is rounded.": anything,
    "Students that hold more than 1e-8 of their mass on the support.": lambda c: bool((student_mass(c) > -18.4).all()),
    "Tokens whose log-probs are above -20.": lambda c: bool((c.truth.chosen[mask(c) != 0] > -20).all()),
    "Single-token responses.": lambda c: length(c) == 1,
    "Evaluation: every number is right.": anything,
    "A loss that backward() is called on directly: no scaling, no accumulation, no mean over samples.": lambda c: (
        c.incoming == 1
    ),
    "Training.": anything,
    "Everything upstream itself is usable for: upstream does the same.": anything,
    "Models that mask no logits out.": lambda c: bool(torch.isfinite(leading(c)).all()),
    "0.001 <= alpha <= 0.999.": lambda c: 0.001 <= alpha(c) <= 0.999,
    "K = 1, where the divergence is 0 anyway.": lambda c: support(c) == 1,
    "K > 1.": lambda c: support(c) > 1,
    "Supports sorted by token id.": lambda c: (
        support(c) > 1 and bool((c.loss_input.teacher_indices.diff(dim=-1) > 0).all())
    ),
    "Students whose mass on the support is above 1e-8, with logits not far below 0.": lambda c: bool(
        (student_mass(c) > -18.4).all()
    ),
    "Supports that hold more than 1e-8 of both distributions, as a teacher's top-100 does.": lambda c: masses_above(
        c, -18.4
    ),
    "Teachers that hold more than 1e-8 of their mass on the support: any top-k does.": lambda c: bool(
        (teacher_mass(c) > -18.4).all()
    ),
    "Supports that hold more than 1e-6 of both distributions.": lambda c: masses_above(c, -13.8),
    "Supports that hold much more than 1e-8 of both distributions.": lambda c: masses_above(c, -2),
    "Supports whose every entry has more than 1e-8 of both distributions.": lambda c: masses_above(c, -2),
    "teacher_top_k up to 8 or divisible by 8.": lambda c: support(c) <= 8,
    **{f"teacher_top_k up to {k}.": (lambda c, k=k: support(c) <= k) for k in (16, 32, 64)},  # type: ignore[misc]
    "Nothing that needs the tail of the support.": anything,
    "alpha < 0.9 and alpha = 1.": lambda c: alpha(c) < 0.9,
    "alpha < 1, and supports whose log-probs are above -20.": lambda c: (
        alpha(c) < 1 and bool((c.loss_input.teacher_logprobs > -20).all())
    ),
    "alpha < 1, and teachers that are nowhere certain.": lambda c: (
        alpha(c) < 1 and bool((c.loss_input.teacher_logprobs < 0).all())
    ),
    "Ratios above 1 / is_clip, and on-policy steps.": lambda c: within(
        log_ratio(c), -math.log(max(c.training.is_clip, 1)), 30
    ),
    "is_clip = 5.0, the default.": lambda c: c.training.is_clip == 5,
    "is_clip = 2.0, and on-policy steps.": lambda c: c.training.is_clip == 2,
    "Log-ratios within +-20.": lambda c: within(log_ratio(c), -20, 20),
    "Log-ratios within +-10.": lambda c: within(log_ratio(c), -10, 10),
    "Log-ratios above -20.": lambda c: within(log_ratio(c), -20, math.inf),
    "Log-ratios above -20, with is_clip up to 20.": lambda c: (
        within(log_ratio(c), -20, math.inf) and c.training.is_clip <= 20
    ),
    "alpha < 1, and on-policy steps.": lambda c: alpha(c) < 1,
    "alpha = 1, and on-policy steps.": lambda c: alpha(c) == 1,
    "On-policy steps in one and the same software, where the ratio is 1.": on_policy,
    "Finite behaviour log-probs.": lambda c: bool(torch.isfinite(c.loss_input.old_student_logprobs).all()),
    "Ratios above 0.01, and on-policy steps.": lambda c: within(log_ratio(c), math.log(0.01), math.inf),
    "Ratios below the threshold.": lambda c: within(log_ratio(c), -math.inf, math.log(2)) and not on_policy(c),
    "Ratios above the floor.": lambda c: within(log_ratio(c), math.log(0.5), math.inf) and not on_policy(c),
    "Ratios below the clamp.": lambda c: within(log_ratio(c), -math.inf, 0.5) and not on_policy(c),
    **{f"Batches of up to {n} tokens.": (lambda c, n=n: tokens(c) <= n) for n in (16, 32, 128, 256)},  # type: ignore[misc]
    "Policies within 2.6 nats of the base, where k3 is below 10.": lambda c: within(drift(c), -2.6, 2.6),
    "Policies within 20 nats of the base.": lambda c: within(drift(c), -20, 20),
    "Policies within 10 nats of the base.": lambda c: within(drift(c), -10, 10),
    "Tokens at most 20 nats less likely than under the base.": lambda c: within(drift(c), -20, math.inf),
    "Policies within 20 nats of the base, and kl_reg_weight = 0.": lambda c: within(drift(c), -20, 20),
    "kl_reg_weight = 1.": lambda c: weight(c) == 1,
    "kl_reg_weight = 0 and kl_reg_weight = 1.": lambda c: weight(c) == 1,
    "Ratios below is_clip, and on-policy steps with is_clip > 1.": lambda c: within(
        log_ratio(c), -30, math.log(c.training.is_clip)
    ),
    "kl_reg_weight = 0, or bfloat16 runs that bear its rounding.": lambda c: weight(c) == 0,
    "kl_reg_weight = 0, or reading the metrics.": lambda c: weight(c) == 0,
    "Batches of one row, as the step loop makes them. Rows with equally many tokens agree as well.": equal_counts,
    "One row.": lambda c: rows(c) == 1,
    "Batches with at least one whole token.": lambda c: bool((mask(c) >= 1).any()),
    "Batches whose mask sums to 1 or more.": lambda c: float(mask(c).sum()) >= 1,
    "Responses without token 0.": lambda c: bool((c.loss_input.response_ids != 0).all()),
    "Response lengths up to 16 or divisible by 16.": lambda c: length(c) <= 16 or length(c) % 16 == 0,
    "Responses of up to 8 tokens.": lambda c: 1 < length(c) <= 8,
    "Responses of up to 16 tokens.": lambda c: 1 < length(c) <= 16,
    "kl_reg_weight > 0.": lambda c: weight(c) > 0,
    "kl_reg_weight > 0, and training without the anchor: the gradient is right.": lambda c: weight(c) > 0,
    "Incoming gradients that are positive.": lambda c: c.incoming > 0 and c.incoming != 1,
    "Everything but bitwise reproduction.": anything,
    "Logits below 80.": lambda c: bool((c.truth.logits < 80).all()),
    "Padding with finite numbers, as upstream needs too.": lambda c: not whole_mask(c),
    "Responses with at least one token.": lambda c: length(c) > 0,
    "Vocabularies of up to 32 tokens.": lambda c: c.vocabulary <= 32,
    "alpha < 1 with kl_reg_weight = 0.": lambda c: alpha(c) < 1 and weight(c) == 0,
    "Batches with fewer than 2^15 logits (2^31 in the int32 form).": lambda c: leading(c).numel() < 2**15,
    "Hidden sizes divisible by 16.": lambda c: c.fused and hidden_size(c) % 16 == 0,
    "Frozen heads, and batches of one row.": frozen,
    "Frozen heads, and alpha < 1 with kl_reg_weight = 0.": frozen,
    "Graphs that are not retained, and incoming gradients of 1.": lambda c: c.incoming == 1,
    "One forward and one backward at a time.": anything,
    "Behaviour log-probs computed under no_grad.": anything,
    "Callers that do not read clip_fraction.": anything,
    "Memory to spare: the values and the gradient to hidden are right.": anything,
}
