"""What the STEP requirements share: which runs they look at, and how a finding becomes a verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest

from sdpo_conformance.judging.call import ImplementationError
from sdpo_conformance.judging.compare import Disagreement
from sdpo_conformance.judging.examples import Subject
from sdpo_conformance.protocol import Sample, TrainingConfig
from sdpo_conformance.specs.claas.step_loop.findings import findings_of
from sdpo_conformance.specs.claas.step_loop.telling_apart import to_tell_apart
from sdpo_conformance.specs.claas.step_loop.trainer_program import write_reproduction
from sdpo_conformance.specs.claas.step_loop.unobserved import UNOBSERVED
from sdpo_conformance.specs.requirement import Level
from sdpo_conformance.trainer.observation import Observation, Refusal, attempt, observe
from sdpo_conformance.trainer.scenarios import (
    BFLOAT16,
    SCENARIOS,
    UNRECORDED,
    WIDER,
    Scenario,
    in_dtype,
    reseeded,
    samples_of,
    wider_in_bfloat16,
    within_claims,
)

EXAMPLES_PER_ROUND = 200
"""Of the profile's examples: each run tells a lot, and only deep profiles repeat them with other weights."""


def require_packages() -> None:
    """Not judged where the tiny models cannot be built."""
    for package in ("transformers", "peft"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package} for the tiny models: install sdpo-conformance[trainer]")


def needs_steps(subject: Subject, steps: int) -> None:
    """Not judged where the implementation claims to take fewer."""
    most = subject.claims.max_steps_per_batch
    if most is not None and most < steps:
        pytest.skip(f"claims max_steps_per_batch = {most}: usable with steps_per_batch up to {most} only")


def scenarios(subject: Subject, wider: bool = False) -> Iterator[list[Scenario]]:
    """The scenarios within the dtypes and claims of the run; once more with other seeds in deeper profiles.
    ``wider``: those that are run where the first ones found nothing."""
    chosen: tuple[Scenario, ...] = ()
    for name in ("float32", "float64"):
        if name in subject.dtypes and not chosen:
            kept = WIDER if wider else (*SCENARIOS, UNRECORDED)
            chosen = tuple(in_dtype(scenario, name) for scenario in kept)
    if "bfloat16" in subject.dtypes:
        chosen = (*chosen, *(wider_in_bfloat16() if wider else (BFLOAT16,)))
    if not chosen and not wider:
        pytest.skip(f"no trainer is judged in {', '.join(subject.dtypes)}: only float32, float64 and bfloat16")
    rounds = max(1, subject.profile.examples // EXAMPLES_PER_ROUND)
    for index in range(rounds):
        seed = subject.seed * rounds + index
        yield [reseeded(within_claims(scenario, subject.claims), seed) for scenario in chosen]


def observations(
    subject: Subject, wider: bool = False
) -> Iterator[tuple[tuple[Observation, ...], ImplementationError | None]]:
    """Runs of the trainer on the scenarios up to the one where it failed, if it did, with that error; a scenario that
    may be refused is left out where it was, and the note says so."""
    require_packages()
    refused: list[str] = []
    unset: list[str] = []
    notes: list[str] = []
    for together in scenarios(subject, wider):
        runs: list[Observation] = []
        error: ImplementationError | None = None
        for scenario in together:
            subject.tally.examples += 1
            try:
                observed = observe(subject.function, scenario, subject.device, owner=subject.implementation)
            except ImplementationError as raised:
                error = raised
                break
            if isinstance(observed, Observation):
                runs.append(observed)
                notes += observed.notes
            elif scenario.model.unusual_head:
                refused.append(scenario.model.unusual_head)
            elif scenario.refusable:
                unset.append(scenario.refusable)
        if error is None and not wider:
            runs += further_runs(subject, tuple(runs))
        yield tuple(runs), error
    if refused:
        notes.append(f"refuses heads with {', '.join(dict.fromkeys(refused))}: not judged on such models")
    if unset:
        notes.append(f"refuses {', '.join(dict.fromkeys(unset))}: not judged there")
    if notes and not subject.tally.note:
        subject.tally.note = "; ".join(dict.fromkeys(notes))


def further_runs(subject: Subject, runs: tuple[Observation, ...]) -> list[Observation]:
    """Runs where what these cannot tell apart parts; none that fails or is refused."""
    found: list[Observation] = []
    others = next(scenarios(subject, wider=True), []) if subject.claims.max_steps_per_batch is None else []
    for scenario in to_tell_apart(runs, others):
        with suppress(ImplementationError):
            observed = observe(subject.function, scenario, subject.device, owner=subject.implementation)
            if isinstance(observed, Observation):
                found.append(observed)
    return found


def judge_runs(subject: Subject, requirement_id: str) -> None:
    """Raise the first finding that this requirement names, or else one that it is broken by as well. What a trainer
    meets besides the ordinary is run where the ordinary found nothing; the ordinary runs then speak against causes that
    would have shown in them."""
    ordinary: list[tuple[Observation, ...]] = []
    for wider in (False, True):
        found: Disagreement | None = None
        anything = False
        for index, (runs, error) in enumerate(observations(subject, wider)):
            together = (*ordinary[index], *runs) if wider and index < len(ordinary) else runs
            ordinary += [] if wider else [runs]
            for observation, found_there in findings_of(together):
                if not observation.observed:
                    subject.tally.note = UNOBSERVED
                for finding in found_there:
                    anything = True
                    if finding.requirements[0] == requirement_id:
                        raise reproducible(finding.disagreement, observation)
                    if found is None and requirement_id in finding.requirements:
                        found = reproducible(finding.disagreement, observation)
            if error is not None:
                raise error
        if found is not None:
            raise found
        if anything:
            return


def reproducible(disagreement: Disagreement, observation: Observation) -> Disagreement:
    """The disagreement with its input in words and a way to write it as a program."""
    disagreement.extra["words"] = observation.scenario.words
    disagreement.extra["reproduction"] = partial(write_reproduction, observation.scenario, disagreement)
    return disagreement


# --- what a trainer must refuse ---


@dataclass(frozen=True)
class BadInput:
    """``words``: what is wrong with it; ``may_accept``: taking it is as right as refusing it."""

    words: str
    samples: tuple[Sample, ...]
    training: TrainingConfig
    may_accept: bool = False


def refusal_of(
    subject: Subject, scenario: Scenario, samples: Sequence[Sample], training: TrainingConfig
) -> Refusal | None:
    return attempt(subject.function, scenario, samples, training, subject.device)


def bad_inputs(subject: Subject, scenario: Scenario, level: Level) -> Iterator[BadInput]:
    """One good batch, spoilt in one way each; the last sample where possible, so that the first is done."""
    training = replace(scenario.training, steps_per_batch=min(2, scenario.steps))
    *others, last = samples_of(scenario)
    recorded = list(last.response_logprobs or ())

    def spoilt(words: str, may_accept: bool = False, **changes: Any) -> BadInput:
        return BadInput(words, (*others, replace(last, **changes)), training, may_accept)

    yield BadInput("no samples", (), training)
    yield spoilt("response_logprobs one shorter than the response", response_logprobs=recorded[:-1])
    yield spoilt("response_logprobs one longer than the response", response_logprobs=[*recorded, -1.0])
    if others and others[0].response_logprobs is not None:
        more = replace(others[0], response_logprobs=[*others[0].response_logprobs, -1.0])
        fewer = replace(last, response_logprobs=recorded[:-1])
        words = "response_logprobs one longer in the first sample and one shorter in the last"
        yield BadInput(words, (more, *others[1:], fewer), training)
    yield spoilt("response_logprobs of None", may_accept=True, response_logprobs=None)
    if (most := subject.claims.max_steps_per_batch) is not None:
        longer = replace(training, steps_per_batch=most + 1)
        yield BadInput(f"steps_per_batch = {most + 1}, claimed at most {most}", (*others, last), longer)
    if level is Level.MUST:
        return
    yield spoilt("an empty response", response_token_ids=[], response_logprobs=[])
    yield spoilt("an empty prompt", prompt_token_ids=[])
    yield spoilt("an empty teacher prompt", teacher_prompt_token_ids=[])
    yield spoilt("a NaN among response_logprobs", response_logprobs=[*recorded[:-1], float("nan")])
    yield BadInput("steps_per_batch = 0", (*others, last), replace(training, steps_per_batch=0))
    if not subject.device.startswith("cuda"):  # there an index out of range ends the process
        outside = [*last.prompt_token_ids[:-1], scenario.model.vocabulary]
        yield spoilt("a prompt token outside the vocabulary", prompt_token_ids=outside)


def judge_refusals(subject: Subject, level: Level) -> None:
    """Each bad input is refused and leaves the model as it was; as a SHOULD, with a ValueError."""
    require_packages()
    scenario = within_claims(SCENARIOS[1], subject.claims)
    for bad in bad_inputs(subject, scenario, level):
        subject.tally.examples += 1
        refusal = refusal_of(subject, scenario, bad.samples, bad.training)
        got = complaint(refusal, level)
        if not got or (refusal is None and bad.may_accept):
            continue
        words = f"{scenario.words}, with {bad.words}"
        disagreement = Disagreement(
            aspect=bad.words,
            expected="an error, nothing changed" if level is Level.MUST else "a ValueError, nothing changed",
            got=got,
            probe="distill",
            extra={"shows": "refusal", "scenario": scenario.name, "words": words},
        )
        changed = replace(scenario, training=bad.training)
        disagreement.extra["reproduction"] = partial(write_reproduction, changed, disagreement, samples=bad.samples)
        raise disagreement


def complaint(refusal: Refusal | None, level: Level) -> str:
    """What is not as it should be about a refusal, or an empty string. That it is a ValueError is a SHOULD:
    a trainer that trips over the input before anything changed has refused it."""
    if refusal is None:
        return "no error"
    kind, text = type(refusal.error).__name__, " ".join(str(refusal.error).split())[:200]
    if refusal.changed:
        return f"{kind}, but {refusal.changed[0]}"
    if level is Level.SHOULD and not isinstance(refusal.error, ValueError):
        return f"{kind}: {text}"
    return ""
