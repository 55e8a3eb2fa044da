"""NUM: every dtype, and the places where plain arithmetic breaks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sdpo_conformance.judging.compare import compare
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.bounds import expectations
from sdpo_conformance.specs.claas.corners import EVERYTHING, NEUTRAL
from sdpo_conformance.specs.claas.inputs.long_sums import long_sums
from sdpo_conformance.specs.claas.inputs.masked import nan_or_inf_where_masked
from sdpo_conformance.specs.claas.inputs.on_policy import on_policy
from sdpo_conformance.specs.claas.inputs.special import otherwise_typed, special_shapes
from sdpo_conformance.specs.claas.loss_case import LossCase
from sdpo_conformance.specs.claas.rules.aspects import ALL, DIVERGENCES, LOSSES
from sdpo_conformance.specs.requirement import UPSTREAM, Level, requirement

SOURCE = "design: numbers; docs/spec.md, tolerances"
DIVERGENCE_ONLY = NEUTRAL.but(
    alpha=("half", "inside", "near_zero", "near_one", "zero"),
    mass=("normal", "normal", "shifted", "teacher_floor", "student_floor", "deep"),
    layout=EVERYTHING.layout,
    incoming=EVERYTHING.incoming,
)


def everything(subject: Subject) -> None:
    """Every corner at once, every result and gradient."""
    corner = DIVERGENCE_ONLY if subject.entry is Capability.DIVERGENCE else EVERYTHING
    subject.for_all(corner, lambda case: subject.agrees(case, ALL), share=2.0)


def in_dtypes(subject: Subject, wanted: tuple[str, ...], run: Callable[[Subject], None]) -> None:
    """Run within the part of ``wanted`` that is judged; skip where there is none."""
    kept = tuple(name for name in subject.dtypes if name in wanted)
    if not kept:
        pytest.skip(f"{' and '.join(wanted)} not claimed, not asked for, or refused")
    narrowed = subject.narrowed(kept)
    run(narrowed)


@requirement(
    "NUM-1",
    Level.MUST,
    "float32 (and float64 where claimed) is true to a few roundings, everywhere in the spec at once",
    source=SOURCE,
    why="precision lost inside does not show in a loss curve",
    capabilities=DIVERGENCES,
)
def test_num_1(subject: Subject) -> None:
    def run(narrowed: Subject) -> None:
        everything(narrowed)
        for dtype in narrowed.torch_dtypes:
            shapes = special_shapes(narrowed.entry, dtype, narrowed.seed)
            narrowed.each(shapes, lambda case: narrowed.agrees(case, ALL))
            others = otherwise_typed(narrowed.entry, dtype, narrowed.seed)
            narrowed.each_unless_refused(others, lambda case: narrowed.agrees(case, ALL))

    in_dtypes(subject, ("float32", "float64"), run)


@requirement(
    "NUM-2",
    Level.MUST,
    "bfloat16 and float16, in the dtype mixes that CLaaS produces, are at most twice as far off as plain "
    "PyTorch in that dtype",
    source=SOURCE,
    why="training runs in bfloat16: a branch that only half precision takes must be right too",
    capabilities=DIVERGENCES,
)
def test_num_2(subject: Subject) -> None:
    def run(narrowed: Subject) -> None:
        everything(narrowed)
        for dtype in narrowed.torch_dtypes:
            narrowed.each(long_sums(subject.entry, dtype), lambda case: narrowed.agrees(case, ALL))

    in_dtypes(subject, ("bfloat16", "float16"), run)


FLOOR_NATS, SUNK_NATS = 25.0, 300.0
"""A support this many nats down is below the floor, which is GJS-8's matter: the control; and has no probability left
in float32."""


def with_support_sunk(case: LossCase, nats: float) -> LossCase:
    """The case with a token off the support ``nats`` above all others; where the support is the whole vocabulary, as
    it is."""
    logits, support = case.tensors()["student_logits"], case.loss_input.teacher_indices.long()
    free = torch.ones_like(logits, dtype=torch.bool).scatter(-1, support, False)
    if not bool(free.any(-1).all()):
        return case
    hot = free.to(torch.uint8).argmax(-1, keepdim=True)
    raised = (logits.double().amax(-1, keepdim=True) + nats).to(logits.dtype)
    return case.with_fields(student_logits=logits.scatter(-1, hot, raised))


@requirement(
    "NUM-3",
    Level.SHOULD,
    "a support probability that underflows to 0, of student or teacher, gives the finite limit",
    source="0 log 0 = 0; upstream returns NaN there",
    why="one impossible token turns the whole adapter into NaN",
    capabilities=DIVERGENCES,
)
def test_num_3(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        tau = case.loss_input.teacher_logprobs.clone()
        deep = -40.0 if tau.dtype == torch.float16 else -200.0
        tau[..., -1] = deep
        limit_is_met(subject, case.with_fields(teacher_logprobs=tau), case)
        whole = case.loss_input.teacher_logprobs
        below, sunk = (case.with_fields(teacher_logprobs=whole - nats) for nats in (FLOOR_NATS, SUNK_NATS))
        limit_is_met(subject, sunk, below)
        if not case.fused:
            below, sunk = (on_policy(with_support_sunk(case, nats)) for nats in (FLOOR_NATS, SUNK_NATS))
            limit_is_met(subject, sunk, below)
            logits = case.tensors()["student_logits"].clone()
            first = case.loss_input.teacher_indices[..., :1].long()
            away = case.loss_input.response_ids.unsqueeze(-1) != first
            low = logits.gather(-1, first) + deep
            logits.scatter_(-1, first, torch.where(away, low, logits.gather(-1, first)))
            limit_is_met(subject, on_policy(case.with_fields(student_logits=logits)), case)

    corner = NEUTRAL.but(support=("few", "many"), mass="normal")
    subject.for_all(corner, check, share=0.3)


@requirement(
    "NUM-4",
    Level.SHOULD,
    "-inf logits, in and off the support, give the finite limit",
    source="0 log 0 = 0; upstream returns NaN inside the support",
    why="vocabularies are padded and constrained with -inf",
    capabilities=(Capability.LOSS,),
)
def test_num_4(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        logits = case.tensors()["student_logits"]
        support = case.loss_input.teacher_indices.long()
        y = case.loss_input.response_ids.long().unsqueeze(-1)
        reserved = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, support, True).scatter(-1, y, True)
        off = logits.masked_fill(~reserved & (torch.arange(logits.shape[-1]) % 2 == 0), -torch.inf)
        limit_is_met(subject, on_policy(case.with_fields(student_logits=off)), case)
        alone = logits.masked_fill(~reserved, -torch.inf)
        limit_is_met(subject, on_policy(case.with_fields(student_logits=alone)), case)
        inside = support[..., :1]
        holed = logits.scatter(-1, inside, -torch.inf)
        logits = torch.where((inside == y).expand_as(logits), logits, holed)
        limit_is_met(subject, on_policy(case.with_fields(student_logits=logits)), case)

    corner = NEUTRAL.but(support=("few", "many"), mass="normal")
    subject.for_all(corner, check, share=0.3)


@requirement(
    "NUM-5",
    Level.SHOULD,
    "NaN and inf at masked positions do not reach results or gradients",
    source="mask = 0 counts for nothing; upstream multiplies by the mask, and NaN * 0 is NaN",
    why="padding may hold anything",
    capabilities=LOSSES,
)
def test_num_5(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        for filled in nan_or_inf_where_masked(case):
            limit_is_met(subject, filled, case)

    corner = NEUTRAL.but(
        mask=("random", "ragged"),
        ratio=("mild",),
        anchor=("off", "on"),
        alpha=("half", "inside", "one"),
        mass="normal",
    )
    subject.for_all(corner, check, share=0.3)


def with_drift_of(case: LossCase, changed: LossCase) -> LossCase:
    """``changed`` with a base policy as far away as that of ``case``: a missing anchor is not NUM-6's finding."""
    base = case.loss_input.base_logprobs
    moved = base.double() + changed.truth.chosen - case.truth.chosen
    return changed.with_fields(base_logprobs=moved.to(base.dtype))


def with_small_logits(case: LossCase) -> LossCase:
    """The control: on-policy, 1e4 is below 1."""
    key = "student_hidden" if case.fused else "student_logits"
    return on_policy(with_drift_of(case, case.with_fields(**{key: case.tensors()[key] / 2**14})))


@requirement(
    "NUM-6",
    Level.MUST,
    "large logits (1e4 common to a token, and far negative ones off the support) neither overflow nor lose the result",
    source=f"{UPSTREAM}: log_softmax subtracts the maximum of the vocabulary",
    why="a logsumexp without its maximum overflows from logits of 89 on",
    capabilities=DIVERGENCES,
)
def test_num_6(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        small = with_small_logits(case)
        subject.agrees(case, ALL, control=small)
        if not case.fused:
            logits = case.tensors()["student_logits"]
            keep = torch.zeros_like(logits, dtype=torch.bool)
            keep = keep.scatter(-1, case.loss_input.teacher_indices.long(), True)
            keep = keep.scatter(-1, case.loss_input.response_ids.long().unsqueeze(-1), True)
            lowest = -6e4 if logits.dtype == torch.float16 else -1e9
            if case.training.alpha == 1:
                away = ~keep & (torch.arange(logits.shape[-1]) % 2 == logits.shape[-1] % 2)
                raised = case.with_fields(student_logits=logits + 120 * away)
                subject.agrees(on_policy(with_drift_of(case, raised)), ALL, control=small)
            lowered = case.with_fields(student_logits=torch.where(keep, logits, lowest))
            subject.agrees(on_policy(with_drift_of(case, lowered)), ALL, control=small)

    corner = NEUTRAL.but(
        logits="large",
        ratio=("on_policy",),
        alpha=("half", "inside") if subject.entry is Capability.DIVERGENCE else ("half", "inside", "one"),
        anchor=("off", "on"),
        mass="normal",
    )
    subject.for_all(corner, check, share=0.5)


@requirement(
    "NUM-7",
    Level.MUST,
    "an infinite old log-prob saturates the ratio: -inf as +20, +inf as -20 in the exponent",
    source=f"{UPSTREAM} compute_sdpo_loss, step 3: clamp after the difference",
    why="samplers report -inf for tokens outside their top-p",
    capabilities=LOSSES,
)
def test_num_7(subject: Subject) -> None:
    corner = NEUTRAL.but(
        ratio=("infinite", "mild"),
        is_clip=("default", "huge", "low"),
        alpha=("half", "inside", "one"),
        mass="normal",
    )

    def check(case: LossCase) -> None:
        old = case.loss_input.old_student_logprobs
        finite = case.with_fields(old_student_logprobs=torch.where(old.isinf(), old.sign() * -2 - 3, old))
        subject.agrees(case, ALL, control=finite)

    subject.for_all(corner, check, share=0.5)


@requirement(
    "NUM-8",
    Level.SHOULD,
    "an empty response (T = 0) gives 0 and an empty gradient",
    source=f"{UPSTREAM}: sums over nothing, denominator 1",
    why="a sample whose response was cut away should not crash the batch",
    capabilities=DIVERGENCES,
)
def test_num_8(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        fields = {key: tensor[:, :0].contiguous() for key, tensor in case.tensors().items() if key != "lm_head_weight"}
        limit_is_met(subject, case.with_fields(**fields), case)

    subject.for_all(NEUTRAL.but(size="small"), check, share=0.1)


def limit_is_met(subject: Subject, case: LossCase, control: LossCase) -> None:
    """Judge where plain PyTorch is not finite: the bound is the analytic one alone."""
    outcome = subject.evaluate(case)
    found = compare(case, outcome, ALL, expectations(case, subject.entry))
    if found is not None:
        found.secondary = subject.wrong_on(control, ALL)
        raise found
