"""RKL: the reverse-KL surrogate at alpha = 1."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sdpo_conformance.judging.compare import GRADIENT
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.specs.claas.corners import NEUTRAL
from sdpo_conformance.specs.claas.inputs.on_policy import on_policy
from sdpo_conformance.specs.claas.inputs.special import special_case, with_values
from sdpo_conformance.specs.claas.loss_case import LossCase
from sdpo_conformance.specs.claas.rules.aspects import LOSSES, VALUE
from sdpo_conformance.specs.requirement import UPSTREAM, Level, requirement

SOURCE = f"{UPSTREAM} compute_sdpo_loss, step 2 (alpha >= 1)"
LOOKUP = f"{UPSTREAM} _lookup_token_in_topk"
ONE = NEUTRAL.but(alpha="one")


@requirement(
    "RKL-1",
    Level.MUST,
    "at alpha = 1 the loss is sg(l[y] - tau_y) * l[y], another objective than the limit of the divergence",
    source=SOURCE,
    why="the limit of the divergence is 0; lasgroup's alpha = 1 is the full reverse KL",
    capabilities=LOSSES,
)
def test_rkl_1(subject: Subject) -> None:
    subject.for_all(ONE, lambda case: _agree(subject, case, *VALUE))
    subject.each_unless_refused(whole_numbered(subject), lambda case: _agree(subject, case, *VALUE))


@requirement(
    "RKL-2",
    Level.MUST,
    "tau_y is -20 where y is outside the support, and the teacher's log-prob, however low or 0, where it is inside",
    source=LOOKUP,
    why="a floor by value, or a match recognised by a non-zero value, changes tokens inside the support",
    capabilities=LOSSES,
)
def test_rkl_2(subject: Subject) -> None:
    def check(case: LossCase) -> None:
        _agree(subject, case, *VALUE)
        tau, y = case.loss_input.teacher_logprobs, case.loss_input.response_ids
        match = case.loss_input.teacher_indices.long() == y.long().unsqueeze(-1)
        certain = case.with_fields(teacher_logprobs=torch.where(match, torch.zeros_like(tau), tau))
        _agree(subject, certain, *VALUE)

    corner = ONE.but(mass=("deep", "normal"), response=("inside", "outside"), support=("few", "one", "many", "whole"))
    subject.for_all(corner, check, share=0.5)


@requirement(
    "RKL-3",
    Level.MUST,
    "at alpha = 1 the gradient runs through l[y] alone: (l[y] - tau_y) (onehot(y) - softmax)",
    source=f"{SOURCE}: log_ratio.detach()",
    why="an undetached log-ratio doubles and shifts the gradient while the value stays right",
    capabilities=LOSSES,
)
def test_rkl_3(subject: Subject) -> None:
    subject.for_all(ONE.but(mass=("normal", "deep")), lambda case: _agree(subject, case, GRADIENT))
    subject.each_unless_refused(whole_numbered(subject), lambda case: _agree(subject, case, GRADIENT))


def whole_numbered(subject: Subject) -> Iterator[LossCase]:
    """An ordinary case, on-policy and without anchor, with alpha the int 1."""
    case = on_policy(special_case(subject.entry, subject.widest, subject.seed, anchor=0.0))
    return with_values(case, "alpha", (1,))


def _agree(subject: Subject, case: LossCase, *aspects: str) -> None:
    subject.agrees(case, aspects, control=case.with_training(alpha=0.5), per_token=True)
