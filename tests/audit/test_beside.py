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


def ranks(folder: Path, copies: list[Tensors], name: str = "adapter_rank_{}", **given: Any) -> dict[str, str]:
    put(folder / "before", adapter())
    put(folder / "after", moved(adapter(), 1e-2))
    for number, tensors in enumerate(copies):
        put(folder / name.format(number), tensors)
    (folder / "run.json").write_text(json.dumps(given))
    return found(folder)


ONE, OTHER = moved(adapter(), 1e-2), moved(adapter(), -1e-2)


@pytest.mark.parametrize(
    ("copies", "given", "expected"),
    [
        ([ONE, OTHER], {"strategy": "ddp"}, {"ranks-differ": "error"}),
        ([ONE, ONE, OTHER], {}, {"ranks-differ": "warning"}),
        ([ONE, ONE], {"strategy": "ddp"}, {}),
        ([ONE, moved(ONE, 1e-7)], {"strategy": "ddp"}, {}),  # sums in another order
        ([ONE, OTHER], {"strategy": "local_sgd"}, {}),
        ([{k: v[:2] for k, v in ONE.items()}, {k: v[2:4] for k, v in ONE.items()}], {"strategy": "fsdp"}, {}),  # shards
        ([{k: v for k, v in ONE.items() if f"layers.{n}" in k} for n in range(2)], {}, {}),  # stages of a pipeline
    ],
)
def test_ranks_hold_one_adapter(
    copies: list[Tensors], given: Mapping[str, Any], expected: dict[str, str], tmp_path: Path
) -> None:
    assert ranks(tmp_path, copies, **given) == expected


def test_ranks_of_lora_are_no_ranks_of_a_run(tmp_path: Path) -> None:
    assert ranks(tmp_path, [ONE], "rank_4") == {}
    put(tmp_path / "rank_8", OTHER)
    assert found(tmp_path) == {}


def test_shards_beside_one_of_them(tmp_path: Path) -> None:
    """Without the adapter from before the run nothing says that the shapes are the full ones."""
    for name, tensors in (("after", ONE), ("adapter_rank_0", ONE), ("adapter_rank_1", OTHER)):
        put(tmp_path / name, tensors)
    assert found(tmp_path) == {}
