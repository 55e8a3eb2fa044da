"""What wrong metrics of rightly taken steps equal instead: the catalogue's reports, held against every number.

A report is named for a metric only where each of its values, at every step of every run, is the report's to rounding;
and for the more metrics, the better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sdpo_conformance.specs.claas.defects import catalogue
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.defects.parameter import simplest
from sdpo_conformance.specs.claas.step_loop.explanations import PROMISING, StepExplanation, outcomes, step_loops
from sdpo_conformance.specs.claas.step_loop.forced_replay import Forced, parts_of, replaced
from sdpo_conformance.specs.claas.step_loop.gradients import JudgedRun, StepJudgement
from sdpo_conformance.trainer.observation import METRICS

KEYS = ("step", *METRICS)

NEARER = 0.1
NEARER_IN_HALF = 0.5
"""Of the truth's distance: a wrong metric has to come nearer than this to a mistake's."""

FEWEST = 2
"""Wrong values of one metric, in full precision, from which on it is named: any one number is near some mistake's."""

COARSE = {"clip_fraction"}
"""A share of few tokens, mostly 0: alone it tells mistakes apart only where they are about nothing else."""

Entries = Sequence[Sequence[Mapping[str, float]]]
"""By run and step, what is reported."""


@dataclass(frozen=True)
class MetricMistake:
    """A way to report whose values ``keys`` have, of which ``wrong`` are wrong; ``alike``: names of what cannot be told
    from it."""

    defect: Defect
    keys: tuple[str, ...]
    wrong: int
    alike: tuple[str, ...]

    @property
    def words(self) -> str:
        """What is said of it."""
        return f"{self.defect.shown}: {self.defect.sentence}"


@dataclass(frozen=True)
class MetricMistakes:
    """``named``: the mistakes found; ``rest``: metrics that are wrong otherwise; ``anchor``: where kl_reg is one of
    them, the loop with a wrong anchor that all its values are: with kl_reg_weight = 0 no gradient shows it;
    ``recorded``: where half precision alone shows anything, and in metrics, the loop that rounds what the sampler
    recorded and reports all of them."""

    named: tuple[MetricMistake, ...] = ()
    rest: tuple[str, ...] = ()
    anchor: StepExplanation | None = None
    recorded: StepExplanation | None = None

    def loop_of(self, key: str) -> StepExplanation | None:
        """The loop whose values a metric has."""
        return self.recorded or (self.anchor if key == "kl_reg" and self.of(key) is None else None)

    def of(self, key: str) -> MetricMistake | None:
        """The mistake that a metric is."""
        return next((one for one in self.named if key in one.keys), None)

    def as_kept(self) -> Mapping[str, Any]:
        """In the form that a failure keeps."""
        named = [
            {
                "name": one.defect.name,
                "value": one.defect.value,
                "keys": list(one.keys),
                "wrong": one.wrong,
                "alike": list(one.alike),
            }
            for one in self.named
        ]
        return {"named": named, "rest": list(self.rest)}


@cache
def ways_to_report() -> tuple[Defect, ...]:
    """Catalogued step loops in which the report alone is wrong."""
    found = ((defect, parts_of(defect)) for defect in catalogue().values())
    return tuple(defect for defect, parts in found if parts is not None and replaced(parts) == {"report"})


def values_of(runs: Sequence[JudgedRun]) -> Iterator[tuple[int, int, StepJudgement, Mapping[str, float]]]:
    """By run and step, its judgement and its entry."""
    for index, run in enumerate(runs):
        for step, (judgement, entry) in enumerate(zip(run.steps, run.observation.metrics, strict=True)):
            yield index, step, judgement, entry


def wrong_values(runs: Sequence[JudgedRun]) -> dict[str, int]:
    """By metric, how many of its values are wrong."""
    found: dict[str, int] = {}
    for _, _, judgement, entry in values_of(runs):
        for key in KEYS:
            if key in entry and not abs(entry[key] - truth_of(judgement, key)) <= bound_of(judgement, key):
                found[key] = found.get(key, 0) + 1
    return found


@dataclass(frozen=True)
class Held:
    """The runs' metrics, to hold mistakes against."""

    runs: Sequence[JudgedRun]

    def reported(self, defect: Defect) -> Entries:
        """What a mistake makes of the runs."""
        return [run.right.reported(defect) for run in self.runs]

    def misfit(self, entries: Entries, key: str) -> float:
        """How far a metric is from a mistake's, at most over all steps."""
        return max(
            (
                misfit(self.runs[index], judgement, entry, key, entries[index][step][key])
                for index, step, judgement, entry in values_of(self.runs)
                if key in entry
            ),
            default=0.0,
        )


def misfit(run: JudgedRun, judgement: StepJudgement, entry: Mapping[str, float], key: str, mistaken: float) -> float:
    """How far a step's metric is from a mistake's, in units of what is allowed; above 1 is another. What is wrong has
    to be much nearer to the mistake than to the truth."""
    truth = truth_of(judgement, key)
    off, allowed = abs(entry[key] - truth), bound_of(judgement, key)
    scale = max(1.0, abs(mistaken) / max(abs(truth), 1e-12))
    nearer = NEARER_IN_HALF if in_half(run) else NEARER
    near = min(allowed * scale, nearer * off) if off > allowed else allowed
    distance = abs(entry[key] - mistaken)
    return distance / near if distance == distance else math.inf


def in_half(run: JudgedRun) -> bool:
    """Whether a run's model is in half precision."""
    return run.observation.scenario.model.dtype == "bfloat16"


def truth_of(judgement: StepJudgement, key: str) -> float:
    """What a metric has to be."""
    return float(judgement.moment.truth.metrics[key])


def bound_of(judgement: StepJudgement, key: str) -> float:
    """How far off it may be; a step's number is exact but for its type."""
    return judgement.bounds.metrics.get(key, 1e-6)


def metric_mistakes(runs: Sequence[JudgedRun]) -> MetricMistakes:
    """What the wrong metrics of a trainer's runs are; nothing where a gradient is wrong, which they follow."""
    if not runs or any(run.wrong for run in runs) or not all(complete(run) for run in runs):
        return MetricMistakes()
    wrong, telling = wrong_values(runs), wrong_values([run for run in runs if not in_half(run)])
    open_keys = {key for key, count in telling.items() if count >= FEWEST}
    if not open_keys:
        return MetricMistakes(rest=tuple(wrong), recorded=None if telling else rounded_recording(runs, wrong))
    held = Held(runs)
    candidates = [*ways_to_report(), *with_numbers(held, sorted(open_keys))]
    fits: list[tuple[Defect, frozenset[str], int]] = []
    for defect in candidates:
        entries = held.reported(defect)
        fitting = {key for key in KEYS if held.misfit(entries, key) <= 1}
        contradicted = len(set(KEYS) - fitting - set(wrong))
        fits.append((defect, frozenset(fitting & open_keys), contradicted))
    found: list[MetricMistake] = []
    while open_keys:
        ranked = sorted(fits, key=lambda one: (-len(one[1] & open_keys), one[2]))
        best, keys, contradicted = ranked[0]
        keys &= open_keys
        if not keys:
            break
        same = [one for one, of, other in ranked[1:] if of & open_keys == keys and other == contradicted]
        alike = tuple(dict.fromkeys(one.shown for one in same if one.name != best.name))
        ordered = tuple(key for key in KEYS if key in keys)
        if keys != COARSE or not contradicted:
            found.append(MetricMistake(best, ordered, sum(wrong[key] for key in ordered), alike))
        open_keys -= keys
    named = {key for one in found for key in one.keys}
    if set(wrong) - named:
        found = [one for one in found if set(one.keys) != COARSE]
        named = {key for one in found for key in one.keys}
    rest = tuple(key for key in wrong if key not in named)
    return MetricMistakes(tuple(found), rest, other_anchor(runs, telling["kl_reg"]) if "kl_reg" in rest else None)


def other_anchor(runs: Sequence[JudgedRun], wrong: int) -> StepExplanation | None:
    """The wrong anchor whose kl_reg is reported at every step of every run, ``wrong`` of them in full precision."""
    if wrong < FEWEST:
        return None
    runs = sorted(runs, key=lambda run: "kl_reg" not in wrong_values([run]))
    along = [(run, run.forced()) for run in runs]
    for candidate in step_loops():
        if candidate.defect.name.startswith("base-") and all(reports_anchor(candidate, *one) for one in along):
            return candidate
    return None


ROUNDED_RECORDING = "sampler-logprobs-in-"


def rounded_recording(runs: Sequence[JudgedRun], wrong: Mapping[str, int]) -> StepExplanation | None:
    """The loop that rounds what the sampler recorded, where every run's metrics are its own, ``wrong`` ones among them:
    the mean ratio and another."""
    if "mean_is_ratio" not in wrong or len(wrong) < FEWEST:
        return None
    for candidate in step_loops():
        if candidate.defect.name.startswith(ROUNDED_RECORDING) and all(is_reported(candidate, run) for run in runs):
            return candidate
    return None


def is_reported(candidate: StepExplanation, run: JudgedRun) -> bool:
    """Whether every metric of a run is that of a loop."""
    made = [outcome.metrics for _, outcome in outcomes(candidate, run.forced(), range(1, len(run.steps) + 1))]
    return len(made) == len(run.steps) and all(Held([run]).misfit([made], key) <= 1 for key in METRICS)


def reports_anchor(candidate: StepExplanation, run: JudgedRun, forced: Forced) -> bool:
    """Whether a run's values of kl_reg are those of a loop; it is replayed up to the first that is not."""
    made = outcomes(candidate, forced, range(1, len(run.steps) + 1))
    fitting = 0
    for (_, outcome), judgement, entry in zip(made, run.steps, run.observation.metrics, strict=False):
        if "kl_reg" in entry and misfit(run, judgement, entry, "kl_reg", outcome.metrics["kl_reg"]) > 1:
            return False
        fitting += 1
    return fitting == len(run.steps)


def complete(run: JudgedRun) -> bool:
    """Whether a run has a step and an entry for each step that it was asked for."""
    steps = run.observation.scenario.steps
    return len(run.observation.steps) == len(run.observation.metrics) == len(run.steps) == steps


def with_numbers(held: Held, keys: Sequence[str]) -> Iterator[Defect]:
    """Mistakes with a number in them, at the number that one of these metrics has."""
    for defect in ways_to_report():
        if defect.parameter is None:
            continue
        for key in keys:

            def distance(value: float, defect: Defect = defect, key: str = key) -> float:
                return held.misfit(held.reported(defect.at(value)), key)

            value, off = defect.parameter.fitted(distance, PROMISING / NEARER)
            if off <= 1:
                yield defect.at(simplest(value, lambda rounded, d=distance: d(rounded) <= 1))  # type: ignore[misc]
