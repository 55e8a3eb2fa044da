"""Gaps and contradictions of a record of the algorithm's own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sdpo_conformance.audit.metrics.metric_names import FIELDS
from sdpo_conformance.audit.metrics.step_record import Batch


def record_problems(batches: Sequence[Batch]) -> list[str]:
    """Fields that some steps lack, steps that were declared and not reported, totals that no step has; in words."""
    problems = []
    steps = [step for batch in batches for step in batch.steps]
    for name in FIELDS[:-1]:
        lacking = [step.number for step in steps if name not in step.values]
        if lacking and len(lacking) < len(steps):
            told = ", ".join(str(number) for number in lacking[:5]) + (", …" if len(lacking) > 5 else "")
            problems.append(f"{name} is missing at step {told}")
    for batch in batches:
        reported = len(batch.steps)
        if batch.declared_steps is not None and reported > 1 and reported != batch.declared_steps:
            problems.append(f"{batch.declared_steps} steps were declared and {reported} reported")
        for name, value in batch.summary.items():
            last = batch.steps[-1].values.get(name) if batch.steps else None
            if last is not None and not math.isclose(last, value, rel_tol=1e-6, abs_tol=1e-12) and value == value:
                problems.append(f"the response's {name} is {value:g} but its last step says {last:g}")
    return problems
