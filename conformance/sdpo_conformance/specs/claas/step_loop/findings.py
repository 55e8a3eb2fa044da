"""Everything a run did wrong, each finding under the requirement that names it.

A step's gradient is compared with the truth at the trainer's own weights. Where it differs, the known mistake
that it equals (``explanations``) says which requirement is broken; an unexplained difference counts against
STEP-1 at the first step and STEP-2 at later ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from sdpo_conformance.specs.claas.step_loop.finding import StepFinding, finding
from sdpo_conformance.specs.claas.step_loop.gradients import gradient_finding, judged_steps
from sdpo_conformance.specs.claas.step_loop.ground import ground_of, upcast
from sdpo_conformance.specs.claas.step_loop.step_metrics import metric_findings, shape_findings
from sdpo_conformance.specs.claas.step_loop.unobserved import unobserved_findings
from sdpo_conformance.specs.claas.step_loop.updates import update_findings
from sdpo_conformance.trainer.observation import Observation


@lru_cache(maxsize=64)
def findings(observation: Observation) -> list[StepFinding]:
    """Everything wrong with a run, worked out once while it is among the latest 64: more than one trainer's."""
    return list(_findings(observation))


def _findings(observation: Observation) -> Iterator[StepFinding]:
    ground = ground_of(observation.scenario)
    if "same" in observation.scenario.history:
        ground = ground.from_weights(upcast(observation.start))
    yield from state_findings(observation)
    yield from shape_findings(observation)
    if not observation.observed:
        yield from unobserved_findings(observation, ground)
        return
    judgements = judged_steps(observation, ground)
    for judgement in judgements:
        if judgement.wrong:
            yield gradient_finding(judgement, observation, judgements)
    yield from metric_findings(observation, judgements)
    yield from update_findings(observation)


def state_findings(observation: Observation) -> Iterator[StepFinding]:
    """What of the model changed besides the adapter's weights."""
    if observation.changed:
        more = f" and {len(observation.changed) - 1} more" if len(observation.changed) > 1 else ""
        yield finding(
            observation,
            "STEP-9",
            "the samples, and the model apart from the adapter's weights",
            expected="as it was found, the adapter enabled",
            got=observation.changed[0] + more,
            extra={"shows": "state"},
        )
