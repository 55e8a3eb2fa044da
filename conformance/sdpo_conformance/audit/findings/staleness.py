"""Metrics that stand still while the weights move: the incident's own sign."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sdpo_conformance.audit.findings.model import Check, Evidence, Finding, NotJudged, Severity, Verdicts
from sdpo_conformance.audit.findings.resolution import resolution, same, surprise, usual_moves
from sdpo_conformance.audit.metrics import CONTINUOUS_FIELDS, RunMetrics, Step

#: Decades of evidence that make coincidence a bad explanation; one more for every tenfold number of
#: comparisons.
_ENOUGH = 3.0
_ENOUGH_FOR_NEAR = 6.0
_NEAR_EACH = 2.5

Values = Mapping[str, float]
Column = Sequence[Values]


@dataclass(frozen=True)
class _Standstill:
    """Two steps (indices into the run's steps) between which fields did not move."""

    earlier: int
    later: int
    fields: tuple[str, ...]
    moved: tuple[str, ...]
    exact: bool
    near: bool
    sample: str | None = None


def stale_metrics(evidence: Evidence) -> Verdicts:
    """Bit-identical or near-identical metrics of two steps although the weights changed between them."""
    metrics, moved = evidence.metrics, evidence.weights_moved
    if metrics is None:
        yield NotJudged("stale-metrics", "no metrics")
        return
    if len(metrics.steps) < 2:
        yield NotJudged("stale-metrics", "one step only: there is no second one to compare with")
        return
    if moved is False:
        return  # weights-unchanged or lora-b-zero says why the metrics cannot move
    found = list(_standstills(metrics))
    if not found:
        return
    yield _finding(evidence, metrics, found)


def _standstills(metrics: RunMetrics) -> Iterator[_Standstill]:
    steps = metrics.steps
    means = [step.values for step in steps]
    found = list(_in_series(means, None))
    yield from found
    seen = {(s.earlier, s.later) for s in found}
    yield from (s for s in _repeats(means) if (s.earlier, s.later) not in seen)
    for sample in sorted({name for step in steps for name in step.samples}):
        series = [step.samples.get(sample, {}) for step in steps]
        yield from (s for s in _in_series(series, sample) if (s.earlier, s.later) not in seen)


def _in_series(column: Column, sample: str | None) -> Iterator[_Standstill]:
    enough = math.log10(max(1, len(column) - 1))
    scales = _scales(column)
    for index, (a, b) in enumerate(pairwise(column)):
        if not _stepped(a, b):
            continue
        shares = _shared(a, b)
        if not shares:
            continue
        still = tuple(f for f in shares if same(a[f], b[f]))
        decades = {f: surprise(abs(a[f] - b[f]), scales[f].usual[index], scales[f].finest) for f in shares}
        telling = [f for f in _independent(shares) if f in still]
        moving = tuple(f for f in shares if f not in still)
        if len(telling) == len(_independent(shares)):
            convinced = sum(decades[f] for f in telling) >= _ENOUGH + enough
        else:
            telling = [f for f in telling if decades[f] >= _ENOUGH + 1 + enough]
            convinced = bool(telling)
            still = tuple(f for f in still if decades[f] >= _ENOUGH + 1 + enough)
        if convinced:
            exact = all(a[f] == b[f] for f in still)
            yield _Standstill(index, index + 1, still, moving, exact, near=False, sample=sample)
            continue
        independent = _independent(shares)
        each = [decades[f] for f in independent]
        if len(each) >= 2 and min(each) >= _NEAR_EACH and sum(each) >= _ENOUGH_FOR_NEAR + enough:
            yield _Standstill(index, index + 1, tuple(shares), (), exact=False, near=True, sample=sample)


def _repeats(column: Column) -> Iterator[_Standstill]:
    """Steps apart from one another whose every metric is equal to the last bit."""
    scales = _scales(column)
    enough = math.log10(max(1, len(column) * (len(column) - 1) // 2))
    last: dict[tuple[tuple[str, float], ...], int] = {}
    for index, values in enumerate(column):
        shares = _shared(values, values)
        key = tuple((f, values[f]) for f in _independent(shares))
        if not key:
            continue
        decades = sum(surprise(0.0, min(scales[f].usual), scales[f].finest) for f, _ in key)
        earlier = last.get(key)
        if earlier is not None and index - earlier > 1 and decades >= _ENOUGH + enough:
            yield _Standstill(earlier, index, tuple(shares), (), exact=True, near=False)
        last[key] = index


@dataclass(frozen=True)
class _Scale:
    """How far a field usually moves, for each pair of neighbouring steps, and what its column can show."""

    usual: Sequence[float]
    finest: float


def _scales(column: Column) -> dict[str, _Scale]:
    scales = {}
    for name in CONTINUOUS_FIELDS:
        values = [row.get(name, math.nan) for row in column]
        if any(math.isfinite(value) for value in values):
            finest = resolution(values)
            scales[name] = _Scale(usual_moves(values, finest), finest)
    return scales


def _shared(a: Values, b: Values) -> list[str]:
    """Continuous fields that both steps report, finite, and not zero in both: a zero has nothing to move."""
    names = [name for name in CONTINUOUS_FIELDS if name in a and name in b]
    return [n for n in names if math.isfinite(a[n]) and math.isfinite(b[n]) and (a[n] or b[n])]


def _independent(names: Sequence[str]) -> list[str]:
    """The same fields without total_loss where its parts are there: it is no evidence of its own."""
    return [n for n in names if n != "total_loss" or "distill_loss" not in names]


def _stepped(a: Values, b: Values) -> bool:
    """Whether the earlier step can have moved the weights: not at learning rate 0, nor without a finite
    gradient.
    """
    gradient = a.get("grad_norm")
    if gradient is not None and (gradient == 0 or not math.isfinite(gradient)):
        return False
    rates = [row["learning_rate"] for row in (a, b) if "learning_rate" in row]
    return not any(rate == 0 for rate in rates)


def _finding(evidence: Evidence, metrics: RunMetrics, found: list[_Standstill]) -> Finding:
    moved = evidence.weights_moved
    names = _step_names(metrics)
    exact = any(s.exact for s in found)
    near = all(s.near for s in found)
    severity = Severity.WARNING if moved is None or near else Severity.ERROR
    how = "bit-identical" if exact else "nearly identical" if near else "identical up to float32 rounding"
    first = found[0]
    between = f"{names[first.earlier]} and {names[first.later]}"
    fields = _listing(first.fields)
    who = f" of sample {first.sample}" if first.sample is not None else ""
    weights = "the weights moved" if moved else "nothing shows that the weights stood still"
    told = [_describe(s, metrics.steps, names) for s in found[:5]]
    if len(found) > 5:
        told.append(f"and {len(found) - 5} more pairs of steps")
    change = evidence.change
    if moved and change is not None:
        told.append(
            f"{change.moved} of {len(change.compared)} tensors changed over the run, max |delta|"
            f" {change.max_abs_delta:.3g}"
        )
    partly = bool(first.moved)
    return Finding(
        id="stale-metrics",
        severity=severity,
        statement=(f"{fields}{who} {'are' if len(first.fields) > 1 else 'is'} {how} between {between} while {weights}"),
        evidence=tuple(told),
        cause=(
            "one part of the loss is computed from state cached before the earlier step"
            if partly
            else (
                "the loss, or the collection of its metrics, reads state cached before the earlier step:"
                " student hidden states or logits, or behaviour log-probs that are never refreshed. The"
                " optimizer steps, the loss does not see it"
            )
        ),
        next_step=(
            "recompute the student's forward inside the step loop and the behaviour log-probs after every"
            " step but the last. Until then train with"
            " steps_per_batch = 1"
        ),
        data={
            "pairs": [
                {
                    "steps": [names[s.earlier], names[s.later]],
                    "fields": list(s.fields),
                    "exact": s.exact,
                    "near": s.near,
                    "sample": s.sample,
                }
                for s in found[:100]
            ]
        },
    )


def _describe(s: _Standstill, steps: Sequence[Step], names: Sequence[str]) -> str:
    def at(index: int) -> Values:
        return steps[index].values if s.sample is None else steps[index].samples[s.sample]

    a, b = at(s.earlier), at(s.later)
    show: Callable[[str], str] = lambda f: (  # noqa: E731
        f"{f} {a[f]!r}" if a[f] == b[f] else f"{f} {a[f]!r} then {b[f]!r}"
    )
    who = f", sample {s.sample}" if s.sample is not None else ""
    told = f"{names[s.earlier]} and {names[s.later]}{who}: " + ", ".join(show(f) for f in s.fields)
    return told + (f"; but {_listing(s.moved)} moved" if s.moved else "")


def _step_names(metrics: RunMetrics) -> list[str]:
    return [metrics.label(b, step) for b, batch in enumerate(metrics.batches) for step in batch.steps]


def _listing(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}"


CHECKS = (
    Check(
        "stale-metrics",
        "step metrics identical, or nearly, between steps while the weights moved",
        stale_metrics,
    ),
)
