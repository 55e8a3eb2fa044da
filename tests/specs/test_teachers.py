"""Rules about an EMA teacher: who meets them, who does not, what is left of a failure."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evidence.spec_scores import known_defects, verdict
from tests.programs import Programs
from torch import Tensor

from sdpo_conformance.protocol import Capability
from sdpo_conformance.running.options import RunOptions
from sdpo_conformance.running.process import run_with
from sdpo_conformance.specs import find_spec

State = Mapping[str, Tensor]
PREFIXES = {"lasgroup": "LAS", "trl": "TRL"}


def rules(name: str, level: str = "MUST") -> list[str]:
    known = find_spec(name).requirements().values()
    return [one.id for one in known if "EMA" in one.id and str(one.level) == level]


def by_lerp(teacher: State, student: State, rate: float) -> dict[str, Tensor]:
    return {name: torch.lerp(value, student[name].detach(), rate) for name, value in teacher.items()}


def in_float32(teacher: State, student: State, rate: float) -> dict[str, Tensor]:
    """The average is kept wider than the weights."""
    return {
        name: (1 - rate) * value.to(torch.promote_types(value.dtype, torch.float32)) + rate * student[name].detach()
        for name, value in teacher.items()
    }


def by_foreach(teacher: dict[str, Tensor], student: State, rate: float) -> None:
    """In place, all tensors at once."""
    values = list(teacher.values())
    with torch.no_grad():
        torch._foreach_mul_(values, 1 - rate)
        torch._foreach_add_(values, [student[name] for name in teacher], alpha=rate)


class AveragedModel:
    """torch's own averaging function."""

    def __call__(self, teacher: dict[str, Tensor], student: State, rate: float) -> dict[str, Tensor]:
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(1 - rate)
        values = [value.detach() for value in teacher.values()]
        average(values, [student[name].detach() for name in teacher], None)
        return dict(zip(teacher, values, strict=True))


@pytest.mark.parametrize("update", [by_lerp, in_float32, by_foreach, AveragedModel()])
@pytest.mark.parametrize("name", PREFIXES)
def test_right_updates_are_not_accused(name: str, update: Callable[..., Any]) -> None:
    dtypes = ("float32", "float64") if isinstance(update, AveragedModel) else find_spec(name).dtypes
    for id in rules(name):
        for seed in range(3):
            assert verdict(find_spec(name), update, id, seed, "quick", dtypes)[0] == "passed", id


@pytest.mark.parametrize("name", PREFIXES)
def test_every_wrong_teacher_is_caught_by_name(name: str) -> None:
    found = {key: one for key, one in known_defects(find_spec(name)).items() if hasattr(one, "make")}
    assert len(found) >= 10
    for defect in found.values():
        outcome = verdict(find_spec(name), defect.make(), defect.violates[0], 0, "quick", ("float32", "bfloat16"))
        assert outcome[0] == "failed", (defect.name, outcome)


@pytest.mark.parametrize("name", PREFIXES)
def test_the_reference_meets_the_should(name: str) -> None:
    update = importlib.import_module(find_spec(name).bundled["reference"]).update_teacher
    for id in rules(name) + rules(name, "SHOULD"):
        assert verdict(find_spec(name), update, id, 0, "quick", find_spec(name).dtypes)[0] == "passed", id


def test_factors_averaged_apart_are_told_so() -> None:
    outcome = verdict(find_spec("trl"), by_lerp, "TRL-EMA-5", 0, "quick", ("float32",))
    assert outcome[0] == "failed"
    assert "expected 0.05, got 0.0025 (the square of it: the factors are averaged apart)" in outcome[2]


@pytest.mark.parametrize(
    ("spec", "defect", "rule"),
    [
        ("lasgroup", "exchanged", "EMA-1"),
        ("lasgroup", "from-the-start", "EMA-3"),
        ("trl", "sharing", "EMA-4"),
        ("trl", "exchanged", "EMA-5"),
    ],
)
def test_the_program_shows_it(spec: str, defect: str, rule: str, tmp_path: Path, programs: Programs) -> None:
    options = RunOptions(spec=spec, profile="quick", only=(f"{PREFIXES[spec]}-{rule}",), jobs=1, out=tmp_path / "run")
    report = run_with(f"defect:{spec}-teacher-{defect}", options)
    (record,) = report.results["records"]
    assert record["status"] == "failed"
    assert record["entry"] == Capability.UPDATE_TEACHER
    program = report.folder / record["failure"]["reproduction"]
    assert programs.run(program).returncode == 1


def test_a_loss_alone_is_not_asked_for_a_teacher(tmp_path: Path) -> None:
    """The entry is optional."""
    loss = tmp_path / "mine.py"
    loss.write_text("from sdpo_implementations.reference.trl import compute_sdpo_loss  # noqa: F401\n")
    options = RunOptions(spec="trl", profile="quick", only=("TRL-EMA", "TRL-TOK-3"), jobs=1, out=tmp_path / "run")
    report = run_with(str(loss), options)
    assert report.conforming
    assert [one["requirement"] for one in report.results["records"]] == ["TRL-TOK-3"]
