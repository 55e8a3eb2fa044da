"""LP: the response's log-probs from hidden states, what the refresh computes."""

from __future__ import annotations

from sdpo_conformance.protocol import DTYPES, Capability
from sdpo_conformance.requirements import UPSTREAM_TRAINER, Level, requirement
from sdpo_conformance.strategies.heads import LENGTHS, LONG, HeadCase, head_cases
from sdpo_conformance.subject import Subject
from sdpo_conformance.suite.heads import compare, disagreement, score
from sdpo_conformance.trainer.heads import response_logprobs

LOGPROBS = (Capability.RESPONSE_LOGPROBS,)
SOURCE = f"{UPSTREAM_TRAINER} DistillationTrainer._compute_student_response_logprobs"


def judge(subject: Subject, lengths: tuple[int, ...], share: float = 1.0) -> None:
    """Values against the truth for responses of these lengths."""

    def check(case: HeadCase) -> None:
        expectation, got = response_logprobs(case), score(subject, case)
        compare(case, "log-prob", expectation, got, shifted(case, got))

    subject.given(head_cases([DTYPES[name] for name in subject.dtypes], lengths), check, share)


def shifted(case: HeadCase, got: object) -> str:
    """Whether the values are those of a neighbouring token."""
    for step, words in ((-1, "the token after its own"), (1, "the token before its own")):
        neighbour = HeadCase(case.hidden, case.head, case.response_ids.roll(step, 1), case.k)
        excess = response_logprobs(neighbour).excess(got.detach().cpu().double())  # type: ignore[attr-defined]
        if case.response_ids.shape[1] > 1 and bool((excess <= 1).all()):
            return f"each position scores {words}: the caller has already shifted by one"
    return ""


@requirement(
    "LP-1",
    Level.MUST,
    "the log-prob of a token is log_softmax(hidden @ head.T) at that token: whole vocabulary, nats",
    source=SOURCE,
    why="the ratio exponentiates every error of it",
    capabilities=LOGPROBS,
)
def test_lp_1(subject: Subject) -> None:
    judge(subject, (1,))


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
    "the log-probs carry no graph, even where hidden states and head ask for a gradient",
    source=f"{SOURCE}: torch.no_grad()",
    why="a graph keeps the whole forward alive until the next step",
    capabilities=LOGPROBS,
)
def test_lp_3(subject: Subject) -> None:
    def check(case: HeadCase) -> None:
        if score(subject, case, requires_grad=True).requires_grad:
            raise disagreement(case, "log-probs", "requires_grad False", "a tensor with a graph")

    subject.given(head_cases([DTYPES[name] for name in subject.dtypes], LENGTHS[:3]), check, 0.1)


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
