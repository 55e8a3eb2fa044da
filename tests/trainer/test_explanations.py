"""The scenarios tell the known mistakes apart, and the truth from all of them."""

from __future__ import annotations

import pytest

from sdpo_conformance.specs.claas.oracle.step_loop import AdamW
from sdpo_conformance.specs.claas.step_loop.explanations import MISTAKES
from sdpo_conformance.specs.claas.step_loop.gradients import furthest
from sdpo_conformance.specs.claas.step_loop.ground import Moment, Weights, ground_of
from sdpo_conformance.specs.claas.step_loop.step_bounds import bounds_of
from sdpo_conformance.trainer.scenarios import BFLOAT16, SCENARIOS, samples_of

VISIBLE = 3.0
"""How far beyond the bound a mistake has to be somewhere, so that no sound trainer is taken for it."""


@pytest.fixture(scope="module")
def excesses() -> dict[str, float]:
    """Each mistake's largest distance from the truth in units of the bound, over the float32 scenarios."""
    found = {mistake.name: 0.0 for mistake in MISTAKES}
    for scenario in SCENARIOS:
        ground = ground_of(scenario)
        history: list[Weights] = [ground.start]
        left_over: Weights | None = None
        optimizer = AdamW(scenario.training.learning_rate)
        for _ in range(scenario.steps):
            moment = Moment(ground, list(history), left_over)
            bounds = bounds_of(moment)
            for mistake in MISTAKES:
                outcome = mistake.take(moment)
                if outcome is not None:
                    excess, _ = furthest(outcome[1], moment.gradient, bounds.gradient)
                    found[mistake.name] = max(found[mistake.name], excess)
            left_over = moment.gradient
            history.append(optimizer.updated(history[-1], moment.gradient))
    return found


@pytest.mark.parametrize("name", sorted({mistake.name for mistake in MISTAKES} - {"gradient-partly-kept"}))
def test_mistake_shows_in_some_scenario(name: str, excesses: dict[str, float]) -> None:
    assert excesses[name] > VISIBLE


@pytest.mark.parametrize("scenario", [*SCENARIOS, BFLOAT16], ids=lambda scenario: scenario.name)
def test_no_ratio_is_near_the_cap(scenario: object) -> None:
    ground = ground_of(scenario)  # type: ignore[arg-type]
    moment = Moment(ground, [ground.start])
    for own, recorded in zip(moment.own(), ground.recorded, strict=True):
        distance = ((own - recorded).exp() / moment.training.is_clip).log().abs()
        assert float(distance.min()) > 0.05


def test_batches_are_the_same_every_time() -> None:
    first = samples_of(SCENARIOS[0])
    samples_of.cache_clear()
    assert samples_of(SCENARIOS[0]) == first
