"""What the audit knows of a run's steps, once its file has been read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Literal

Batching = Literal["explicit", "assumed", "unknown"]


@dataclass(frozen=True)
class Step:
    """One optimizer step: its metrics, and those of each sample where the run kept them apart."""

    number: int
    values: Mapping[str, float]
    samples: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """The optimizer steps taken on one batch of samples. Only its first step uses the sampler's log-probs."""

    steps: tuple[Step, ...]
    declared_steps: int | None = None
    summary: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunMetrics:
    """All batches of a run, in order.

    `batching` says how the batches' ends are known: "explicit" (the file or the settings say), "assumed" (bare
    rows, taken as one batch while their step grows) or "unknown" (the log counts global steps). `tool` is whose
    names the fields carry, "CLaaS" for the algorithm's own. `averaged_over` is how many optimizer steps one row
    stands for, where that is more than one; `unknown_fields` are names that no known tool uses, `ratio_names` those of
    an importance ratio or of what follows from one, and `problems` faults of the record itself, in words. `numbered`:
    the rows say which step they are of. `digits`: significant ones of the most precise number, where they were printed.
    `evaluations`: steps and the eval_loss there. `names`: every field that a row carries. `rewards`: the mean of each
    reward component, and of "reward", their sum, row by row.
    """

    path: Path
    kind: str
    batches: tuple[Batch, ...]
    batching: Batching
    problems: tuple[str, ...] = ()
    tool: str = "CLaaS"
    averaged_over: int = 1
    unknown_fields: tuple[str, ...] = ()
    ratio_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    numbered: bool = True
    digits: int | None = None
    evaluations: tuple[tuple[int, float], ...] = ()
    names: frozenset[str] = frozenset()
    rewards: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every step of every batch, in order."""
        return tuple(step for batch in self.batches for step in batch.steps)

    @property
    def native(self) -> bool:
        """Whether the fields are the algorithm's own, so that its rules hold for them to the letter."""
        return self.tool == "CLaaS"

    def has(self, name: str) -> bool:
        """Whether any step reports the field."""
        return any(name in step.values for step in self.steps)

    def label(self, batch: int, step: Step) -> str:
        """How a step is named in a sentence: "step 3", or "batch 2 step 3" where there are several."""
        return f"step {step.number}" if len(self.batches) == 1 else f"batch {batch + 1} step {step.number}"

    def split(self, steps_per_batch: int) -> RunMetrics:
        """The same steps cut into batches of a known length, where the file itself did not say.

        Rows that stand for several steps, and rows with steps left out between them, cannot be cut.
        """
        if self.batching == "explicit" or len(self.batches) > 1 or not self.steps:
            return self
        numbers = [step.number for step in self.steps]
        if steps_per_batch > 1 and (
            not self.numbered or self.averaged_over > 1 or any(b - a != 1 for a, b in pairwise(numbers))
        ):
            return replace(self, batching="unknown")
        start = 0 if numbers[0] == 0 else 1
        parts = [tuple(part) for _, part in groupby(self.steps, lambda s: (s.number - start) // steps_per_batch)]
        if (numbers[0] - start) % steps_per_batch:  # the log begins inside a batch: its first step is not there
            return replace(self, batching="unknown")
        return replace(self, batches=tuple(Batch(part) for part in parts), batching="explicit")


def labelled_steps(metrics: RunMetrics) -> Iterator[tuple[str, Step]]:
    """Every step with its name in a sentence."""
    for index, batch in enumerate(metrics.batches):
        for step in batch.steps:
            yield metrics.label(index, step), step
