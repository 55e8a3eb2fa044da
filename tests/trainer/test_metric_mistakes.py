"""Wrong metrics of rightly taken steps: named by every value of them, and not at all where one is another."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor
from variants import DEFECTIVE

from sdpo_conformance.judging.records import Record, Status
from sdpo_conformance.protocol import Capability
from sdpo_conformance.specs import find_spec
from sdpo_conformance.specs.claas.defects import step_loop_variants as right
from sdpo_conformance.specs.claas.defects.step_loop_variants import Metrics, Run, trainer
from sdpo_conformance.specs.claas.step_loop import metric_mistakes
from sdpo_conformance.specs.claas.step_loop.findings import findings_of
from sdpo_conformance.specs.claas.step_loop.metric_mistakes import ways_to_report
from sdpo_conformance.trainer.observation import Observation, observe
from sdpo_conformance.trainer.scenarios import BFLOAT16, SCENARIOS, UNRECORDED

Named = list[tuple[str, float | None, set[str]]]


def runs_of(distill: Callable[..., Any]) -> tuple[Observation, ...]:
    """A trainer on the first scenarios."""
    return tuple(observe(distill, scenario) for scenario in (*SCENARIOS, UNRECORDED, BFLOAT16))


def metrics_in(runs: tuple[Observation, ...]) -> tuple[Named, list[str]]:
    """What the metrics of these runs are found to be, and which are wrong otherwise."""
    # as if never asked before: the catalogue may be another
    found = [one.disagreement.extra for _, of_run in findings_of.__wrapped__(runs) for one in of_run]
    kept: list[Mapping[str, Any]] = [extra["metrics"] for extra in found if "metrics" in extra]
    assert kept
    assert all(one == kept[0] for one in kept)
    return [(one["name"], one["value"], set(one["keys"])) for one in kept[0]["named"]], kept[0]["rest"]


def metrics_of(distill: Callable[..., Any]) -> tuple[Named, list[str]]:
    """What the metrics of a trainer are found to be, and which are wrong otherwise."""
    return metrics_in(runs_of(distill))


NEIGHBOURS = {"metrics-over-longest": "metrics-with-padding", "metrics-with-padding": "metrics-over-longest"}
"""These are each other but for mean_is_ratio, which is then left over."""

ONE_VALUE = {"clip-fraction-of-both-sides"}
"""The scenarios show one wrong value of these: too few for a name."""


@pytest.mark.parametrize("defect", ways_to_report(), ids=lambda defect: defect.name)
def test_a_catalogued_report_is_named(defect: Any) -> None:
    """And by a catalogue without it nothing is, or what differs from it in one metric."""
    runs = runs_of(defect.distill)
    named, rest = metrics_in(runs)
    assert [name for name, _, _ in named] == ([] if defect.name in ONE_VALUE else [defect.name])
    assert rest == (["clip_fraction"] if defect.name in ONE_VALUE else [])
    others = tuple(one for one in ways_to_report() if one.name != defect.name)
    with patch.object(metric_mistakes, "ways_to_report", return_value=others):
        named, rest = metrics_in(runs)
    assert [name for name, _, _ in named] == [NEIGHBOURS[defect.name]] if defect.name in NEIGHBOURS else named == []
    assert rest


@pytest.mark.parametrize(("name", "wanted"), [
    ("metrics of the last sample", "metrics-of-last-sample"),
    ("stale metrics", "metrics-of-first-step"),
    ("steps counted from 0", "steps-from-zero"),
    ("grad_norm after clipping", "grad-norm-after-clipping"),
])  # fmt: skip
def test_a_held_out_report_is_named(name: str, wanted: str) -> None:
    named, rest = metrics_of(DEFECTIVE[name][1])
    assert [name for name, _, _ in named] == [wanted]
    assert rest == []


def reporting(**metrics: Callable[[Run, Metrics], float]) -> Callable[..., Any]:
    """A right trainer that reports these metrics otherwise."""

    def report(run: Run, total: Tensor, grad_norm: float) -> Metrics:
        found = right.report(run, total, grad_norm)
        return {**found, **{key: value(run, found) for key, value in metrics.items()}}

    return trainer(report=report)


def test_a_number_is_fitted() -> None:
    named, _ = metrics_of(reporting(total_loss=lambda run, found: found["total_loss"] / 8))
    assert named == [("metrics-scaled", 0.125, {"total_loss"})]


def test_two_mistakes_are_both_named() -> None:
    named, rest = metrics_of(
        reporting(
            kl_reg=lambda run, found: run.training.kl_reg_weight * found["kl_reg"],
            grad_norm=lambda run, found: min(found["grad_norm"], run.training.max_grad_norm),
        )
    )
    assert {name for name, _, _ in named} == {"kl-reg-weighted", "grad-norm-after-clipping"}
    assert rest == []


UNKNOWN: Mapping[str, Callable[..., Any]] = {
    "largest sample": reporting(distill_loss=lambda run, found: max(float(one["distill_loss"]) for one in run.results)),
    "noise": reporting(mean_is_ratio=lambda run, found: random.Random(f"{found}").uniform(0.5, 1.5)),
    "a constant": reporting(total_loss=lambda run, found: 0.6857),
    "off by a little": reporting(kl_reg=lambda run, found: found["kl_reg"] + 1e-3),
    "summed at first alone": reporting(
        total_loss=lambda run, found: found["total_loss"] * (len(run.batch) if run.step == 1 else 1.01)
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_fits_nowhere_has_no_name(name: str) -> None:
    named, rest = metrics_of(UNKNOWN[name])
    assert named == []
    assert len(rest) == 1


def test_the_report_names_it(tmp_path: Path) -> None:
    """From the findings to the lines of the diagnosis."""
    spec = find_spec("claas")
    defect = next(one for one in ways_to_report() if one.name == "metrics-over-tokens")
    assert defect.distill is not None
    runs = (observe(defect.distill, SCENARIOS[0]),)
    found = findings_of(runs)[0][1][0]
    extra = found.disagreement.extra
    failure = {"shows": extra["shows"], "metrics": extra["metrics"]}
    rule = spec.requirements()[found.requirements[0]]
    failed = Record(rule.id, Capability.DISTILL.value, rule.level, Status.FAILED, failure=failure)
    said = spec.parts.diagnose(tmp_path, [failed], [Capability.DISTILL])
    assert said is not None
    assert said["lines"][0].startswith("metrics-over-tokens: explains")
    assert said["first"] == [rule.id]
