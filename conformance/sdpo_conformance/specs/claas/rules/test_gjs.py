"""GJS: the generalised Jensen-Shannon divergence over the teacher's top-k, alpha < 1."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from sdpo_conformance.judging.compare import GRADIENT, Disagreement, number
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.corners import NEUTRAL
from sdpo_conformance.specs.claas.inputs.on_policy import on_policy
from sdpo_conformance.specs.claas.inputs.special import ALPHAS, special_case, with_values
from sdpo_conformance.specs.claas.loss_case import LossCase
from sdpo_conformance.specs.claas.oracle.loss import upcast
from sdpo_conformance.specs.claas.rules.aspects import DIVERGENCES, VALUE
from sdpo_conformance.specs.requirement import UPSTREAM, Level, requirement

SOURCE = f"{UPSTREAM} compute_sdpo_loss, step 2 (alpha < 1)"


def above_the_floor(case: LossCase) -> LossCase:
    """The control: a normalised teacher and a student flat enough to leave every support some mass."""
    tau = upcast(case.loss_input.teacher_logprobs)
    tame = (tau - tau.logsumexp(-1, keepdim=True)).to(case.loss_input.teacher_logprobs.dtype)
    key = "student_hidden" if case.fused else "student_logits"
    return on_policy(case.with_fields(teacher_logprobs=tame, **{key: case.tensors()[key] / 16}))


@requirement(
    "GJS-1",
    Level.MUST,
    "the divergence has the value alpha KL(p || m) + (1 - alpha) KL(q || m) of the renormalised top-k",
    source=SOURCE,
    why="every other rule multiplies or averages this number",
    capabilities=DIVERGENCES,
)
def test_gjs_1(subject: Subject) -> None:
    subject.for_all(NEUTRAL.but(head="frozen"), lambda case: _agree(subject, case))


@requirement(
    "GJS-2",
    Level.MUST,
    "teacher and student are both renormalised over the teacher's support: no tail bucket, not the full "
    "vocabulary, not the student's top-k",
    source=f"{SOURCE}: both divided by their sum over the top-k",
    why="with a tail bucket or on one side only, mass outside the support leaks into the loss",
    capabilities=DIVERGENCES,
)
def test_gjs_2(subject: Subject) -> None:
    corner = NEUTRAL.but(support=("few", "one"), mass=("shifted", "normal"), logits=("flat", "normal"), head="frozen")
    subject.for_all(corner, lambda case: _agree(subject, case))
    if subject.widest is not torch.float16:  # e^-60 is 0 there, which NUM-3 is about
        case = neutral_case(subject)
        subject.each(faint_entries(case), lambda faint: _agree(subject, faint, case))


def faint_entries(case: LossCase) -> Iterator[LossCase]:
    """An entry that the teacher all but rules out and the student does not: its mass is in the student's sum."""
    for depth in (-25.0, -60.0):
        tau = case.loss_input.teacher_logprobs.clone()
        tau[..., 0] = depth
        yield case.with_fields(teacher_logprobs=tau)


@requirement(
    "GJS-3",
    Level.MUST,
    "alpha weighs the teacher, in the mixture and in front of its KL, for every alpha in (0, 1)",
    source=SOURCE,
    why="swapped weights agree at alpha = 0.5 only, and a clipped alpha wherever it was not clipped",
    capabilities=DIVERGENCES,
)
def test_gjs_3(subject: Subject) -> None:
    corner = NEUTRAL.but(
        alpha=("inside", "near_zero", "near_one"), logits=("normal", "peaked"), head="frozen", mass="normal"
    )

    def check(case: LossCase) -> None:
        _agree(subject, case, case.with_training(alpha=0.5))

    subject.for_all(corner, check)
    subject.each(with_values(neutral_case(subject), "alpha", ALPHAS), check)


@requirement(
    "GJS-4",
    Level.MUST,
    "a constant added to a token's teacher log-probs or student logits changes nothing",
    source=f"{SOURCE}: renormalisation; log_softmax",
    why="log-probs of a truncated or tempered teacher arrive unnormalised",
    capabilities=DIVERGENCES,
)
def test_gjs_4(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        tau = case.loss_input.teacher_logprobs
        steps = torch.arange(tau.shape[0] * tau.shape[1]).reshape(*tau.shape[:2], 1)
        shifted = case.with_fields(teacher_logprobs=tau + ((steps * 3 % 7) / 2 - 1.5).to(tau.dtype))
        _agree(subject, shifted, case)
        if subject.entry is Capability.LOSS:
            logits = case.tensors()["student_logits"]
            moved = case.with_fields(student_logits=logits + ((steps * 5 % 11) - 4).to(logits.dtype))
            _agree(subject, moved, case)

    subject.for_all(NEUTRAL.but(mass="normal", head="frozen", logits=("normal", "flat")), check, share=0.5)


@requirement(
    "GJS-5",
    Level.MUST,
    "the order of the K support tokens changes nothing",
    source=f"{SOURCE}: a sum over the support",
    why="a teacher's top-k need not arrive sorted",
    capabilities=DIVERGENCES,
)
def test_gjs_5(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        support = case.loss_input.teacher_indices
        order = torch.arange(support.shape[-1]).roll(1).flip(0)
        permuted = case.with_fields(
            teacher_indices=support[..., order].contiguous(),
            teacher_logprobs=case.loss_input.teacher_logprobs[..., order].contiguous(),
        )
        try:
            subject.agrees(permuted, (*VALUE, GRADIENT))
        except Disagreement as found:
            found.secondary = not subject.tells_apart(case, permuted, (*VALUE, GRADIENT))
            raise

    subject.for_all(NEUTRAL.but(support=("few", "many", "whole"), head="frozen"), check, share=0.5)


@requirement(
    "GJS-6",
    Level.MUST,
    "the divergence lies in [0, binary entropy of alpha]; while the support's mass is above the floor (GJS-8), it is "
    "0 for equal distributions and for K = 1",
    source=f"{SOURCE}; Lin 1991, Divergence measures based on the Shannon entropy, theorem 4",
    why="a negative or unbounded divergence means that something is not a distribution",
    capabilities=DIVERGENCES,
)
def test_gjs_6(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        expected = subject.expectations(case)
        if expected is None:
            return
        outcome = subject.evaluate(case, gradient=False)
        key = next((name for name in ("divergence", "distill_loss") if name in outcome.result), "loss")
        got, slack = outcome.number(key), expected.results[key].bound
        alpha = case.training.alpha
        ceiling = -alpha * math.log(alpha) - (1 - alpha) * math.log1p(-alpha)
        if key != "divergence":
            ceiling *= float(case.truth.weight.sum()) * (1 + 1e-3 + 4 * float(case.truth.ratio.sub(1).abs().max()))
        outside = ~((got >= -slack) & (got <= ceiling + slack))
        if bool(outside.any()):
            shown = float(got[outside].reshape(-1)[0]) if got.dim() else float(got)
            found = Disagreement(key, f"a value in [0, {number(ceiling)}]", number(shown), case=case, outcome=outcome)
            found.secondary = subject.right_alone(case, VALUE)
            raise found
        subject.agrees(case, VALUE, per_token=True)

    corner = NEUTRAL.but(
        logits=("equal", "normal", "peaked"), support=("few", "one"), head="frozen", size=("small", "wide")
    )
    subject.for_all(corner, check)


@requirement(
    "GJS-7",
    Level.MUST,
    "alpha = 0 gives 0 and no gradient: the mixture is the student",
    source=f"{SOURCE}: lerp weight 0, mixture = student",
    why="in other dialects alpha = 0 means the full forward KL",
    capabilities=DIVERGENCES,
)
def test_gjs_7(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        subject.agrees(case, (*VALUE, GRADIENT), control=case.with_training(alpha=0.5), per_token=True)

    subject.for_all(NEUTRAL.but(alpha="zero", ratio=("on_policy", "mild", "above_cap")), check, share=0.5)
    subject.each_unless_refused(with_values(neutral_case(subject), "alpha", (0,)), check)


@requirement(
    "GJS-8",
    Level.MUST,
    "the support's mass is divided out down to 1e-8 and no further, for teacher and student, in value and gradient",
    source=f"{SOURCE}: sum(-1).clamp(min=1e-8)",
    why="on the floor q is no softmax over the support: the gradient reaches the whole vocabulary",
    capabilities=DIVERGENCES,
)
def test_gjs_8(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        subject.agrees(case, (*VALUE, GRADIENT), control=above_the_floor(case), per_token=True)

    corner = NEUTRAL.but(
        mass=("student_floor", "teacher_floor", "normal"),
        support=("few", "one", "many"),
        alpha=("half", "inside"),
    )
    subject.for_all(corner, check)


@requirement(
    "GJS-9",
    Level.MUST,
    "the gradient is the derivative: zero off the support while kl_reg_weight = 0, and summing to 0 over the "
    "vocabulary",
    source=f"{SOURCE}, differentiated: docs/spec.md",
    why="a right value with a wrong gradient is the commonest defect of a fused loss",
    capabilities=DIVERGENCES,
)
def test_gjs_9(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        subject.agrees(case, (GRADIENT,), per_token=True)

    subject.for_all(NEUTRAL.but(alpha=("half", "inside", "near_zero", "near_one")), check)
    subject.each(with_values(neutral_case(subject), "alpha", ALPHAS), check)


def neutral_case(subject: Subject) -> LossCase:
    """An ordinary case, on-policy and without anchor."""
    return on_policy(special_case(subject.entry, subject.widest, subject.seed, anchor=0.0))


def _agree(subject: Subject, case: LossCase, *control: LossCase) -> None:
    subject.agrees(replace(case, trainable_head=False), VALUE, control, per_token=True)
