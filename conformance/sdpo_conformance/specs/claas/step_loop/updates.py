"""The adapter moves by AdamW on the gradients it was handed, and by nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from sdpo_conformance.judging.compare import number
from sdpo_conformance.specs.claas.oracle.step_loop import AdamW
from sdpo_conformance.specs.claas.step_loop.finding import StepFinding
from sdpo_conformance.specs.claas.step_loop.finding import finding as any_finding
from sdpo_conformance.specs.claas.step_loop.update_mistakes import close, off_by, wanted_settings
from sdpo_conformance.trainer.observation import Observation


def finding(
    observation: Observation,
    mistake: str,
    aspect: str,
    expected: str,
    got: str,
    step: int | None = None,
    detail: str = "",
) -> StepFinding:
    """A finding of this module's kind."""
    extra = {"shows": "update", "mistake": mistake}
    return any_finding(observation, "STEP-10", aspect, expected, got, step, detail=detail, extra=extra)


def update_findings(observation: Observation, mistake: str) -> Iterator[StepFinding]:
    """The optimizer's settings, each update replayed in float64, and what stands in the model at the end;
    ``mistake``: the name of what the updates of all runs show."""
    training, wanted = observation.scenario.training, wanted_settings(observation)
    first = observation.steps[0]
    if untrained := sorted(set(observation.start) - set(first.before)):
        yield finding(
            observation,
            mistake,
            "parameters handed to the optimizer",
            f"all {len(observation.start)} of the adapter",
            f"{len(untrained)} missing, among them {untrained[0]}",
        )
    optimizer = AdamW(training.learning_rate)
    at = dict(observation.start)
    for index, step in enumerate(observation.steps, start=1):
        for name, settings in step.settings.items():
            if other := [key for key, value in wanted.items() if not close(settings[key], value)]:
                expected, got = f"{wanted[other[0]]}", f"{settings[other[0]]}"
                yield finding(observation, mistake, f"AdamW's {other[0]} for {name}", expected, got, index)
                return
        if jumped := [name for name, w in step.before.items() if not w.float().equal(at[name].float())]:
            came = "the model came with" if index == 1 else f"step {index - 1} left"
            yield finding(
                observation,
                mistake,
                f"{jumped[0]} before the update",
                f"what {came}",
                "something else: moved by other means than the optimizer",
                index,
            )
            return
        for name, off in off_by(step, optimizer).items():
            yield finding(
                observation,
                mistake,
                f"the update of {name}",
                "AdamW's, on the gradients so far",
                f"{number(off / training.learning_rate)} learning rates away" if training.learning_rate else "moved",
                index,
                detail="its moments were not kept from step to step" if mistake == "optimizer-rebuilt" else "",
            )
            return
        at.update(step.after)
    if lost := [name for name, w in observation.final.items() if not w.float().equal(at[name].float())]:
        back = observation.final[lost[0]].equal(observation.start[lost[0]])
        got = "what the model came with" if back else "something else"
        yield finding(observation, mistake, f"{lost[0]} afterwards", "what the last step left", got)
