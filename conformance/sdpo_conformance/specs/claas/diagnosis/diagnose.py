"""Which known defect, dialect or pair of defects explains a run's failures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from sdpo_conformance.judging.likeness import roundoff
from sdpo_conformance.specs.claas.defects import catalogue, combine
from sdpo_conformance.specs.claas.defects.defect import Defect
from sdpo_conformance.specs.claas.defects.dialects import DIALECTS, Dialect
from sdpo_conformance.specs.claas.defects.parameter import simplest
from sdpo_conformance.specs.claas.diagnosis.fitting import best_value
from sdpo_conformance.specs.claas.diagnosis.observed import Observed
from sdpo_conformance.specs.claas.diagnosis.prediction import Predictor, effect

LOOKED_AT = 4
"""Failures on which every defect of the catalogue is tried; what fits one of them is tried on all."""

PARTNERS = 4
"""Best single explanations to which a second defect is sought."""


FITTED_ON = 3
"""Failures to which a defect's number is fitted, until one fits."""

MOST_PAIRS = 1500
"""Pairs that are tried at all: a few seconds' work, spent on the likeliest first."""

FARTHER = 100.0
"""So many times the error of the best explanation of as many failures is no rounding: what is farther off is a
neighbour that the bounds let pass."""

ROUNDED = 1e-6
"""Relative errors up to which explanations are equally near."""

ENOUGH_FOR_PAIRS = 3
"""Failures from which on pairs are tried: among so many pairs some return what one or two inputs showed."""


@dataclass(frozen=True)
class Diagnosis:
    """``defects``: one, or two that act together; ``equivalent``: others that return the same on every failing
    input. ``explained`` of ``total`` failures are as predicted, to a relative ``error``."""

    defects: tuple[Defect, ...]
    equivalent: tuple[Defect, ...]
    explained: frozenset[int]
    total: int
    error: float

    @property
    def name(self) -> str:
        return " + ".join(defect.name for defect in self.defects)

    @property
    def kind(self) -> str:
        return "dialect" if any(isinstance(defect, Dialect) for defect in self.defects) else "defect"

    @property
    def complete(self) -> bool:
        return len(self.explained) == self.total


@dataclass(frozen=True)
class Candidate:
    """A defect, or a pair as one, with the failures it explains."""

    parts: tuple[Defect, ...]
    whole: Defect
    explained: frozenset[int]
    error: float


def diagnose(observed: Sequence[Observed], passed: Iterable[str] = ()) -> Diagnosis | None:
    """The best explanation of these failures of one run, or None. ``passed``: requirements that held, which
    speaks against a defect that they name.

    Failures in half precision alone may be those of a path that nothing else takes, which only a prediction in
    that precision knows: then the closer of both explanations counts.
    """
    if not observed:
        return None
    answers = []
    half = [one.roundoff > roundoff(torch.float32) for one in observed]
    in_half = any(half)
    for predictor in (Predictor(native=False), Predictor(native=True)):
        pairs = in_half or not predictor.native
        answer = explanation(observed, frozenset(passed), predictor, pairs)
        if answer is not None and answer.complete and not all(half):
            return answer
        if answer is not None:
            answers.append(answer)
    return max(answers, key=lambda one: (len(one.explained), -one.error), default=None)


def explanation(
    observed: Sequence[Observed], held: frozenset[str], predictor: Predictor, pairs: bool
) -> Diagnosis | None:
    """The best explanation that one way of predicting gives, with pairs or without."""
    broken = frozenset(one.requirement for one in observed)
    entries = {one.entry for one in observed}
    known = [
        defect
        for defect in (*catalogue().values(), *DIALECTS)
        if defect.change is not None and entries & set(defect.capabilities)
    ]
    looked_at = representative(observed)
    # what explains everything explains the numbers: only where nothing does is every check replayed with every defect
    numeric = [index for index in looked_at if observed[index].numeric]
    for first in (numeric, looked_at):
        tried = tuple(first)

        def fits_one(defect: Defect, tried: Sequence[int] = tried) -> bool:
            return any(predictor.fit(defect, observed[index]).matched for index in tried)

        predictor.foresee(known, observed, fits_one)
        singles = ranked(
            [
                candidate
                for defect in known
                if fits_one(defect)
                if (candidate := judged((defect,), defect, observed, predictor)).explained
                if not contradicted(candidate, held)
            ],
            broken,
        )
        if singles and len(singles[0].explained) == len(observed):
            return told(singles, len(observed))
    numbers = [candidate for candidate in numbered(known, observed, predictor) if not contradicted(candidate, held)]
    fitted = ranked([*singles, *numbers], broken)
    if fitted and (not singles or len(fitted[0].explained) > len(singles[0].explained)):
        singles = fitted
        if len(singles[0].explained) == len(observed):
            return told(singles, len(observed))
    for candidate in side_by_side(singles, observed):
        return told([candidate], len(observed))
    pairs = pairs and len(observed) >= ENOUGH_FOR_PAIRS
    found = pairings(singles, known, observed, predictor) if pairs else ()
    twos = ranked([candidate for candidate in found if not contradicted(candidate, held)], broken)
    if twos and (not singles or len(twos[0].explained) > len(singles[0].explained)):
        return told(twos, len(observed))
    return told(singles, len(observed)) if singles else None


def rules_behind(observed: Observed, held: Iterable[str]) -> list[str]:
    """The requirements that name the causes which one failure may have, likeliest first; empty where its own
    requirement is among the likeliest's."""
    found = explanation([observed], frozenset(held), Predictor(False), pairs=False)
    if found is None or found.defects[0].violates[:1] == (observed.requirement,):
        return []
    causes = [one for one in (*found.defects, *found.equivalent) if not isinstance(one, Dialect)]
    return list(dict.fromkeys(one.violates[0] for one in causes))


def numbered(known: Sequence[Defect], observed: Sequence[Observed], predictor: Predictor) -> Iterable[Candidate]:
    """Defects with a number in them, at the number that fits the failures: fitted on one, tried on all."""
    if predictor.native:
        return
    numeric = [index for index in representative(observed) if observed[index].numeric]
    numeric.sort(key=lambda index: (observed[index].secondary, observed[index].size))
    for defect in known:
        if defect.parameter is None:
            continue
        if defect.parameter.whole:
            counts = (defect.at(value) for value in defect.parameter.values)
            fitting = [
                at for at in counts if any(predictor.fit(at, observed[one]).matched for one in numeric[:FITTED_ON])
            ]
            # on a small input several counts do the same: the one that explains most is meant
            tried = [judged((at,), at, observed, predictor) for at in fitting]
            yield from sorted(tried, key=lambda one: (-len(one.explained), one.error))[:1]
            continue
        for index in numeric[:FITTED_ON]:
            value = best_value(defect, observed[index], lambda at, one: predictor.fit(at, one).matched)
            if value is not None:
                candidate = rounded(defect, value, observed, predictor)
                if seen_by_more(candidate, observed, predictor):
                    yield candidate
                break


FEW_DIGITS = 2
"""Significant digits up to which a number is one that people write: none that fits by chance."""


EXACT = 1e-3
"""What a round number may leave of a distance from the truth: more is left by one in a hundred, whatever it is."""


def seen_by_more(candidate: Candidate, observed: Sequence[Observed], predictor: Predictor) -> bool:
    """Whether a fitted number is borne out by more than the one number that it was fitted to: by another input, by a
    gradient or a value for each token, or by being round."""
    explained = [observed[index] for index in candidate.explained if observed[index].numeric]
    if len({one.input for one in explained}) > 1:
        return True
    if any(got.numel() > 1 for one in explained for got in one.wrong.values()):
        return True
    value = candidate.whole.value or 0.0
    is_round = float(f"{value:.{FEW_DIGITS}g}") == value
    return is_round and all(predictor.fit(candidate.whole, one).left <= EXACT for one in explained)


def rounded(defect: Defect, value: float, observed: Sequence[Observed], predictor: Predictor) -> Candidate:
    """A defect at the number of fewest digits that explains all that the fitted one explains: the failure that it was
    fitted to may not ask for so many."""
    fitted = judged((defect.at(value),), defect.at(value), observed, predictor)

    def explains(simpler: float) -> bool:
        return all(predictor.fit(defect.at(simpler), observed[index]).matched for index in fitted.explained)

    at = defect.at(simplest(value, explains))
    return judged((at,), at, observed, predictor)


def representative(observed: Sequence[Observed]) -> list[int]:
    """A few failures to begin with: those that isolate their rule, one of each kind of check first."""
    order = sorted(range(len(observed)), key=lambda index: (observed[index].secondary, not observed[index].numeric))
    kinds: dict[str, int] = {}
    for index in order:
        kinds.setdefault(observed[index].probe, index)
    return list(dict.fromkeys([*kinds.values(), *order]))[: max(LOOKED_AT, len(kinds))]


def judged(parts: tuple[Defect, ...], whole: Defect, observed: Sequence[Observed], predictor: Predictor) -> Candidate:
    """How much a candidate explains."""
    fits = [predictor.fit(whole, one) for one in observed]
    explained = frozenset(index for index, one in enumerate(fits) if one.matched)
    return Candidate(parts, whole, explained, max((fits[index].error for index in explained), default=0.0))


def rules_named(candidate: Candidate) -> list[str]:
    """The requirement that names each of a candidate's defects."""
    return [defect.violates[0] for defect in candidate.parts if not isinstance(defect, Dialect)]


def contradicted(candidate: Candidate, held: frozenset[str]) -> bool:
    """Whether a requirement that names one of its defects was judged and held. What goes wrong like a known defect
    under some condition alone is not that defect: its sentence would be false of all other inputs."""
    return any(name in held for name in rules_named(candidate))


def ranked(candidates: Sequence[Candidate], broken: frozenset[str]) -> list[Candidate]:
    """Best first: most failures explained, then the simpler one, then the one that is not much farther from the
    numbers than others, then what the requirements that failed name, then the order of the catalogue."""
    nearest: dict[tuple[int, int], float] = {}
    for candidate in candidates:
        kind = len(candidate.explained), len(candidate.parts)
        nearest[kind] = min(candidate.error, nearest.get(kind, math.inf))

    def rank(candidate: Candidate) -> tuple[int, int, bool, int]:
        kind = len(candidate.explained), len(candidate.parts)
        unnamed = sum(name not in broken for name in rules_named(candidate))
        return -kind[0], kind[1], farther(candidate.error, nearest[kind]), unnamed

    return sorted(candidates, key=rank)


def farther(error: float, nearest: float) -> bool:
    """Whether an explanation with this error is told from the nearest one by it."""
    return error > FARTHER * max(nearest, ROUNDED)


def side_by_side(singles: Sequence[Candidate], observed: Sequence[Observed]) -> Iterable[Candidate]:
    """Two defects that explain everything between them and nothing twice, each a failure of the rule that names it: so
    told apart they need no third failure, nor to be run as one."""
    own = [
        one
        for one in distinct(singles)
        if {observed[index].requirement for index in one.explained} & {*rules_named(one)[:1]}
    ]
    for place, first in enumerate(own):
        for second in own[place + 1 :]:
            both = first.explained | second.explained
            if len(first.explained) + len(second.explained) == len(both) == len(observed):
                error = max(first.error, second.error)
                yield Candidate((first.whole, second.whole), first.whole, both, error)


def pairings(
    singles: Sequence[Candidate], known: Sequence[Defect], observed: Sequence[Observed], predictor: Predictor
) -> Iterable[Candidate]:
    """Pairs that explain more than their first does alone; where no single explains half of the failures, pairs
    of which each may have part in the wrong numbers."""
    work = [(candidate.whole, known) for candidate in distinct(singles)[:PARTNERS]]
    if not singles or 2 * len(singles[0].explained) < len(observed):
        likely = suspects(known, observed)
        work.extend((first, likely) for first in likely)
    tried: set[frozenset[str]] = set()
    untried: list[tuple[Defect, list[Defect]]] = []
    for first, seconds in work:
        untried.append((first, []))
        for second in seconds:
            names = frozenset({first.name, second.name})
            if len(names) == 2 and names not in tried and len(tried) < MOST_PAIRS:
                tried.add(names)
                untried[-1][1].append(second)
    predictor.foresee(untried, observed, lambda one: list(paired(*one, observed, predictor)))
    for first, seconds in untried:
        yield from paired(first, seconds, observed, predictor)


def paired(
    first: Defect, seconds: Sequence[Defect], observed: Sequence[Observed], predictor: Predictor
) -> Iterable[Candidate]:
    """The pairs of a defect with others that explain more than it does alone."""
    if not seconds:
        return
    alone = {index for index, one in enumerate(observed) if predictor.fit(first, one).matched}
    open_ones = [index for index in representative(observed) if index not in alone]
    open_ones = open_ones or [index for index in range(len(observed)) if index not in alone]
    for second in seconds:
        try:
            whole = combine(first, second)
        except ValueError:
            continue
        if any(predictor.fit(whole, observed[index]).matched for index in open_ones[:2]):
            candidate = judged((first, second), whole, observed, predictor)
            if len(candidate.explained) > len(alone):
                yield candidate


def suspects(known: Sequence[Defect], observed: Sequence[Observed]) -> list[Defect]:
    """Defects that change some wrong result of a few failures, and no right one: only such have part in them.
    Those that predict most wrong numbers come first."""
    numeric = [observed[index] for index in representative(observed) if observed[index].numeric]
    if not numeric:
        return []
    found = []
    for defect in known:
        effects = [effect(defect, one) for one in numeric]
        if any(one.changes for one in effects) and not any(one.spoils for one in effects):
            found.append((sum(one.predicted for one in effects), defect))
    return [defect for _, defect in sorted(found, key=lambda pair: -pair[0])]


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """One candidate for each set of explained failures."""
    found: dict[frozenset[int], Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.explained, candidate)
    return list(found.values())


def told(candidates: Sequence[Candidate], total: int) -> Diagnosis:
    """The best candidate, and those that cannot be told from it."""
    best = candidates[0]
    equivalent = [
        candidate
        for candidate in candidates[1:]
        if candidate.explained == best.explained and len(candidate.parts) == len(best.parts)
        if not farther(candidate.error, best.error)
    ]
    return Diagnosis(
        defects=best.parts,
        equivalent=tuple(candidate.whole for candidate in equivalent),
        explained=best.explained,
        total=total,
        error=best.error,
    )
