"""What the trainer's scenarios visit: ``python -m tests.evidence.trainer_reach`` prints the table of docs/evidence.md.

Read off the models and batches themselves, without running a trainer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache

from tests.evidence.predicates import CALLS, SAMPLES, Call, InBatch

from sdpo_conformance.protocol import Sample, TrainingConfig
from sdpo_conformance.trainer.models import ModelSpec, build
from sdpo_conformance.trainer.scenarios import (
    BFLOAT16,
    SCENARIOS,
    UNRECORDED,
    WIDER,
    Scenario,
    samples_of,
    wider_in_bfloat16,
)

ALL: tuple[Scenario, ...] = (*SCENARIOS, UNRECORDED, BFLOAT16, *WIDER, *wider_in_bfloat16())


@lru_cache(maxsize=1)
def calls() -> tuple[Call, ...]:
    """The judged call of every scenario, and those before it on the same model."""
    found: list[Call] = []
    for scenario in ALL:
        model, samples = build(scenario.model), samples_of(scenario)
        before = since = 0
        for kind in (*scenario.history, "same"):
            if kind == "same":
                found.append(Call(model, samples, scenario.training, before, since))
                before, since = before + 1, 0
            else:
                since += 1
    return tuple(found)


def visits() -> Iterator[tuple[str, list[str]]]:
    """Each predicate with the scenarios it holds in."""
    names = {id(samples_of(scenario)): scenario.name for scenario in ALL}
    for name, holds in CALLS.items():
        yield f"call: {name}", sorted({names[id(call.samples)] for call in calls() if holds(call)})
    batch = [InBatch(one, call, index) for call in calls() for index, one in enumerate(call.samples)]
    for label, predicate in SAMPLES.items():
        yield f"sample: {label}", sorted({names[id(one.call.samples)] for one in batch if predicate(one)})


def span(values: list[object]) -> str:
    """Few values as they are, many numbers as their range."""
    unique = sorted(set(values), key=lambda value: (str(type(value)), value))  # type: ignore[arg-type, return-value]
    if len(unique) > 8 and all(isinstance(value, int | float) for value in unique):
        return f"{unique[0]} to {unique[-1]}, {len(unique)} values"
    return ", ".join(map(str, unique))


def table() -> Mapping[str, str]:
    """Every field of a trainer's model, config, batch and history: the values that the scenarios visit."""
    found: dict[str, str] = {}
    for field in fields(TrainingConfig):
        found[f"training.{field.name}"] = span([getattr(s.training, field.name) for s in ALL])
    for field in fields(ModelSpec):
        if field.name != "seed":
            found[f"model.{field.name}"] = span([getattr(s.model, field.name) for s in ALL])
    for field in fields(Sample):
        values = [getattr(one, field.name) for s in ALL for one in samples_of(s)]
        if field.name == "response_logprobs":
            numbers = [r for value in values if value is not None for r in value]
            missing = sum(value is None for value in values)
            zeros, finite = sum(r == 0 for r in numbers), [r for r in numbers if math.isfinite(r)]
            found[f"sample.{field.name}"] = (
                f"{min(finite):.3g} to {max(finite):.3g}; {zeros} exactly 0; {len(numbers) - len(finite)} -inf; "
                f"None in {missing} samples"
            )
        else:
            found[f"sample.{field.name}"] = f"lengths {span([len(value) for value in values])}"
    found["samples"] = span([len(s.lengths) for s in ALL])
    found["scenario.sampler"] = span([s.sampler for s in ALL])
    found["scenario.history"] = span([" and ".join(s.history) or "none" for s in ALL])
    return found


def markdown() -> str:
    """The table of docs/evidence.md."""
    rows = [f"| `{name}` | {values} |" for name, values in table().items()]
    return "\n".join(["| field | visited |", "| --- | --- |", *rows])


if __name__ == "__main__":
    print(markdown())
    for words, scenarios in visits():
        print(f"{words}: {', '.join(scenarios) or 'NEVER'}")
