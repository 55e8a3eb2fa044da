"""IS: the clipped importance ratio, the part that fused rewrites lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from hypothesis import strategies as st

from sdpo_conformance.cases.precision import DTYPES
from sdpo_conformance.judging.call import (
    NotReported,
    Outcome,
    call_entry,
    differentiable_output,
    implementation_errors,
    is_fused_entry,
    materialise,
)
from sdpo_conformance.judging.compare import GRADIENT, Disagreement, compare, number
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.protocol import RATIO_LOG_CLAMP, SDPOLossInput, TrainingConfig
from sdpo_conformance.specs.claas.bounds import expectations
from sdpo_conformance.specs.claas.corners import NEUTRAL, Corner
from sdpo_conformance.specs.claas.inputs.on_policy import on_policy
from sdpo_conformance.specs.claas.inputs.special import CLIPS, negative_zeros, special_case, with_values
from sdpo_conformance.specs.claas.loss_case import LossCase
from sdpo_conformance.specs.claas.rules.aspects import LOSSES, VALUE
from sdpo_conformance.specs.requirement import UPSTREAM, Level, requirement

SOURCE = f"{UPSTREAM} compute_sdpo_loss, step 3"
METRICS = ("mean_is_ratio", "clip_fraction")
ANY_ALPHA = ("half", "inside", "one")
BARELY = (1e-2, -1e-3, 9e-4, 9e-5, -9e-5)
"""Nats between two policies that some take for one."""


def judged(subject: Subject, corner: Corner, *aspects: str) -> None:
    """Judge ``aspects`` within ``corner`` with the on-policy control."""
    subject.for_all(corner, lambda case: beside_the_clamp(subject, case, aspects, on_policy(case)))


def within_the_clamp(case: LossCase) -> LossCase:
    """The control of rules that know no clamp: no log-ratio is further than 3 from 0."""
    old = case.loss_input.old_student_logprobs
    near = (case.truth.chosen - old.double()).clamp(-2.5, 2.5)
    return case.with_fields(old_student_logprobs=(case.truth.chosen - near).to(old.dtype))


def above_the_cap(case: LossCase) -> LossCase:
    """The control of a ratio's gradient: every ratio is capped, so that it has none."""
    old = case.loss_input.old_student_logprobs
    return case.with_fields(
        old_student_logprobs=(case.truth.chosen - math.log(case.training.is_clip) - 1).to(old.dtype)
    )


def beside_the_clamp(
    subject: Subject,
    case: LossCase,
    aspects: Sequence[str],
    control: LossCase | Sequence[LossCase],
    per_token: bool = True,
) -> None:
    """Judge ``aspects``; what is wrong beyond the clamp alone is IS-4's finding."""
    try:
        subject.agrees(case, aspects, control=control, per_token=per_token)
    except Disagreement as found:
        beyond = (case.truth.chosen - case.loss_input.old_student_logprobs).abs() > RATIO_LOG_CLAMP
        found.secondary = found.secondary or (
            bool(beyond.any()) and not subject.wrong_on(within_the_clamp(case), aspects)
        )
        raise


def ratio_is_right(subject: Subject, case: LossCase) -> bool:
    """Whether a loss whose value is wrong scales as the ratio does, or applies none: then its divergence is to
    blame, and the missing ratio is IS-2's finding."""
    old = case.loss_input.old_student_logprobs
    apart = case.with_fields(old_student_logprobs=(case.truth.chosen + 0.5).to(old.dtype))
    here, there = (float(subject.evaluate(one, gradient=False).number("loss")) for one in (on_policy(case), apart))
    expected = float((apart.truth.ratio * apart.truth.weight).sum() / apart.truth.weight.sum())
    return min(abs(there - here * expected), abs(there - here)) <= 2e-2 * abs(here)


def without_ratio(subject: Subject, case: LossCase) -> bool:
    """Whether the loss is the same on-policy, where it should be another."""
    control = on_policy(case)
    wanted = [expectations(one, subject.entry).results["loss"] for one in (case, control)]
    here, there = (float(subject.evaluate(one, gradient=False).number("loss")) for one in (case, control))
    apart = abs(float(wanted[0].value - wanted[1].value)) > float(wanted[0].bound + wanted[1].bound)
    return apart and here == there


def with_unlikely_responses(case: LossCase) -> LossCase:
    """The case with every response outside the support 50 nats less likely, and an old policy to which it was
    less likely still: the clamp is on the difference, not on either log-prob."""
    fields = case.loss_input
    y = fields.response_ids.long().unsqueeze(-1)
    outside = (fields.teacher_indices.long() != y).all(-1, keepdim=True)
    logits = case.tensors()["student_logits"]
    lowered = logits.scatter_add(-1, y, torch.where(outside, -50.0, 0.0).to(logits.dtype))
    moved = case.with_fields(student_logits=lowered)
    old = (moved.truth.chosen - 30.0).to(fields.old_student_logprobs.dtype)
    return moved.with_fields(old_student_logprobs=old)


def barely_off_policy(case: LossCase) -> list[LossCase]:
    """The case with every token counted and log-ratios that all have one sign and at most a given size: close to
    on-policy is not on-policy."""
    case = case.with_fields(response_mask=torch.ones_like(case.loss_input.response_mask))
    chosen, dtype = case.truth.chosen, case.loss_input.old_student_logprobs.dtype
    steps = torch.linspace(0.5, 1.0, chosen.numel(), dtype=torch.float64).reshape(chosen.shape)
    return [case.with_fields(old_student_logprobs=(chosen + size * steps).to(dtype)) for size in BARELY]


def exactly_at_the_cap(dtype: torch.dtype) -> LossCase:
    """One token whose log-prob is 0 in any arithmetic, old = 0 and is_clip = 1: the ratio is the cap itself."""
    logits = torch.full((1, 1, 4), -200.0, dtype=dtype)
    logits[..., 2] = 0.0
    zero, y = torch.zeros(1, 1, dtype=dtype), torch.full((1, 1), 2)
    training = TrainingConfig(is_clip=1.0)
    tau = torch.zeros(1, 1, 1, dtype=dtype)
    ones = torch.ones(1, 1)
    return LossCase(SDPOLossInput(logits, tau, y.unsqueeze(-1), zero, ones, zero.float(), y, training))


def at_cap(subject: Subject) -> Callable[[LossCase], None]:
    """[r >= is_clip] counts a ratio that equals the cap."""

    def check(case: LossCase) -> None:
        outcome = subject.evaluate(case, gradient=False)
        got = float(outcome.number("clip_fraction"))
        if got != 1.0:
            detail = "the ratio equals is_clip"
            raise Disagreement(
                "clip_fraction", "1", number(got), case=case, outcome=outcome, probe="at_cap", detail=detail
            )

    return check


@requirement(
    "IS-1",
    Level.MUST,
    "on-policy (old = current log-probs) the ratio is 1",
    source=SOURCE,
    why="otherwise even steps_per_batch = 1 trains on the wrong scale",
    capabilities=LOSSES,
)
def test_is_1(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        try:
            subject.agrees(case, ("mean_is_ratio", *VALUE), per_token=True)
        except Disagreement as found:
            found.secondary = found.secondary or (
                not found.aspect.startswith("mean_is_ratio") and ratio_is_right(subject, case)
            )
            raise

    subject.for_all(NEUTRAL.but(alpha=ANY_ALPHA), check)


@requirement(
    "IS-2",
    Level.MUST,
    "the loss must depend on old_student_logprobs",
    source=SOURCE,
    why="a kernel fed hidden states only cannot correct for stale behaviour log-probs: training drifts",
    capabilities=LOSSES,
)
def test_is_2(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        control = on_policy(case)
        try:
            subject.agrees(case, (*VALUE, GRADIENT), control=control, per_token=True)
        except Disagreement as found:
            dropped = without_ratio(subject, case)
            found.secondary = found.secondary and not dropped
            if not dropped:
                found.detail = found.detail or "the loss does depend on old_student_logprobs, but not as the ratio says"
            raise

    subject.for_all(NEUTRAL.but(ratio=("mild", "below", "above_cap")), check)


@requirement(
    "IS-3",
    Level.MUST,
    "the ratio is exp(new - old): larger where the current policy likes the token more than the behaviour policy did",
    source=f"{SOURCE}: student_logprob_chosen - old_student_logprobs",
    why="inverted, the correction amplifies what it should damp",
    capabilities=LOSSES,
)
def test_is_3(subject: Subject) -> None:
    corner = NEUTRAL.but(ratio=("below", "mild", "certain"), is_clip=("default", "high"))
    judged(subject, corner, *VALUE, "mean_is_ratio")
    plain = special_case(subject.entry, subject.widest, subject.seed, anchor=0.0)
    cases = [negative_zeros(plain), *barely_off_policy(plain)]
    aspects = (*VALUE, "mean_is_ratio", GRADIENT)
    subject.each(cases, lambda case: beside_the_clamp(subject, case, aspects, on_policy(case)))


@requirement(
    "IS-4",
    Level.MUST,
    "the log-ratio is clamped to [-20, 20] before exp",
    source=f"{SOURCE}: torch.clamp(negative_approx_kl, min=-20, max=20)",
    why="without it a token of probability 0 under the old policy gives an infinite ratio",
    capabilities=LOSSES,
)
def test_is_4(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        subject.agrees(case, (*VALUE, "mean_is_ratio", GRADIENT), control=within_the_clamp(case), per_token=True)
        if not case.fused:
            unlikely = with_unlikely_responses(case)
            try:
                subject.agrees(unlikely, ("mean_is_ratio",), control=case)
            except NotReported:
                subject.agrees(unlikely, VALUE, control=case)

    corner = NEUTRAL.but(
        ratio=("clamp_high", "clamp_low", "mild"), is_clip=("huge", "default"), alpha=ANY_ALPHA, mass="normal"
    )
    subject.for_all(corner, check)


@requirement(
    "IS-5",
    Level.MUST,
    "the ratio is capped above at is_clip of the config, and not below",
    source=f"{SOURCE}: .clamp(max=is_clip)",
    why="PPO's symmetric clip, or a hard-coded cap, changes tokens the spec leaves alone",
    capabilities=LOSSES,
)
def test_is_5(subject: Subject) -> None:
    corner = NEUTRAL.but(
        ratio=("above_cap", "below", "mild", "clamp_low"),
        is_clip=("default", "low", "one", "high", "huge"),
        alpha=ANY_ALPHA,
    )
    judged(subject, corner, *VALUE, "mean_is_ratio")
    case = special_case(subject.entry, subject.widest, subject.seed, anchor=0.0)

    def check(case: LossCase) -> None:
        beside_the_clamp(subject, case, (*VALUE, "mean_is_ratio"), on_policy(case))
        try:
            beside_the_clamp(subject, case, (GRADIENT,), on_policy(case))
        except Disagreement as found:
            # the cap is right in the values: a gradient that is wrong without a cap as well has another cause
            found.secondary = subject.wrong_on(case.with_training(is_clip=1e9), (GRADIENT,))
            raise

    subject.each(with_values(case, "is_clip", CLIPS), check)
    subject.each_unless_refused(with_values(case, "is_clip", (2, math.inf)), check)


@requirement(
    "IS-6",
    Level.MUST,
    "the ratio multiplies each token's divergence before the mean",
    source=f"{SOURCE}: per_token_loss * ratio",
    why="a sequence-level or mean ratio gives every token another token's weight",
    capabilities=LOSSES,
)
def test_is_6(subject: Subject) -> None:
    corner = NEUTRAL.but(
        ratio=("mild", "below", "above_cap", "clamp_low"),
        is_clip=("default", "high"),
        mask=("full", "ragged", "random"),
        size=("small", "tall", "crowd"),
        alpha=ANY_ALPHA,
    )

    def check(case: LossCase) -> None:
        try:
            beside_the_clamp(subject, case, (*VALUE, GRADIENT), (), per_token=False)
        except Disagreement as found:
            # Either control can be upset by a ratio that belongs to another token, not both.
            idle = (on_policy(case), case.with_tokens_alike())
            found.secondary = (
                found.secondary
                or not subject.right_alone(case, (*VALUE, GRADIENT))
                or all(subject.wrong_on(one, (*VALUE, GRADIENT)) for one in idle)
            )
            raise

    subject.for_all(corner, check)


@requirement(
    "IS-7",
    Level.MUST,
    "no gradient flows through the ratio, neither to the student nor to old_student_logprobs",
    source=f"{SOURCE}: .detach()",
    why="an undetached ratio adds D * r * d l[y] to every uncapped token",
    capabilities=LOSSES,
)
def test_is_7(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        subject.agrees(case, (GRADIENT,), control=above_the_cap(case), per_token=True)
        loss_input = materialise(case, subject.device)
        old = loss_input.old_student_logprobs.detach().requires_grad_()
        result = call_entry(subject.function, subject.entry, replace(loss_input, old_student_logprobs=old))
        with implementation_errors("backward"):
            loss = differentiable_output(result, subject.entry)
            leaves = [getattr(loss_input, key) for key in case.differentiable]
            *arrived, found = torch.autograd.grad(
                loss, [*leaves, old], torch.full_like(loss, case.incoming), allow_unused=True
            )
        gradients = {
            key: None if one is None else one.detach().to("cpu", torch.float64)
            for key, one in zip(case.differentiable, arrived, strict=True)
        }
        expected, aspects = expectations(case, subject.entry), (*VALUE, GRADIENT)
        wrong = compare(case, Outcome(result, gradients), aspects, expected) if expected.attainable else None
        if wrong is not None and not subject.wrong_on(case, aspects):
            wrong.probe, wrong.detail = "old_gradient", wrong.detail or "where old_student_logprobs ask for a gradient"
            raise wrong
        if found is not None and bool(found.any()):
            raise Disagreement(
                "gradient to old_student_logprobs",
                "none",
                f"entries up to {number(float(found.abs().max()))}",
                case=case,
                probe="old_gradient",
            )

    corner = NEUTRAL.but(ratio=("mild", "below", "on_policy"), is_clip=("high", "default"), alpha=ANY_ALPHA)
    subject.for_all(corner, check)


@requirement(
    "IS-8",
    Level.MUST,
    "the ratio does not multiply the anchor",
    source=f"{UPSTREAM} compute_sdpo_loss, step 4: kl_to_base_per_token is not touched by ratio",
    why="where the old policy differs most, the anchor would vanish or explode",
    capabilities=LOSSES,
)
def test_is_8(subject: Subject) -> None:
    corner = NEUTRAL.but(
        ratio=("mild", "below", "above_cap"),
        anchor="on",
        drift=("mild", "strong"),
        alpha=("half", "one", "zero"),
    )

    def check(case: LossCase) -> None:
        bare = case.with_training(kl_reg_weight=0.0)
        with suppress(NotReported):
            subject.agrees(case, ("kl_reg",), control=on_policy(case))
        subject.agrees(case, ("loss", GRADIENT), control=(bare, on_policy(case)), per_token=True)

    subject.for_all(corner, check)


@requirement(
    "IS-9",
    Level.MUST,
    "the ratio applies at alpha = 1 too",
    source=f"{SOURCE}: after both branches of step 2",
    why="kernels treat alpha = 1 in a branch of its own, and that branch can lack the ratio",
    capabilities=LOSSES,
)
def test_is_9(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        controls = (on_policy(case), case.with_training(alpha=0.5))
        subject.agrees(case, (*VALUE, GRADIENT), control=controls, per_token=True)

    corner = NEUTRAL.but(alpha="one", ratio=("mild", "below", "above_cap"), is_clip=("default", "high"))
    subject.for_all(corner, check)


@requirement(
    "IS-10",
    Level.MUST,
    "mean_is_ratio is the masked mean of the capped ratio, clip_fraction that of [r >= is_clip]",
    source=f"{UPSTREAM} compute_sdpo_loss, diagnostics",
    why="these two numbers are how a run is watched",
    capabilities=LOSSES,
)
def test_is_10(subject: Subject) -> None:
    corner = NEUTRAL.but(
        ratio=("mild", "above_cap", "below", "clamp_high", "clamp_low", "on_policy"),
        is_clip=("default", "low", "one", "high", "huge"),
        mask=("full", "ragged", "random", "fractional", "tiny"),
        alpha=ANY_ALPHA,
    )

    def check(case: LossCase) -> None:
        try:
            beside_the_clamp(subject, case, METRICS, (), per_token=False)
        except Disagreement as found:
            found.secondary = found.secondary or subject.wrong_on(case, VALUE)
            raise

    subject.for_all(corner, check)
    for name in subject.dtypes:
        case = exactly_at_the_cap(DTYPES[name])
        subject.given(st.just(case.to_fused() if is_fused_entry(subject.entry) else case), at_cap(subject))
