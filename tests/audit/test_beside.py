"""Adapters that lie beside the trained one: teachers, what ranks hold, what is delivered."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpo_conformance.audit import audit_run

from .parts import adapter, moved
from .test_run_layouts import put

Tensors = dict[str, torch.Tensor]


def found(folder: Path) -> dict[str, str]:
    return {finding.id: finding.severity.value for finding in audit_run(folder).alarms}


def settings(folder: Path, **values: Any) -> None:
    (folder / "config_dump.json").write_text(json.dumps({"actor": {"self_distillation": values}}))


def with_teachers(folder: Path, teacher: Callable[[Tensors], Tensors], by: float = 1e-2, **put_as: Any) -> None:
    for number in (10, 20):
        actor = {k: v.to(put_as.get("dtype", v.dtype)) for k, v in moved(adapter(), by * number).items()}
        put(folder / f"global_step_{number}" / "actor" / "lora_adapter", actor)
        put(folder / f"global_step_{number}" / "teacher" / "lora_adapter", teacher(actor))


EMA = {"teacher_regularization": "ema", "teacher_update_rate": 0.05}
START = adapter()


@pytest.mark.parametrize(
    ("given", "teacher", "expected"),
    [
        (EMA, lambda actor: START, "teacher-frozen"),
        ({"teacher_ema_decay": 0.9}, lambda actor: START, "teacher-frozen"),
        (EMA, lambda actor: actor, "teacher-is-actor"),
        (EMA, lambda actor: {k: START[k] + 0.4 * (v - START[k]) for k, v in actor.items()}, None),
        ({}, lambda actor: START, None),
        ({"teacher_update_rate": 0.0}, lambda actor: START, None),
        ({"teacher_update_rate": 1.0}, lambda actor: actor, None),
        ({**EMA, "teacher_regularization": "trust-region"}, lambda actor: START, None),
        ({**EMA, "teacher_update_interval": 50}, lambda actor: START, None),
        ({"teacher_update_rate": 0.9}, lambda actor: actor, None),
    ],
)
def test_a_teacher_follows_its_student(
    given: Mapping[str, Any], teacher: Any, expected: str | None, tmp_path: Path
) -> None:
    with_teachers(tmp_path, teacher)
    settings(tmp_path, **given)
    assert found(tmp_path) == ({expected: "error"} if expected else {})


def test_an_average_that_the_dtype_rounds_away(tmp_path: Path) -> None:
    with_teachers(tmp_path, lambda actor: {k: v.bfloat16() for k, v in START.items()}, 1e-3, dtype=torch.bfloat16)
    settings(tmp_path, **{**EMA, "teacher_update_rate": 0.001})
    assert found(tmp_path) == {}


def test_a_teacher_of_an_actor_at_rest(tmp_path: Path) -> None:
    with_teachers(tmp_path, lambda actor: START, 0.0)
    settings(tmp_path, **EMA)
    assert "teacher-frozen" not in found(tmp_path)
