"""Comparing what the ranks returned with the truth about the whole batch, which no rank has seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sdpo_conformance.judging.call import ImplementationError, Outcome
from sdpo_conformance.judging.compare import GRADIENT, Disagreement, gradient_disagreement, scalar_disagreement
from sdpo_conformance.judging.expectation import Expectation, Expectations
from sdpo_conformance.protocol import Capability, FusedSDPOLossInput
from sdpo_conformance.sharded.part import HIDDEN, LOGITS
from sdpo_conformance.sharded.rank import Answer
from sdpo_conformance.specs.claas.bounds import expectations, is_half
from sdpo_conformance.specs.claas.sharded.cut import ShardedCase, leak, whole


def expected_of(case: ShardedCase, entry: Capability) -> Expectations:
    """Truth and bounds of the whole batch. They do not grow with the number of ranks: only where the gradient to the
    hidden states is stored in half precision, each rank's share of it may be rounded before it is summed."""
    found = expectations(case, entry)
    loss_input = case.loss_input
    if not isinstance(loss_input, FusedSDPOLossInput) or case.laid.mesh.size("tp") == 1:
        return found
    eps = torch.finfo(loss_input.student_hidden.dtype).eps
    if not is_half(eps):
        return found
    shares = (case.truth.grad_logits.abs() @ loss_input.lm_head_weight.double().abs()) * abs(case.incoming)
    value = found.gradients[HIDDEN]
    widened = {**found.gradients, HIDDEN: Expectation(value.value, value.bound + eps * shares)}
    return Expectations(found.results, widened, found.attainable)


def compare_ranks(
    case: ShardedCase,
    entry: Capability,
    answers: Sequence[Answer],
    aspects: Sequence[str],
    expected: Expectations,
    added: bool = False,
) -> Disagreement | None:
    """The first disagreement among ``aspects`` on any rank, or None. ``added``: the ranks' gradients are parts of one
    sum, not of a mean (an entry that returns tokens, not their mean)."""
    for aspect in aspects:
        found = (
            gradients_wrong(case, answers, expected, added)
            if aspect == GRADIENT
            else results_wrong(case, aspect, answers, expected)
        )
        for disagreement in found:
            disagreement.case = case
            return disagreement
    return None


def results_wrong(
    case: ShardedCase, key: str, answers: Sequence[Answer], expected: Expectations
) -> Iterator[Disagreement]:
    """One result on every rank: the truth about the whole batch, not about the rank's part of it."""
    if key not in expected.results:
        return
    wrong = []
    for rank, answer in enumerate(answers):
        if key not in answer.result:
            continue
        found = scalar_disagreement(key, expected.results[key], Outcome(answer.result, {}))
        if found is not None:
            wrong.append((rank, found))
    if not wrong:
        return
    rank, found = wrong[0]
    right = [other for other in range(len(answers)) if other not in [r for r, _ in wrong]]
    found.aspect = f"{key} on {'every rank' if not right else f'rank {rank}'}"
    if right:
        found.detail = f"right on rank {', '.join(map(str, right))}"
    elif len({str(answer.result.get(key)) for answer in answers}) > 1:
        found.detail = "on the others: " + ", ".join(number_of(answer, key) for answer in answers[1:])
    yield found


def number_of(answer: Answer, key: str) -> str:
    """A result for people."""
    value = answer.result.get(key)
    return f"{float(value):.7g}" if isinstance(value, Tensor) and value.numel() == 1 else str(value)


def gradients_wrong(
    case: ShardedCase, answers: Sequence[Answer], expected: Expectations, added: bool
) -> Iterator[Disagreement]:
    """The gradient to the whole of every field, after the mean over dp x cp."""
    mesh = case.laid.mesh
    for key, expectation in expected.gradients.items():
        own = [answer.gradients[0][key] for answer in answers]
        for rank, gradient in enumerate(own):
            if gradient is not None and key != HIDDEN and (found := leak(case, key, rank, gradient)) is not None:
                where = "columns" if key == LOGITS else "rows"
                yield Disagreement(
                    f"gradient to {key} at padding {where} of rank {rank}", "0", f"up to {found.largest:.7g}"
                )
        replicas = range(mesh.size("tp")) if key == HIDDEN else (0,)
        for replica in replicas:
            full = whole(case, key, own, replica) * (mesh.batch_ranks if added else 1)
            found_wrong = gradient_disagreement(key, expectation, Outcome({}, {key: full}))
            if found_wrong is None:
                continue
            if key == HIDDEN and len(replicas) > 1:
                found_wrong.aspect += f" on tp rank {replica}"
            if mesh.batch_ranks > 1 and not added:
                found_wrong.aspect += " after the mean over dp x cp"
            yield found_wrong


def complaints(answers: Sequence[Answer], about: str = "") -> None:
    """Raise ImplementationError for what is wrong with keys and types on any rank (those that say ``about``)."""
    for rank, answer in enumerate(answers):
        for problem in answer.problems:
            if about in problem:
                raise ImplementationError(f"on rank {rank}: {problem}")
