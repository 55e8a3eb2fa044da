"""TK: the teacher's top-k from hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdpo_conformance.inputs.heads import (
    CHUNKED,
    EDGES,
    LENGTHS,
    LONG,
    REFUSABLE,
    HeadCase,
    edge_cases,
    head_cases,
    special_cases,
)
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.head_bounds import at, support_size, vocabulary_logprobs
from sdpo_conformance.specs.claas.rules.head_checks import (
    Tensors,
    compare,
    disagreement,
    judge_two_calls,
    judge_untouched,
    rank,
)
from sdpo_conformance.specs.requirement import UPSTREAM_TRAINER, Level, requirement

TOPK = (Capability.TEACHER_TOPK,)
Ranking = tuple[Tensor, Tensor]
"""Log-probs and indices."""

SOURCE = f"{UPSTREAM_TRAINER} DistillationTrainer._build_self_teacher_topk"


def values(ranking: Ranking) -> dict[str, Tensor]:
    """What came back, by name."""
    return dict(zip(("log-prob", "token"), ranking, strict=True))


def legal_indices(case: HeadCase, ranking: Ranking) -> Tensor:
    """int64 indices on the CPU; raises Disagreement where they repeat or leave the vocabulary."""
    indices = ranking[1]
    found, vocabulary = indices.detach().cpu().long(), case.head.shape[0]
    if found.numel() and (int(found.min()) < 0 or int(found.max()) >= vocabulary):
        seen = f"{int(found.min())} to {int(found.max())}"
        raise disagreement(case, "indices", f"token ids in [0, {vocabulary})", seen, values(ranking))
    ordered = found.sort(-1).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise disagreement(case, "indices", "distinct within a token", "a token id twice", values(ranking))
    return found


def right(case: HeadCase, ranking: Ranking) -> None:
    """Values against the truth."""
    expectation = at(vocabulary_logprobs(case), legal_indices(case, ranking))
    got = ranking[0].detach().cpu().double()
    difference = got - expectation.value
    constant = bool((difference - difference[..., :1]).abs().le(expectation.bound + 1e-6).all())
    several = constant and case.k > 1
    words = "off by one constant per token: normalised over something else" if several else ""
    compare(case, "log-prob", expectation, got, values(ranking), words)


def judge(subject: Subject, check: Callable[[HeadCase, Ranking], None]) -> None:
    """Small cases, every edge, and a second call on tensors that changed."""
    dtypes, lengths = subject.torch_dtypes, (1, *LENGTHS, *LONG[2:5])

    def call(case: HeadCase, tensors: Tensors) -> Ranking:
        return rank(subject, case, tensors)

    subject.given(head_cases(dtypes, lengths), lambda case: check(case, rank(subject, case)))
    subject.each(
        edge_cases((*EDGES, *CHUNKED), dtypes, subject.seed),
        lambda case: check(case, rank(subject, case)),
    )
    subject.each(special_cases(dtypes, subject.seed), lambda case: check(case, rank(subject, case)))
    refusable = edge_cases(REFUSABLE, [subject.widest], subject.seed)
    subject.each_unless_refused(refusable, lambda case: check(case, rank(subject, case)))
    changed = edge_cases(CHUNKED[:4], dtypes, subject.seed)
    subject.each(changed, lambda case: judge_two_calls(subject, case, call, check))


@requirement(
    "TK-1",
    Level.MUST,
    "each log-prob is that of its token, normalised over the whole vocabulary",
    source=f"{SOURCE}: log_softmax, then topk",
    why="at alpha = 1 the values enter as they are; below, their mass decides about the floor",
    capabilities=TOPK,
)
def test_tk_1(subject: Subject) -> None:
    judge(subject, right)


@requirement(
    "TK-2",
    Level.MUST,
    "the support is the k most likely tokens, k = min(max(1, k), V), distinct, ties in any order",
    source=f"{SOURCE}: k = min(max(1, top_k), vocab_size); torch.topk",
    why="a token missing from the support gets no gradient at all",
    capabilities=TOPK,
)
def test_tk_2(subject: Subject) -> None:
    def check(case: HeadCase, ranking: Ranking) -> None:
        found = legal_indices(case, ranking)
        whole = vocabulary_logprobs(case)
        chosen = at(whole, found)
        likeliest = at(whole, whole.value.topk(support_size(case), dim=-1).indices)
        # The j-th of what was chosen against the j-th of all: of tied tokens any may be missing, of likelier ones none.
        ordered, places = chosen.value.sort(dim=-1, descending=True)
        bound = chosen.bound.amax(-1, keepdim=True) + likeliest.bound.amax(-1, keepdim=True)
        short = likeliest.value - ordered - bound
        if bool((short > 0).any()):
            b, t, j = (int(i) for i in torch.unravel_index(short.argmax(), short.shape))
            raise disagreement(
                case,
                f"support[{b}, {t}], likeliest token {j + 1}",
                f"a log-prob of {float(likeliest.value[b, t, j]):.7g}",
                f"token {int(found[b, t, places[b, t, j]])} with {float(ordered[b, t, j]):.7g}",
                values(ranking),
            )

    judge(subject, check)


@requirement(
    "TK-3",
    Level.MUST,
    "the log-probs carry no graph, even where hidden states and head ask for a gradient, and the call leaves both "
    "as they were",
    source=f"{SOURCE}: torch.no_grad()",
    why="the teacher is frozen: a graph costs memory and, once used, trains it",
    capabilities=TOPK,
)
def test_tk_3(subject: Subject) -> None:
    def call(case: HeadCase, tensors: Tensors) -> Ranking:
        return rank(subject, case, tensors)

    def check(case: HeadCase) -> None:
        judge_untouched(subject, case, call, right, lambda ranking: ranking[0])

    subject.given(head_cases(subject.torch_dtypes, LENGTHS[:3]), check, 0.1)
    subject.each(edge_cases(CHUNKED[:5], subject.torch_dtypes, subject.seed), check)
    subject.each(special_cases(subject.torch_dtypes, subject.seed), check)
