"""What a wrong gradient equals instead: the catalogue's step loops, replayed along the trainer's own weights.

The loop whose gradient the trainer's equals names the requirement that is broken, and says in words what happened.
Where no step loop fits, the right loop is tried around each wrong loss, and then the numbers that a defect may have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from torch import Tensor

from sdpo_conformance.judging.forking import shared_out
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs.claas.defects import catalogue
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.defects.parameter import simplest
from sdpo_conformance.specs.claas.defects.step_loop_variants import TrainerParts
from sdpo_conformance.specs.claas.oracle.step_loop import norm
from sdpo_conformance.specs.claas.step_loop.forced_replay import (
    APART,
    Forced,
    ReplayOutcome,
    parts_of,
    replaced,
    replayed,
    with_loss,
)
from sdpo_conformance.specs.claas.step_loop.ground import Moment, Weights
from sdpo_conformance.specs.claas.step_loop.step_bounds import Bounds

SEARCHES = 2
"""Runs of which a step is searched for: the first by the whole catalogue, the next without fitting numbers."""

PROBES = 2
PROBE_COST = 4
"""So many right runs, of at most this part of a searched run's cost, are asked first whether a mistake can be it."""

PROMISING = 0.5
"""Of the truth's distance: a number that does not come nearer than this is not refined."""

NEARER = 0.25
"""Of the truth's distance: a name has to come nearer than this. Half precision's bounds alone are wide enough for
neighbours of what happened."""

ENOUGH = 0.85
"""Share of all runs' wrong steps from which on a mistake is named; a right step that it would have got wrong counts
against it as an unexplained one does."""

HALFWAY = 0.5
"""Of the truth's distance: a step in half precision that comes nearer than this to a mistake that explains the others
is not held against it. There a tie in the support, or a ratio at its cap, may fall either way. A mistake that rounds
sums on the way explains a step that comes nearer than this: what is rounded otherwise is further off than the truth."""

SAME = 1e-3
"""Of the truth's distance: what is this near to a mistake's gradient is it, beyond the bound too. Bounds are for the
truth's rounding, and a mistake's may be larger: a ratio of e^9 amplifies it."""

CLOSE = 0.1
"""Of the bound: nearer than this no other mistake was ever found, unless it is the same one."""

RATIO = frozenset({"log_ratio", "ratio", "chosen", "logits", "count"})
ANCHOR = frozenset({"drift", "k3", "chosen", "logits", "count"})
PART_OF_METRIC: Mapping[str, frozenset[str]] = {"mean_is_ratio": RATIO, "kl_reg": ANCHOR}
"""By a metric that one part of the loss makes: the parts that it is computed from."""


@dataclass
class TakenStep:
    """A step of the trainer, as much of it as is needed to compare: ``got`` is what the optimizer got, ``reported`` the
    step's metrics."""

    moment: Moment
    bounds: Bounds
    got: Weights
    reported: Mapping[str, float]


@dataclass(frozen=True)
class StepExplanation:
    """A defect as a step loop; ``in_loss``: it is a loss's, inside the right loop."""

    defect: Defect
    parts: TrainerParts
    in_loss: bool = False


@dataclass(frozen=True)
class TakenRun:
    """A run to be explained: ``taken`` its steps, ``wrong`` those of them whose gradient is wrong."""

    forced: Forced
    taken: Mapping[int, TakenStep]
    wrong: Sequence[int]

    @property
    def cost(self) -> tuple[bool, int]:
        """For an order: half precision last, for its bounds are wide; what is cheap to replay first."""
        scenario = self.forced.ground.scenario
        tokens = sum(prompt + teacher + response for prompt, teacher, response in scenario.lengths)
        return self.in_half, tokens * scenario.model.layers

    @property
    def in_half(self) -> bool:
        """Whether the model is in half precision."""
        return self.forced.ground.scenario.model.dtype == "bfloat16"


@dataclass
class Explained:
    """What all runs' wrong gradients equal: the mistake, None where nothing explains enough of them; by (run, step)
    its outcome, where the gradient is that of it; wrong steps in half precision that it ``nearly`` explains; ``alike``:
    what cannot be told from it on these runs."""

    best: StepExplanation | None = None
    outcomes: Mapping[tuple[int, int], ReplayOutcome] = field(default_factory=dict)
    nearly: frozenset[tuple[int, int]] = frozenset()
    alike: Sequence[StepExplanation] = ()


@dataclass(frozen=True)
class Tried:
    """A candidate on all runs: its outcomes where they are the step's; those of them that explain a wrong step; wrong
    steps in half precision that it nearly explains; how many right steps it would have got wrong; how many explained
    steps report another loss or norm than it would."""

    candidate: StepExplanation
    fitting: Mapping[tuple[int, int], ReplayOutcome]
    explained: frozenset[tuple[int, int]]
    nearly: frozenset[tuple[int, int]]
    against: int
    misreported: int

    @property
    def rank(self) -> tuple[int, int]:
        return self.against - len(self.explained), self.misreported


@cache
def step_loops() -> tuple[StepExplanation, ...]:
    """Catalogued step loops that a gradient can show."""
    found = []
    for defect in catalogue().values():
        parts = parts_of(defect)
        if parts is not None and (not replaced(parts) <= APART or "half" in defect.name):
            found.append(StepExplanation(defect, parts))
    return tuple(found)


@cache
def wrong_losses() -> tuple[StepExplanation, ...]:
    """The right loop around each catalogued loss."""
    found = []
    for defect in catalogue().values():
        if Capability.LOSS in defect.capabilities and (parts := with_loss(defect)) is not None:
            found.append(StepExplanation(defect, parts, in_loss=True))
    return tuple(found)


def furthest(got: Weights, truth: Weights, bound: Mapping[str, float]) -> tuple[float, str]:
    """The largest ratio of distance to bound over all tensors, and where; NaN counts as infinite."""
    excess = {}
    for name in truth:
        distance = float((got[name] - truth[name]).norm())
        excess[name] = distance / bound[name] if distance == distance else math.inf
    worst = max(excess, key=lambda name: excess[name])
    return excess[worst], worst


def misfit(wrong: TakenStep, gradient: Mapping[str, Tensor]) -> float:
    """How far the trainer's gradient is from this one, in units of the bound; above 1 is another."""
    size = norm(wrong.moment.gradient)
    scale = max(1.0, float(norm(gradient) / size)) if float(size) else 1.0
    return furthest(wrong.got, gradient, {name: scale * b for name, b in wrong.bounds.gradient.items()})[0]


def allowed(taken: TakenStep, defect: Defect) -> float:
    """How far, in units of the bound, a step's gradient may be from a mistake's to be it."""
    return max(1.0, (HALFWAY if defect.rounded else SAME) * misfit(taken, taken.moment.gradient))


def outcomes(candidate: StepExplanation, forced: Forced, steps: Sequence[int]) -> Iterator[tuple[int, ReplayOutcome]]:
    """What a candidate makes of these steps; nothing where it cannot take them."""
    try:
        yield from replayed(candidate.parts, forced, steps)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
        return


def explain(runs: Sequence[TakenRun]) -> Explained:
    """The candidate whose gradients the wrong steps of these runs of one trainer have. What fits one step is tried on
    every run: a number that one run suggests is no constant where another run shows a different one."""
    total = sum(len(run.wrong) for run in runs)
    order = sorted((index for index, run in enumerate(runs) if run.wrong), key=lambda index: runs[index].cost)
    tried: dict[tuple[str, float | None], Tried] = {}
    searched: set[int] = set()
    for _ in range(SEARCHES):
        known = {place for one in tried.values() for place in one.explained}
        places = [(index, step) for index in order for step in runs[index].wrong if (index, step) not in known]
        places = [place for place in places if place[0] not in searched]
        if not places:
            break
        index, step = places[0]
        searched.add(index)
        run = runs[index]
        search = Search(run.forced, run.taken, step, refuted_by(probes(runs, total, run)))
        for stage in STAGES if len(searched) == 1 else WITHOUT_NUMBERS:
            # The same gradient with another loss reported: another mistake may report it, but no number is fitted.
            if any(one.rank[0] == -total for one in tried.values()) and stage not in WITHOUT_NUMBERS:
                continue
            for found in stage(search):
                for candidate in found:
                    key = candidate.defect.name, candidate.defect.value
                    if key not in tried:
                        tried[key] = on_all(candidate, runs)
                if any(one.rank[0] == -total and not one.misreported for one in tried.values()):
                    return chosen_of(tried.values(), total)
        if any(one.rank[0] == -total for one in tried.values()):
            break
    return chosen_of(tried.values(), total)


def probes(runs: Sequence[TakenRun], total: int, searched: TakenRun) -> list[TakenRun]:
    """Right runs that are much cheaper to replay than the one that is searched, where a mistake is out that would get
    one right step wrong: there so few steps are wrong that it could not be named any more."""
    if total >= ENOUGH * (total + 1):
        return []
    cheap = [run for run in runs if not run.wrong and not run.in_half and len(run.taken) > 1]
    cheap = [run for run in cheap if PROBE_COST * run.cost[1] <= searched.cost[1]]
    return sorted(cheap, key=lambda run: run.cost)[:PROBES]


def refuted_by(right: Sequence[TakenRun]) -> Callable[[StepExplanation], bool]:
    """Whether a candidate gets a step of these right runs wrong."""

    def refuted(candidate: StepExplanation) -> bool:
        made = ((run.taken[step], one) for run in right for step, one in outcomes(candidate, run.forced, (1, 2)))
        return any(misfit(taken, one.gradient) > allowed(taken, candidate.defect) for taken, one in made)

    return refuted


def chosen_of(tried: Iterable[Tried], total: int) -> Explained:
    """The best of what was tried, if it explains enough."""
    ranked = sorted(tried, key=lambda one: one.rank)
    if not ranked or len(ranked[0].explained) < ENOUGH * (total + ranked[0].against):
        return Explained()
    best = ranked[0]
    same = [one.candidate for one in ranked[1:] if one.rank == best.rank and one.explained == best.explained]
    alike = [one for one in same if one.defect.name != best.candidate.defect.name]
    return Explained(best.candidate, best.fitting, best.nearly, alike)


def on_all(candidate: StepExplanation, runs: Sequence[TakenRun]) -> Tried:
    """A candidate on every step of every run."""
    fitting: dict[tuple[int, int], ReplayOutcome] = {}
    explained: set[tuple[int, int]] = set()
    nearly: set[tuple[int, int]] = set()
    against = misreported = 0
    for index, run in enumerate(runs):
        fits = {}
        for step, outcome in outcomes(candidate, run.forced, sorted(run.taken)):
            taken, off = run.taken[step], misfit(run.taken[step], outcome.gradient)
            if off <= allowed(taken, candidate.defect):
                fits[step] = outcome
            elif step in run.wrong and run.in_half and off <= HALFWAY * misfit(taken, taken.moment.gradient):
                nearly.add((index, step))
        fitting |= {(index, step): outcome for step, outcome in fits.items()}
        explained |= {(index, step) for step in run.wrong if step in fits}
        against += sum(step not in run.wrong and step not in fits for step in run.taken)
        misreported += sum(not reports(run.taken[step], fits[step]) for step in run.wrong if step in fits)
    return Tried(candidate, fitting, frozenset(explained), frozenset(nearly), against, misreported)


@dataclass(frozen=True)
class Search:
    """A step of a run whose mistake is looked for; ``refuted``: whether right runs rule a candidate out."""

    forced: Forced
    taken: Mapping[int, TakenStep]
    step: int
    refuted: Callable[[StepExplanation], bool]

    @property
    def wrong(self) -> TakenStep:
        """The step."""
        return self.taken[self.step]


Found = Iterator[list[StepExplanation]]


def matching(candidates: Iterable[StepExplanation], search: Search) -> Found:
    """Candidates whose gradient one step has, closest first. Once one fits closely, those that break a rule of its come
    first, for what cannot be told from it; the others after that, where these do not explain the other steps."""
    later: list[StepExplanation] = []
    fits = []
    rules: set[str] = set()
    # a forward of its own is costly, and shared by none
    for candidate in sorted(candidates, key=lambda one: "forward" in replaced(one.parts)):
        if rules and not candidate.in_loss and not rules & set(candidate.defect.violates):
            later.append(candidate)
            continue
        off = fit_of(candidate, search)
        if off is None:
            continue
        fits.append((off, candidate))
        if off <= CLOSE and not rules:
            rules = set(candidate.defect.violates)
    yield closest(fits)
    offs = ((fit_of(candidate, search), candidate) for candidate in later)
    yield closest([(off, candidate) for off, candidate in offs if off is not None])


def closest(fits: Iterable[tuple[float, StepExplanation]]) -> list[StepExplanation]:
    """The candidates, those nearest to the step first."""
    return [candidate for _, candidate in sorted(fits, key=lambda pair: pair[0])]


def idle(candidate: StepExplanation, step: int) -> bool:
    """Whether what a loop replaces comes after this step, or is over by then."""
    other = replaced(candidate.parts) - {"accept", "report", "finish"}
    return other <= {"refresh", "zero"} if step == 1 else other == {"first_behaviour"}


def fit_of(candidate: StepExplanation, search: Search) -> float | None:
    """How far a step's gradient is from a candidate's; None where it is not that one."""
    taken = search.wrong
    if idle(candidate, search.step) or search.refuted(candidate):
        return None
    near = min(allowed(taken, candidate.defect), NEARER * misfit(taken, taken.moment.gradient))
    for _, outcome in outcomes(candidate, search.forced, [search.step]):
        off = misfit(taken, outcome.gradient)
        if off <= near and not contradicted(taken, outcome):
            return off
    return None


def reports(step: TakenStep, outcome: ReplayOutcome) -> bool:
    """Whether the loss and the norm reported are those of this outcome: gradients that clipping makes alike differ
    there."""
    return all(
        abs(step.reported[key] - float(outcome.metrics[key]))
        <= step.bounds.metrics[key] + 1e-3 * abs(step.reported[key])
        for key in ("total_loss", "grad_norm")
        if key in step.reported and key in outcome.metrics
    )


def contradicted(step: TakenStep, outcome: ReplayOutcome) -> bool:
    """Whether clipping hides the gradient's size, and the loss reported is neither the truth's nor this outcome's."""
    moment, got = step.moment, step.reported.get("total_loss")
    if got is None or float(norm(moment.truth.gradient)) <= moment.training.max_grad_norm:
        return False
    losses = (moment.truth.metrics["total_loss"], float(outcome.metrics.get("total_loss", math.nan)))
    bound = step.bounds.metrics["total_loss"] + 1e-3 * abs(got)
    return not any(abs(got - loss) <= bound for loss in losses)


def numbers(defects: Iterable[Defect], search: Search) -> Found:
    """Defects with a number in them, of the loop or of its loss, at the number that fits one step; fitted by several
    processes."""
    start = misfit(search.wrong, search.wrong.moment.gradient)
    fitted = [defect for defect in defects if defect.parameter is not None]
    if fitted:
        search.forced.student(search.step)  # run here, or each process would

    def values(part: Sequence[int]) -> list[tuple[int, float]]:
        return [(index, value) for index in part for value in values_that_fit(fitted[index], search, start)]

    pairs = [pair for part in shared_out(values, range(len(fitted))) for pair in part]
    found = sorted(pairs, key=lambda pair: pair[0])
    yield [explanation_of(fitted[index].at(value)) for index, value in found]


def values_that_fit(defect: Defect, search: Search, start: float) -> Iterator[float]:
    """The numbers, with as few digits as do it, at which a defect has a step's gradient. ``start``: how far the truth
    is from it."""
    parameter, taken = defect.parameter, search.wrong
    assert parameter is not None
    if idle(explanation_of(defect.at(parameter.values[0])), search.step):
        return
    possible = [value for value in parameter.values if not search.refuted(explanation_of(defect.at(value)))]
    if not possible:
        return
    if parameter.whole:
        parameter = replace(parameter, values=tuple(possible))

    def distance(value: float) -> float:
        made = outcomes(explanation_of(defect.at(value)), search.forced, [search.step])
        return next((misfit(taken, one.gradient) for _, one in made), math.inf)

    for value, off in parameter.fitting(distance, allowed(taken, defect), PROMISING * start):
        enough = max(off, CLOSE)
        yield value if parameter.whole else simplest(value, lambda v, e=enough: distance(v) <= e)  # type: ignore[misc]


def explanation_of(defect: Defect) -> StepExplanation:
    """A step loop, or the right loop around a loss."""
    parts = parts_of(defect) if defect.distill is not None else with_loss(defect)
    assert parts is not None
    return StepExplanation(defect, parts, in_loss=defect.distill is None)


def loops_with_a_number() -> Iterator[Defect]:
    """Catalogued step loops that have one."""
    return (one for one in catalogue().values() if one.parameter is not None and one.distill is not None)


def losses_with_a_number(step: TakenStep) -> Iterator[Defect]:
    """Catalogued losses that have one, and change what the step's metrics show to be wrong, and nothing else."""
    wrong = {
        key
        for key in PART_OF_METRIC
        if abs(step.reported.get(key, math.nan) - float(step.moment.truth.metrics[key])) > step.bounds.metrics[key]
    }
    for defect in catalogue().values():
        if defect.parameter is not None and Capability.LOSS in defect.capabilities:
            changed = {key for key, parts in PART_OF_METRIC.items() if parts & defect.touched}
            if changed == wrong or (not wrong and not changed):
                yield defect


Stage = Callable[[Search], Found]


def as_a_loop(search: Search) -> Found:
    """Catalogued loops that a step fits."""
    return matching(step_loops(), search)


def as_a_loop_with_a_number(search: Search) -> Found:
    """Catalogued loops at the numbers that fit a step."""
    return numbers(loops_with_a_number(), search)


def as_a_loss(search: Search) -> Found:
    """The right loop around the catalogued losses that a step fits."""
    return matching(wrong_losses(), search)


def as_a_loss_with_a_number(search: Search) -> Found:
    """The right loop around catalogued losses at the numbers that fit a step."""
    return numbers(losses_with_a_number(search.wrong), search)


STAGES: tuple[Stage, ...] = (as_a_loop, as_a_loop_with_a_number, as_a_loss, as_a_loss_with_a_number)
"""What is tried for a step, until something explains everything."""

WITHOUT_NUMBERS: tuple[Stage, ...] = (as_a_loop, as_a_loss)
"""What is tried for a second step: fitting numbers is slow, and was done for the first."""


def requirements_of(candidate: StepExplanation | None, step: int) -> tuple[str, ...]:
    """What a mistake at this step breaks. At the first step every wrong behaviour log-prob is STEP-1's."""
    if candidate is None or candidate.in_loss:
        return ("STEP-1",) if step == 1 else ("STEP-2",)
    violates = candidate.defect.violates
    if step == 1 and set(violates) & {"STEP-2", "STEP-3"}:
        return ("STEP-1",)
    return violates


def words_of(candidate: StepExplanation) -> str:
    """What is said of a mistake."""
    where = " in the loop's loss" if candidate.in_loss else ""
    return f"{candidate.defect.shown}{where}: {candidate.defect.sentence}"


def as_reported(candidate: StepExplanation) -> Mapping[str, Any]:
    """A candidate in the form that a failure keeps."""
    return {"name": candidate.defect.name, "value": candidate.defect.value, "in_loss": candidate.in_loss}


__all__ = [
    "Explained",
    "StepExplanation",
    "TakenRun",
    "TakenStep",
    "as_reported",
    "explain",
    "furthest",
    "misfit",
    "outcomes",
    "requirements_of",
    "step_loops",
    "words_of",
]
