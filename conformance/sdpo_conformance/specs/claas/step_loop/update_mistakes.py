"""Which catalogued mistake the updates of all runs show, or what is left of the model: read off, not searched for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
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
    """The name of the mistake that every run shows; "" where they show none. An adapter that another one took the place
    of is not among the observed: its run counts for what is left."""
    seen = [one for one in observations if one.observed and one.steps]
    found = next((name for name, shown in MISTAKES.items() if seen and shown(seen)), "")
    return found or (OTHER_ADAPTER if MISTAKES[OTHER_ADAPTER](observations) else "")


def off_by(step: RecordedStep, optimizer: AdamW) -> dict[str, float]:
    """How far a step's update is from this optimizer's, by parameter, where that is more than rounding."""
    before = upcast(step.before)
    expected = {**before, **optimizer.updated(before, upcast(step.gradient))}
    found = {}
    for name, after in upcast(step.after).items():
        off = float((after - expected[name]).abs().max())
        # an update of one learning rate or so is rounded far below UPDATE; one of a thousand is not
        rounding = 1e-6 * float(before[name].abs().max()) + 1e-6 * float((expected[name] - before[name]).abs().max())
        if not off <= UPDATE * optimizer.learning_rate + rounding:
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


def constant(key: str) -> Callable[[Runs], bool]:
    """Whether this setting has one other value at every step of every run, and all others are right."""

    def shown(runs: Runs) -> bool:
        value = next(iter(runs[0].steps[0].settings.values()))[key]
        return setting(key, lambda run, number: value)(runs)

    return shown


def rate_scaled(runs: Runs) -> bool:
    """Whether the learning rate is the config's times one number, at every step of every run."""
    rate = runs[0].scenario.training.learning_rate
    if not rate:
        return False
    times = next(iter(runs[0].steps[0].settings.values()))["lr"] / rate
    return setting("lr", lambda run, number: times * run.scenario.training.learning_rate)(runs)


def zero_rate_unset(runs: Runs) -> bool:
    """Whether the learning rate is right in every run but those where it has to be 0, and never 0 there."""
    zero = [run for run in runs if not run.scenario.training.learning_rate]
    rates = [one["lr"] for run in zero for step in run.steps for one in step.settings.values()]
    others = [run for run in runs if run not in zero]
    return bool(rates) and all(rates) and bool(others) and as_set(others)


def of_some(key: str) -> Callable[[Runs], bool]:
    """Whether at every step of every run this setting is right for some parameters and wrong for others, and all other
    settings are right for all."""

    def shown(runs: Runs) -> bool:
        for run in runs:
            wanted = wanted_settings(run)
            for step in run.steps:
                right = [close(one[key], wanted[key]) for one in step.settings.values()]
                others = (close(one[of], v) for one in step.settings.values() for of, v in wanted.items() if of != key)
                if all(right) or not any(right) or not all(others):
                    return False
        return True

    return shown


def rate_scheduled(runs: Runs) -> bool:
    """Whether the learning rate is one for all parameters, all other settings are right, and the same at every step of
    no run that has several."""
    several = [run for run in runs if len(run.steps) > 1]
    for run in runs:
        wanted = wanted_settings(run)
        for step in run.steps:
            if len({one["lr"] for one in step.settings.values()}) > 1:
                return False
            if not all(close(one[of], v) for one in step.settings.values() for of, v in wanted.items() if of != "lr"):
                return False
    rates = [[next(iter(step.settings.values()))["lr"] for step in run.steps] for run in several]
    return bool(rates) and all(len(set(of_run)) > 1 for of_run in rates)


def rates_of(run: Observation) -> list[float] | None:
    """The learning rate of each step, as a part of the config's; None where it is not one for all parameters, or
    another setting is wrong."""
    wanted, rates = wanted_settings(run), []
    for step in run.steps:
        settings = list(step.settings.values())
        if len({one["lr"] for one in settings}) > 1 or not wanted["lr"]:
            return None
        if not all(close(one[of], v) for one in settings for of, v in wanted.items() if of != "lr"):
            return None
        rates.append(settings[0]["lr"] / wanted["lr"])
    return rates


def falls_late(runs: Runs) -> bool:
    """Whether the learning rate of every run is the config's over the first half of its steps at least and only falls
    from there on, and in some run does."""
    found = [rates_of(run) for run in runs if run.scenario.training.learning_rate]
    rates = [one for one in found if one is not None]
    return len(rates) == len(found) and all(map(stays_then_falls, rates)) and any(not close(r[-1], 1.0) for r in rates)


def rises_early(runs: Runs) -> bool:
    """Whether the learning rate of every run only rises, to the config's, which it is from the half of its steps on at
    the latest, and in some run does."""
    found = [rates_of(run) for run in runs if run.scenario.training.learning_rate]
    rates = [one[::-1] for one in found if one is not None]
    return len(rates) == len(found) and all(map(stays_then_falls, rates)) and any(not close(r[-1], 1.0) for r in rates)


def stays_then_falls(rates: Sequence[float]) -> bool:
    """Whether numbers are 1 over the first half, and none after is larger than the one before."""
    first = all(close(one, 1.0) for one in rates[: (len(rates) + 1) // 2])
    return first and all(after <= before or close(after, before) for before, after in pairwise(rates))


def as_set(runs: Runs) -> bool:
    """Whether every run has the settings and the number of steps that it should have."""
    return all(
        len(run.steps) == run.scenario.steps
        and all(close(s[of], v) for step in run.steps for s in step.settings.values() for of, v in wanted.items())
        for run in runs
        if (wanted := wanted_settings(run))
    )


def kept_from_earlier(runs: Runs) -> bool:
    """Whether every update is that of an optimizer which took the steps of earlier calls on the model too, and some is
    not that of a new one."""

    def updates(earlier: bool) -> Iterator[bool]:
        for run in runs:
            optimizer = AdamW(run.scenario.training.learning_rate)
            for step in run.earlier if earlier else ():
                optimizer.updated(upcast(step.before), upcast(step.gradient))
            for step in run.steps:
                yield bool(off_by(step, optimizer))

    began_before = any(run.earlier for run in runs)
    return began_before and as_set(runs) and not any(updates(earlier=True)) and any(updates(earlier=False))


def forgetting(*what: str) -> Callable[[Runs], bool]:
    """Whether every update is that of an optimizer which begins each step with these fields of its state as new, and
    some is not that of one which keeps them."""

    def updates(runs: Runs, forgets: bool) -> Iterator[bool]:
        for run in runs:
            rate = run.scenario.training.learning_rate
            optimizer = AdamW(rate)
            for step in run.steps:
                new = AdamW(rate)
                for name in what if forgets else ():
                    setattr(optimizer, name, getattr(new, name))
                yield bool(off_by(step, optimizer))

    return lambda runs: as_set(runs) and not any(updates(runs, True)) and any(updates(runs, False))


def last_lost(runs: Runs) -> bool:
    """Whether what remains of every run is what its last step began at."""
    return as_set(runs) and all(
        all(run.final[name].float().equal(weight.float()) for name, weight in run.steps[-1].before.items())
        and any(not run.final[name].float().equal(weight.float()) for name, weight in run.steps[-1].after.items())
        for run in runs
    )


def steps_taken(number: Callable[[Observation], int]) -> Callable[[Runs], bool]:
    """Whether every run has so many optimizer steps, of which some should have another number."""
    return lambda runs: (
        all(len(run.steps) == number(run) for run in runs) and any(number(run) != run.scenario.steps for run in runs)
    )


def step_for_each_part(runs: Runs) -> bool:
    """Whether every run has a step for each micro-batch of one size, the last of which may be smaller."""

    def of_size(size: int) -> bool:
        return steps_taken(lambda run: -(-len(run.scenario.lengths) // size) * run.scenario.steps)(runs)

    return any(map(of_size, range(2, max(len(run.scenario.lengths) for run in runs))))


def only(wanted: Callable[[int, str], bool]) -> Callable[[Runs], bool]:
    """Whether the optimizer got these parameters of the adapter, by place and name, in every run, and in some not
    all."""
    return lambda runs: (
        all(set(run.steps[0].before) == {n for i, n in enumerate(run.start) if wanted(i, n)} for run in runs)
        and partly(runs)
    )


def partly(runs: Runs) -> bool:
    """Whether the optimizer got some of the adapter's parameters, in some run not all."""
    return any(set(run.steps[0].before) < set(run.start) for run in runs)


def left(*words: str) -> Callable[[Runs], bool]:
    """Whether every run that left something changed left this."""

    def shown(runs: Runs) -> bool:
        changed = [run.changed for run in runs if run.changed]
        return bool(changed) and all(any(all(w in one for w in words) for one in of_run) for of_run in changed)

    return shown


def base_moved(runs: Runs) -> bool:
    """Whether every run that left something changed left a frozen weight so, in some run by more than rounding."""
    moved = left("frozen weight", "changed")
    return left("frozen weight")(runs) and any(moved([run]) for run in runs)


def with_earlier_entries(runs: Runs) -> bool:
    """Whether every run reports its own steps, and some have others before them."""
    own = [[entry.get("step") for entry in run.metrics[-run.scenario.steps :]] for run in runs]
    mine = all(steps == list(range(1, run.scenario.steps + 1)) for steps, run in zip(own, runs, strict=True))
    return mine and as_set(runs) and any(len(run.metrics) > run.scenario.steps for run in runs)


METRICS_KEPT = "metrics-kept-across-calls"
OTHER_ADAPTER = "other-adapter-left-active"

STRUCTURAL: Mapping[str, Callable[[Runs], bool]] = {
    "one-step-only": steps_taken(lambda run: 1),
    "one-step-more": steps_taken(lambda run: run.scenario.steps + 1),
    "one-step-less": steps_taken(lambda run: run.scenario.steps - 1),
    "twice-the-steps": steps_taken(lambda run: 2 * run.scenario.steps),
    "step-for-each-sample": steps_taken(lambda run: len(run.scenario.lengths) * run.scenario.steps),
    "step-for-each-micro-batch": step_for_each_part,
    "lora-b-alone-trained": only(lambda place, name: "lora_B" in name),
    "lora-a-alone-trained": only(lambda place, name: "lora_A" in name),
    "half-the-adapter-trained": only(lambda place, name: place % 2 == 0),
    "beside-lora-untrained": only(lambda place, name: "lora_" in name),
    "beside-lora-factors-untrained": only(lambda place, name: "lora_A." in name or "lora_B." in name),
    "part-of-adapter-untrained": partly,
    OTHER_ADAPTER: left("the active adapter is"),
}
"""Mistakes in how often the optimizer steps, and on what, and in which adapter is active: true whatever else is wrong
with the gradients."""

MISTAKES: Mapping[str, Callable[[Runs], bool]] = {
    "adapter-left-merged": left("the adapter is left merged"),
    "adapter-left-disabled": left("the adapter is left disabled"),
    "adapter-merged-and-unmerged": left("frozen weight", "is off by rounding"),
    "base-weights-decayed": base_moved,
    "weight-decay-missing": setting("weight_decay", lambda run, number: 0.0),
    "other-weight-decay": constant("weight_decay"),
    "weight-decay-of-some-missing": of_some("weight_decay"),
    "other-betas": constant("betas"),
    "other-epsilon": constant("eps"),
    "amsgrad-on": setting("amsgrad", lambda run, number: True),
    "learning-rate-hard-coded": constant("lr"),
    "learning-rate-scaled": rate_scaled,
    "learning-rate-zero-as-unset": zero_rate_unset,
    "learning-rate-times-samples": setting(
        "lr", lambda run, number: run.scenario.training.learning_rate * len(run.scenario.lengths)
    ),
    "learning-rate-over-steps": setting(
        "lr", lambda run, number: run.scenario.training.learning_rate / run.scenario.steps
    ),
    "learning-rate-of-some-scaled": of_some("lr"),
    "learning-rate-decayed": setting(
        "lr", lambda run, number: run.scenario.training.learning_rate * (1 - number / run.scenario.steps)
    ),
    "learning-rate-warmed-up": setting(
        "lr", lambda run, number: run.scenario.training.learning_rate * (0.5 if number == 0 else 1.0)
    ),
    "learning-rate-warmed-up-over-all-steps": setting(
        "lr", lambda run, number: run.scenario.training.learning_rate * (number + 1) / run.scenario.steps
    ),
    "learning-rate-cosine": setting(
        "lr",
        lambda run, number: (
            0.5 * run.scenario.training.learning_rate * (1 + math.cos(math.pi * number / run.scenario.steps))
        ),
    ),
    "learning-rate-falls-late": falls_late,
    "learning-rate-rises-early": rises_early,
    "learning-rate-scheduled": rate_scheduled,
    **STRUCTURAL,
    "optimizer-rebuilt": forgetting("count", "first", "second"),
    "step-count-forgotten": forgetting("count"),
    "moments-forgotten": forgetting("first", "second"),
    "first-moments-forgotten": forgetting("first"),
    "second-moments-forgotten": forgetting("second"),
    "optimizer-kept-across-calls": kept_from_earlier,
    "last-step-lost": last_lost,
    METRICS_KEPT: with_earlier_entries,
    "samples-written": left("of sample", "changed"),
    "adapter-left-frozen": left("no longer asks for a gradient"),
    "base-left-trainable": left("now asks for a gradient"),
    "model-left-in-evaluation-mode": left("is left in evaluation mode"),
    "hook-left": left("a hook is left on"),
    "settings-left": left("torch.", " is left "),
    "seeded-inside": left("seeded inside"),
}
"""By the name of a catalogued mistake: whether all runs show it."""
