"""Judging what reads a cut head without a loss: the refresh's log-probs and the teacher's top-k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from sdpo_conformance.inputs.choices import HypothesisSource, SeededSource, Source
from sdpo_conformance.inputs.heads import HeadCase, HeadShape, build_head_case
from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import Disagreement, number, worst
from sdpo_conformance.judging.expectation import Expectation
from sdpo_conformance.protocol import TrainingConfig
from sdpo_conformance.sharded.part import Part
from sdpo_conformance.sharded.rank import Answer, Request
from sdpo_conformance.specs.claas.head_bounds import at, response_logprobs, support_size, vocabulary_logprobs
from sdpo_conformance.specs.claas.sharded.cut import Cut, vocabulary_of
from sdpo_conformance.specs.claas.sharded.draw import PADDED, PLAIN, draw_cut
from sdpo_conformance.specs.claas.sharded.sharded_subject import ShardedSubject


@dataclass(frozen=True, eq=False)
class ShardedHeadCase(HeadCase):
    """A head case and how its vocabulary lies on the mesh; every rank gets all hidden states. They and the head ask
    for a gradient, which nothing here may follow."""

    cut: Cut | None = None

    def part(self, rank: int) -> Part:
        assert self.cut is not None
        place = self.cut.mesh.coordinate(rank, "tp")
        tensors = {
            "student_hidden": self.hidden,
            "lm_head_weight": vocabulary_of(self.cut, place, self.head, 0).contiguous(),
            "response_ids": self.response_ids,
        }
        start, extent = self.cut.starts[place], self.cut.extent
        asking = ("student_hidden", "lm_head_weight")
        return Part(tensors, asking, start, self.head.shape[0], extent, TrainingConfig(), 1.0)


def build(source: Source, subject: ShardedSubject) -> ShardedHeadCase:
    """Small vocabularies with k below, at and beyond a shard; every second with many equal logits."""
    v = source.pick((5, 8, 17, 33, 130, 257, 1000))
    k = source.pick((1, 2, 3, v // 2 + 1, v - 1, v, v + 5, 20))
    shape = HeadShape(source.integer(1, 2), source.pick((1, 3, 5)), v, source.pick((4, 16, 33)), k)
    case = build_head_case(source, shape, subject.torch_dtypes, (2.0, 0.5))
    if source.pick((False, True)):
        case = replace(case, hidden=case.hidden.sign(), head=case.head.round().clamp(-1, 1))
    cuts = source.pick((PLAIN, PADDED))
    cut = draw_cut(source, subject.mesh, cuts, v, 1, 1)
    cut = cut.as_dtensor(v) if subject.claims.dtensor else cut
    return ShardedHeadCase(case.hidden, case.head, case.response_ids, case.k, "contiguous", cut)


@st.composite
def cases(draw: DrawFn, subject: ShardedSubject) -> ShardedHeadCase:
    """``build`` as a Hypothesis strategy."""
    return build(HypothesisSource(draw), subject)


def judge(subject: ShardedSubject, check: Callable[[ShardedHeadCase, list[Answer]], None]) -> None:
    """Seeded and drawn cases; the smallest failure is raised."""

    def attempt(case: ShardedHeadCase) -> None:
        requests = [Request(subject.entry.value, case.part(rank), 0, case.k) for rank in range(subject.mesh.ranks)]
        answers = subject.ask(requests)
        for rank, answer in enumerate(answers):
            if answer.problems:
                raise ImplementationError(f"on rank {rank}: {answer.problems[0]}")
        check(case, answers)

    subject.each([build(SeededSource(f"{subject.seed}/{n}"), subject) for n in range(20)], attempt)
    subject.given(cases(subject), attempt, share=0.8)


def wrong(case: ShardedHeadCase, aspect: str, expected: str, got: str, detail: str = "") -> Disagreement:
    """A disagreement on a head case, in words."""
    assert case.cut is not None
    found = Disagreement(aspect, expected, got, detail=detail)
    found.extra["words"] = f"{case.words}, {case.cut.words()}"
    return found


def judge_logprobs(subject: ShardedSubject) -> None:
    """The response's log-probs on every rank."""

    def check(case: ShardedHeadCase, answers: list[Answer]) -> None:
        expectation = response_logprobs(case)
        for rank, answer in enumerate(answers):
            compare(case, f"log-prob on rank {rank}", expectation, tensor_of(answer, "divergence"))

    judge(subject, check)


def judge_topk(subject: ShardedSubject) -> None:
    """The k largest of the whole vocabulary on every rank, ties in any order but in the same on all."""

    def check(case: ShardedHeadCase, answers: list[Answer]) -> None:
        every, k, v = vocabulary_logprobs(case), support_size(case), case.head.shape[0]
        largest = every.value.topk(k, dim=-1).values
        first = tensor_of(answers[0], "indices")
        for rank, answer in enumerate(answers):
            logprobs, ids = tensor_of(answer, "logprobs"), tensor_of(answer, "indices").long()
            shape = (*case.hidden.shape[:2], k)
            if tuple(logprobs.shape) != shape or tuple(ids.shape) != shape:
                raise wrong(
                    case, f"top-k on rank {rank}", f"shape {shape}", f"{tuple(logprobs.shape)} and {tuple(ids.shape)}"
                )
            if int(ids.min()) < 0 or int(ids.max()) >= v:
                raise wrong(
                    case, f"ids on rank {rank}", f"global ids in [0, {v})", f"{int(ids.min())} to {int(ids.max())}"
                )
            ordered = ids.sort(-1).values
            if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
                raise wrong(case, f"ids on rank {rank}", "distinct within a token", "an id twice")
            compare(case, f"log-prob on rank {rank}", at(every, ids), logprobs)
            slack = at(every, ids).bound + every.bound.amax(-1, keepdim=True)
            got = every.value.gather(-1, ids).sort(-1, descending=True).values
            if bool((got < largest - slack.amax(-1, keepdim=True)).any()):
                missed = (largest - got).max()
                raise wrong(case, f"the set on rank {rank}", "the k largest of the whole vocabulary",
                            f"one {float(missed):.4g} below", "candidates of some shard are missing")  # fmt: skip
            if not torch.equal(ids, first.long()):
                raise wrong(case, "ids", "the same on every rank", f"others on rank {rank}", "ties resolved apart")

    judge(subject, check)


def tensor_of(answer: Answer, key: str) -> Tensor:
    """A result that has to be a tensor."""
    value: Any = answer.result.get(key)
    if not isinstance(value, Tensor):
        raise ImplementationError(f"{key} is a {type(value).__name__}, expected a tensor")
    return value


def compare(case: ShardedHeadCase, aspect: str, expectation: Expectation, got: Tensor) -> None:
    """Elementwise; raises Disagreement at the worst."""
    if got.shape != expectation.value.shape:
        raise wrong(case, aspect, f"shape {tuple(expectation.value.shape)}", f"{tuple(got.shape)}")
    excess, where = worst(expectation, got)
    if excess > 1:
        place = f"[{', '.join(map(str, where))}]"
        raise wrong(case, f"{aspect}{place}", number(float(expectation.value[where])), number(float(got[where])))
