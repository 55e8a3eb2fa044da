"""Which catalogued mistake the updates of all runs show, or what is left of the model: read off, not searched for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sdpo_conformance.specs.claas.oracle.step_loop import BETAS, EPSILON, WEIGHT_DECAY, AdamW
from sdpo_conformance.specs.claas.step_loop.ground import upcast
from sdpo_conformance.specs.claas.step_loop.step_bounds import UPDATE
from sdpo_conformance.trainer.observation import Observation
from sdpo_conformance.trainer.recording import RecordedStep

Runs = Sequence[Observation]


def wanted_settings(observation: Observation) -> Mapping[str, Any]:
    """AdamW's settings in this run, by torch's names."""
    return {
        "lr": observation.scenario.training.learning_rate,
        "betas": BETAS,
        "eps": EPSILON,
        "weight_decay": WEIGHT_DECAY,
        "amsgrad": False,
        "maximize": False,
    }


def close(got: object, wanted: object) -> bool:
    """Equal settings; a learning rate may have been kept in float32."""
    if isinstance(got, tuple) and isinstance(wanted, tuple):
        return len(got) == len(wanted) and all(close(a, b) for a, b in zip(got, wanted, strict=True))
    if isinstance(got, float) and isinstance(wanted, float):
        return abs(got - wanted) <= 1e-6 * abs(wanted)
    return got == wanted


def update_mistake(observations: Runs) -> str:
    """The name of the mistake that every run shows; "" where they show none."""
    seen = [one for one in observations if one.observed and one.steps]
    return next((name for name, shown in MISTAKES.items() if seen and shown(seen)), "")


def off_by(step: RecordedStep, optimizer: AdamW) -> dict[str, float]:
    """How far a step's update is from this optimizer's, by parameter, where that is more than rounding."""
    before = upcast(step.before)
    expected = {**before, **optimizer.updated(before, upcast(step.gradient))}
    found = {}
    for name, after in upcast(step.after).items():
        off = float((after - expected[name]).abs().max())
        if not off <= UPDATE * optimizer.learning_rate + 1e-6 * float(before[name].abs().max()):
            found[name] = off
    return found


def setting(key: str, value: Callable[[Observation, int], object]) -> Callable[[Runs], bool]:
    """Whether this setting has this value at every step (counted from 0) of every run, and all others are right."""

    def shown(runs: Runs) -> bool:
        for run in runs:
            for number, step in enumerate(run.steps):
                wanted = {**wanted_settings(run), key: value(run, number)}
                if not all(close(one[of], wanted[of]) for one in step.settings.values() for of in wanted):
                    return False
        return any(not close(value(run, n), wanted_settings(run)[key]) for run in runs for n in range(len(run.steps)))

    return shown


def as_set(runs: Runs) -> bool:
    """Whether every run has the settings and the number of steps that it should have."""
    return all(
        len(run.steps) == run.scenario.steps
        and all(close(s[of], v) for step in run.steps for s in step.settings.values() for of, v in wanted.items())
        for run in runs
        if (wanted := wanted_settings(run))
    )


def rebuilt(runs: Runs) -> bool:
    """Whether every update is the first of a new optimizer, and some is not that of an old one."""

    def updates(fresh: bool) -> Iterator[bool]:
        for run in runs:
            rate = run.scenario.training.learning_rate
            optimizer = AdamW(rate)
            for step in run.steps:
                yield bool(off_by(step, AdamW(rate) if fresh else optimizer))

    return as_set(runs) and not any(updates(fresh=True)) and any(updates(fresh=False))


def last_lost(runs: Runs) -> bool:
    """Whether what remains of every run is what its last step began at."""
    return as_set(runs) and all(
        all(run.final[name].float().equal(weight.float()) for name, weight in run.steps[-1].before.items())
        and any(not run.final[name].float().equal(weight.float()) for name, weight in run.steps[-1].after.items())
        for run in runs
    )


def steps_taken(number: Callable[[int], int]) -> Callable[[Runs], bool]:
    """Whether every run has so many optimizer steps, by what it should have."""
    return lambda runs: (
        all(len(run.steps) == number(run.scenario.steps) for run in runs)
        and any(number(run.scenario.steps) != run.scenario.steps for run in runs)
    )


def every_second(runs: Runs) -> bool:
    """Whether the optimizer got every second parameter of the adapter."""
    return all(set(run.steps[0].before) == set(list(run.start)[::2]) for run in runs)


def left(words: str) -> Callable[[Runs], bool]:
    """Whether every run left the model like this."""
    return lambda runs: all(any(one.startswith(words) for one in run.changed) for run in runs)


MISTAKES: Mapping[str, Callable[[Runs], bool]] = {
    "adapter-left-merged": left("the adapter is left merged"),
    "adapter-left-disabled": left("the adapter is left disabled"),
    "base-weights-decayed": left("frozen weight"),
    "weight-decay-missing": setting("weight_decay", lambda run, number: 0.0),
    "other-betas": setting("betas", lambda run, number: (0.9, 0.95)),
    "learning-rate-hard-coded": setting("lr", lambda run, number: 1e-4),
    "learning-rate-decayed": setting(
        "lr", lambda run, number: run.scenario.training.learning_rate * (1 - number / run.scenario.steps)
    ),
    "learning-rate-warmed-up": setting(
        "lr", lambda run, number: run.scenario.training.learning_rate * (0.5 if number == 0 else 1.0)
    ),
    "half-the-adapter-trained": every_second,
    "one-step-only": steps_taken(lambda wanted: 1),
    "one-step-more": steps_taken(lambda wanted: wanted + 1),
    "optimizer-rebuilt": rebuilt,
    "last-step-lost": last_lost,
}
"""By the name of a catalogued mistake: whether all runs show it."""
