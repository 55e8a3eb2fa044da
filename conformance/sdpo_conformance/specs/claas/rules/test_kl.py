"""KL: the k3 anchor to the base policy.

A loss that does not report ``kl_reg`` owes that to RED-6; here it is judged by the anchor in its ``loss``, and one
without any anchor by KL-1: what the other rules find there is marked secondary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sdpo_conformance.judging.call import NotReported, Outcome
from sdpo_conformance.judging.compare import GRADIENT, Disagreement, number
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.specs.claas.corners import NEUTRAL
from sdpo_conformance.specs.claas.inputs.on_policy import on_policy
from sdpo_conformance.specs.claas.inputs.special import (
    WEIGHTS,
    base_outside_its_support,
    negative_zeros,
    special_case,
    with_values,
)
from sdpo_conformance.specs.claas.loss_case import LossCase
from sdpo_conformance.specs.claas.rules.aspects import LOSSES
from sdpo_conformance.specs.requirement import UPSTREAM, Level, requirement

SOURCE = f"{UPSTREAM} compute_sdpo_loss, step 4"
ANCHORED = NEUTRAL.but(anchor="on", drift=("mild", "strong"))


def at_base(case: LossCase) -> LossCase:
    """The control: the policy is the base policy, so the anchor is 0."""
    base = case.loss_input.base_logprobs
    return case.with_fields(base_logprobs=case.truth.chosen.to(base.dtype))


def within_the_clamp(case: LossCase) -> LossCase:
    """The control: at most 1.5 nats from the base, where a clamp of k3 itself would be idle too."""
    chosen, base = case.truth.chosen, case.loss_input.base_logprobs
    return case.with_fields(base_logprobs=(chosen - (chosen - base.double()).clamp(-1.5, 1.5)).to(base.dtype))


def without_anchor(subject: Subject, case: LossCase) -> bool:
    """Whether the weight changes nothing: then there is no anchor, and KL-1 says so."""
    bare = case.with_training(kl_reg_weight=0.0)
    here, there = (float(subject.evaluate(one, gradient=False).number("loss")) for one in (case, bare))
    return case.training.kl_reg_weight != 0 and here == there


def never_negative(subject: Subject, case: LossCase) -> None:
    """What the weight adds to the loss is at least 0, and 0 at the base."""
    for one, most in ((case, math.inf), (at_base(case), 0.0)):
        expected = subject.expectations(one)
        if expected is None:
            continue
        weighted = subject.evaluate(one, gradient=False)
        bare = subject.evaluate(one.with_training(kl_reg_weight=0.0), gradient=False)
        got, least = float(weighted.number("loss")), float(bare.number("loss"))
        slack = 2 * float(expected.results["loss"].bound)
        if not -slack <= got - least <= most + slack:
            wanted = f"{'at least ' if most else ''}{number(least)}"
            raise Disagreement("loss", wanted, number(got), case=one, outcome=weighted, detail="loss without anchor")


@requirement(
    "KL-1",
    Level.MUST,
    "k3 = exp(d) - 1 - d with d = l[y] - base, in this direction",
    source=SOURCE,
    why="veRL's k3 takes base - l[y]; k1 and k2 are other estimators",
    capabilities=LOSSES,
)
def test_kl_1(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        try:
            _agree(subject, case, ("kl_reg",), at_base(case))
        except NotReported:
            _agree(subject, case, ("loss",), at_base(case), case.with_training(kl_reg_weight=0.0))

    subject.for_all(ANCHORED.but(anchor=("on", "off"), drift=(*ANCHORED.drift, "certain")), check)
    subject.each([on_policy(negative_zeros(special_case(subject.entry, subject.widest, subject.seed)))], check)


@requirement(
    "KL-2",
    Level.MUST,
    "the anchor is never negative and is 0 where the policy equals the base",
    source=f"{SOURCE}: 'always >= 0'",
    why="a negative anchor rewards drifting from the base",
    capabilities=LOSSES,
)
def test_kl_2(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        try:
            outcome = _agree(subject, case, ("kl_reg",))
        except NotReported:
            return never_negative(subject, case)
        if outcome is None:
            return
        got = float(outcome.number("kl_reg"))
        expected = subject.expectations(case)
        assert expected is not None
        if not got >= -float(expected.results["kl_reg"].bound):
            raise Disagreement("kl_reg", "at least 0", number(got), case=case, outcome=outcome)

    subject.for_all(NEUTRAL.but(anchor=("on", "off"), drift=("equal", "mild"), mask=("full", "ragged")), check)


@requirement(
    "KL-3",
    Level.MUST,
    "the anchor's log-ratio is clamped to [-20, 20] before exp; k3 itself is not clamped",
    source=f"{SOURCE}: torch.clamp(log_ratio, min=-20, max=20)",
    why="veRL clamps k3 to [-10, 10] instead: other numbers from d = 2.6 on",
    capabilities=LOSSES,
)
def test_kl_3(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        _agree(subject, case, ("kl_reg", "loss"), at_base(case), within_the_clamp(case))

    subject.for_all(NEUTRAL.but(anchor=("on", "off"), drift=("clamp_high", "clamp_low", "strong")), check)
    if subject.widest != torch.float16:
        case = on_policy(special_case(subject.entry, subject.widest, subject.seed))
        subject.each_unless_refused([base_outside_its_support(case)], check)


@requirement(
    "KL-4",
    Level.MUST,
    "the anchor's gradient is (exp(d) - 1) (onehot(y) - softmax), and none outside the clamp",
    source=f"{SOURCE}, differentiated",
    why="a detached anchor reports drift and does nothing against it",
    capabilities=LOSSES,
)
def test_kl_4(subject: Subject) -> None:
    corner = ANCHORED.but(drift=("mild", "strong", "clamp_high", "clamp_low"), alpha=("zero", "half", "inside", "one"))

    def check(case: LossCase) -> None:
        try:
            _agree(subject, case, (GRADIENT,), case.with_training(kl_reg_weight=0.0))
        except Disagreement as found:
            found.secondary = found.secondary or subject.wrong_on(case, ("loss",))
            raise

    subject.for_all(corner, check)
    case = on_policy(special_case(subject.entry, subject.widest, subject.seed))
    subject.each((*with_values(case, "kl_reg_weight", WEIGHTS), on_policy(negative_zeros(case))), check)
    subject.each_unless_refused(with_values(case, "kl_reg_weight", (2,)), check)
    if subject.widest != torch.float16:
        subject.each_unless_refused([base_outside_its_support(case)], check)


@requirement(
    "KL-5",
    Level.MUST,
    "loss = distill_loss + kl_reg_weight * kl_reg, with the weight of the config, and kl_reg reported unweighted",
    source=f"{UPSTREAM} compute_sdpo_loss: total_loss",
    why="a hard-coded or doubly applied weight is invisible in the other metrics",
    capabilities=LOSSES,
)
def test_kl_5(subject: Subject) -> None:
    corner = ANCHORED.but(anchor=("on", "off"), alpha=("half", "zero", "one"))

    def check(case: LossCase) -> None:
        subject.agrees(case, ("kl_reg",), control=case.with_training(kl_reg_weight=1.0))
        subject.agrees(case, ("distill_loss", "loss"), control=case.with_training(kl_reg_weight=0.0))
        if case.training.kl_reg_weight == 0:
            subject.agrees(case, (GRADIENT,))

    subject.for_all(corner, check)
    case = on_policy(special_case(subject.entry, subject.widest, subject.seed))
    subject.each(with_values(case, "kl_reg_weight", WEIGHTS), check)
    subject.each_unless_refused(with_values(case, "kl_reg_weight", (2,)), check)


@requirement(
    "KL-6",
    Level.MUST,
    "the anchor is the base policy's log-prob, not the behaviour policy's or the teacher's",
    source=f"{SOURCE}: base_logprobs",
    why="anchored to the old policy it follows the drift that it should hold back",
    capabilities=LOSSES,
)
def test_kl_6(subject: Subject) -> None:
    corner = ANCHORED.but(ratio=("mild", "below", "above_cap"), response=("inside", "outside"))

    def check(case: LossCase) -> None:
        bare = case.with_training(kl_reg_weight=0.0)
        try:
            subject.agrees(case, ("kl_reg", "loss", GRADIENT), bare, control_aspects=("loss", GRADIENT), per_token=True)
        except Disagreement as found:
            found.secondary = found.secondary or without_anchor(subject, case) or weight_is_to_blame(subject, found)
            raise

    subject.for_all(corner, check)


def weight_is_to_blame(subject: Subject, found: Disagreement) -> bool:
    """Whether ``kl_reg`` is wrong, and right with a weight of 1: KL-5's finding."""
    case = found.case
    if not isinstance(case, LossCase) or not found.aspect.startswith("kl_reg") or case.training.kl_reg_weight == 1:
        return False
    return not subject.wrong_on(case.with_training(kl_reg_weight=1.0), ("kl_reg",))


def _agree(subject: Subject, case: LossCase, aspects: Sequence[str], *control: LossCase) -> Outcome | None:
    try:
        return subject.agrees(case, aspects, control, per_token=True)
    except Disagreement as found:
        found.secondary = found.secondary or weight_is_to_blame(subject, found)
        raise
