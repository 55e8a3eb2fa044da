"""Rules about the trainer's step that need no trainer: the loss called on parts of a batch.

A batch is cut into its rows, one call each, all with the options of the whole batch and the counts that these carry.
The step is the sum of the calls' losses, each times its share: what the trainer multiplies it with before ``backward``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdpo_conformance.judging.call import Outcome
from sdpo_conformance.judging.compare import Disagreement, compare
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.judging.expectation import Expectation, Expectations
from sdpo_conformance.specs.requirement import Level
from sdpo_conformance.specs.shared.rule import ALL, LOSS, Rule

Call = Callable[[Any], Outcome]
Shares = Callable[[Sequence[Outcome]], list[float] | None]

WIDER = 2.0
"""Bounds of a sum of calls, in bounds of one call: each call rounds once more, by its own normaliser."""


def by_counts(calls: Sequence[Outcome]) -> list[float]:
    """1 each: the losses are shares already, by the counts of the whole batch."""
    return [1.0] * len(calls)


def by_rows(calls: Sequence[Outcome]) -> list[float]:
    """1 / n each: a mean over micro-batches of one size."""
    return [1 / len(calls)] * len(calls)


def by_num_valid(calls: Sequence[Outcome]) -> list[float] | None:
    """The call's part of the positions that count; None where it is not reported."""
    if any("num_valid" not in one.result for one in calls):
        return None
    counts = [float(one.number("num_valid")) for one in calls]
    return [count / max(sum(counts), 1.0) for count in counts]


SHARES: Mapping[str, tuple[Shares, ...]] = {
    "cut_by_counts": (by_counts,),
    "cut_by_rows": (by_rows,),
    "cut_by_num_valid": (by_num_valid,),
    "cut_by_counts_or_rows": (by_counts, by_rows),
}
"""Probe -> the shares of which one has to give the whole batch's step."""


def one_row_each(case: Any) -> list[Any]:
    """The batch as micro-batches of one row."""
    return [case.rows(torch.tensor([row])) for row in range(case.loss_input.student_logits.shape[0])]


def summed(calls: Sequence[Outcome], shares: Sequence[float]) -> Outcome:
    """The step: loss, and the gradient to the student's logits, (B, ...)."""
    loss = torch.stack([share * one.number(LOSS).reshape(()) for share, one in zip(shares, calls, strict=True)]).sum()
    gradients: list[Tensor] = []
    for share, one in zip(shares, calls, strict=True):
        gradient = one.gradients["student_logits"]
        if gradient is None:
            return Outcome({LOSS: loss}, {"student_logits": None})
        gradients.append(share * gradient)
    return Outcome({LOSS: loss}, {"student_logits": torch.cat(gradients)})


def steps(call: Call, case: Any, probe: str) -> list[Outcome]:
    """The step by each of the probe's shares; none where an implementation does not report what a share needs."""
    calls = [call(row) for row in one_row_each(case)]
    shares = [found for one in SHARES[probe] if (found := one(calls)) is not None]
    return [summed(calls, one) for one in shares]


def widened(expected: Expectations) -> Expectations:
    """The same with WIDER bounds."""

    def wide(group: Mapping[str, Expectation]) -> dict[str, Expectation]:
        return {key: Expectation(one.value, WIDER * one.bound) for key, one in group.items()}

    return Expectations(wide(expected.results), wide(expected.gradients), expected.attainable)


def whole_again(case: Any) -> Any:
    """The whole batch with an options object of its own: nothing that was kept for the step's is met again."""
    return case.with_training()


def cut_makes_no_difference(probe: str) -> Callable[[Subject, Any], None]:
    """The step of the batch in parts is the step of the batch."""

    def check(subject: Subject, case: Any) -> None:
        expected = subject.expectations(case)
        if expected is None:
            return
        found: list[Disagreement] = []
        for step in steps(subject.evaluate, case, probe):
            disagreement = compare(case, step, ALL, widened(expected))
            if disagreement is None:
                return
            found.append(disagreement)
        if found:
            nearest = min(found, key=lambda one: one.excess)
            count = len(case.loss_input.student_logits)
            nearest.probe, nearest.detail = probe, f"the step of {count} calls, a row each"
            nearest.secondary = subject.wrong_on(whole_again(case), ALL)
            raise nearest

    return check


def calls_stand_alone(subject: Subject, case: Any) -> None:
    """Each call of a step is right, whatever was called before it with the same options."""
    for row in one_row_each(case):
        if subject.expectations(row) is None:
            continue
        found = compare(row, subject.evaluate(row), ALL, row.expectations)
        if found is not None:
            found.secondary = subject.wrong_on(whole_again(row), ALL)
            found.detail = found.detail or "after other rows of the batch were called"
            raise found


def cut_rule(id: str, level: Level, statement: str, source: str, why: str, corner: Any, probe: str) -> Rule:
    """The step's gradient does not depend on the cut; in the wide dtypes alone, where a sum of calls rounds as one."""
    return Rule(
        id,
        level,
        statement,
        source,
        why,
        corner,
        dtypes=("float32", "float64"),
        check=cut_makes_no_difference(probe),
    )


def logged_is_trained(key: str) -> Callable[[Subject, Any], None]:
    """The number under ``key``, where one is reported, is the loss."""

    def check(subject: Subject, case: Any) -> None:
        expected = subject.expectations(case)
        outcome = subject.evaluate(case, gradient=False)
        if key not in outcome.result or expected is None:
            return
        loss, logged = float(outcome.number(LOSS)), float(outcome.number(key))
        given = outcome.result[key]
        eps = torch.finfo(given.dtype).eps if isinstance(given, Tensor) and given.is_floating_point() else 0.0
        if not abs(loss - logged) <= 2 * float(expected.results[LOSS].bound) + eps * abs(loss):
            raise Disagreement(
                key, f"{loss:.7g}, the loss", f"{logged:.7g}", case=case, outcome=outcome, probe="logged"
            )

    return check
