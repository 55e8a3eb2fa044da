"""LP: the response's log-probs from hidden states, what the refresh computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from sdpo_conformance.inputs.heads import (
    CHUNKED,
    EDGES,
    LENGTHS,
    LONG,
    REFUSABLE,
    HeadCase,
    HeadShape,
    edge_cases,
    head_cases,
    special_cases,
)
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.head_bounds import response_logprobs
from sdpo_conformance.specs.claas.rules.head_checks import (
    Tensors,
    compare,
    judge_two_calls,
    judge_untouched,
    score,
)
from sdpo_conformance.specs.requirement import UPSTREAM_TRAINER, Level, requirement

LOGPROBS = (Capability.RESPONSE_LOGPROBS,)
SOURCE = f"{UPSTREAM_TRAINER} DistillationTrainer._compute_student_response_logprobs"


def right(case: HeadCase, got: Tensor) -> None:
    """Values against the truth."""
    compare(case, "log-prob", response_logprobs(case), got, {"log-prob": got}, shifted(case, got))


def judge(subject: Subject, lengths: tuple[int, ...], share: float = 1.0) -> None:
    """Values for responses of these lengths."""
    subject.given(head_cases(subject.torch_dtypes, lengths), lambda case: right(case, score(subject, case)), share)


def judge_each(subject: Subject, shapes: Sequence[HeadShape]) -> None:
    """Values at each of these shapes."""
    edges = edge_cases(shapes, subject.torch_dtypes, subject.seed)
    subject.each(edges, lambda case: right(case, score(subject, case)))


def shifted(case: HeadCase, got: Tensor) -> str:
    """Whether the values are those of a neighbouring token."""
    for step, words in ((-1, "the token after its own"), (1, "the token before its own")):
        neighbour = replace(case, response_ids=case.response_ids.roll(step, 1))
        excess = response_logprobs(neighbour).excess(got.detach().cpu().double())
        if case.response_ids.shape[1] > 1 and bool((excess <= 1).all()):
            return f"each position scores {words}: the caller has already shifted by one"
    return ""


@requirement(
    "LP-1",
    Level.MUST,
    "the log-prob of a token is log_softmax(hidden @ head.T) at that token: whole vocabulary, nats, of what the "
    "tensors hold when the call is made",
    source=SOURCE,
    why="the ratio exponentiates every error of it; a log-prob remembered from an earlier call is no refresh",
    capabilities=LOGPROBS,
)
def test_lp_1(subject: Subject) -> None:
    judge(subject, (1,))
    judge_each(subject, EDGES)
    special = special_cases(subject.torch_dtypes, subject.seed)
    subject.each(special, lambda case: right(case, score(subject, case)))
    refusable = edge_cases(REFUSABLE[1:], [subject.widest], subject.seed)
    subject.each_unless_refused(refusable, lambda case: right(case, score(subject, case)))

    def call(case: HeadCase, tensors: Tensors) -> Tensor:
        return score(subject, case, tensors)

    edges = edge_cases(CHUNKED[:4], subject.torch_dtypes, subject.seed)
    subject.each(edges, lambda case: judge_two_calls(subject, case, call, right))


@requirement(
    "LP-2",
    Level.MUST,
    "hidden[:, t] scores response_ids[:, t]: the one-token shift is the caller's and is not made again",
    source=f"{SOURCE}: logits[:, response_start - 1 : -1]",
    why="shifted once too often, every ratio is that of two different tokens",
    capabilities=LOGPROBS,
)
def test_lp_2(subject: Subject) -> None:
    judge(subject, LENGTHS)


@requirement(
    "LP-3",
    Level.MUST,
    "the log-probs carry no graph, even where hidden states and head ask for a gradient, and the call leaves both "
    "as they were",
    source=f"{SOURCE}: torch.no_grad()",
    why="a graph keeps the whole forward alive until the next step",
    capabilities=LOGPROBS,
)
def test_lp_3(subject: Subject) -> None:
    def call(case: HeadCase, tensors: Tensors) -> Tensor:
        return score(subject, case, tensors)

    def check(case: HeadCase) -> None:
        judge_untouched(subject, case, call, right, lambda found: found)

    subject.given(head_cases(subject.torch_dtypes, LENGTHS[:3]), check, 0.1)
    subject.each(edge_cases(CHUNKED[:5], subject.torch_dtypes, subject.seed), check)
    subject.each(special_cases(subject.torch_dtypes, subject.seed), check)


@requirement(
    "LP-4",
    Level.MUST,
    "the values do not depend on how the tokens are chunked: every length is right to its last token",
    source=f"{SOURCE}: computed in one piece",
    why="a dropped last chunk leaves log-probs of 0, and ratios at the cap",
    capabilities=LOGPROBS,
)
def test_lp_4(subject: Subject) -> None:
    judge(subject, LONG, 0.5)
    judge_each(subject, CHUNKED)
