"""Adapters that lie beside the trained one: teachers, what ranks hold, what is delivered."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

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


def test_settings_beside_the_checkpoints(tmp_path: Path) -> None:
    with_teachers(tmp_path / "project" / "experiment", lambda actor: START)
    settings(tmp_path / "project" / "experiment", **EMA)
    assert found(tmp_path) == {"teacher-frozen": "error"}


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


def merge(folder: Path, factor: float, dtype: torch.dtype = torch.float32, other: int = 0, **config: Any) -> None:
    """A base model of one weight per adapted module, and factor B A added to it."""
    generator = torch.Generator().manual_seed(1)
    tensors, models = moved(adapter(), 1e-2), {"base": {}, "merged": {}}  # type: ignore[var-annotated]
    put(folder / "before", adapter())
    put(folder / "after", tensors, {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config})
    (folder / "before" / "adapter_config.json").write_text((folder / "after" / "adapter_config.json").read_text())
    added = adapter(seed=other) if other else tensors
    for key in (k for k in tensors if "lora_A" in k):
        product = added[key.replace("lora_A", "lora_B")] @ added[key]
        name = key.removeprefix("base_model.model.").replace("lora_A.", "")
        models["base"][name] = torch.randn(16, 16, generator=generator).to(dtype)
        models["merged"][name] = (models["base"][name].float() + factor * product).to(dtype)
    for name, weights in models.items():
        (folder / name).mkdir()
        save_file(weights, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text('{"model_type": "qwen3"}')


@pytest.mark.parametrize(
    ("factor", "config", "expected"),
    [
        (2.0, {}, None),
        (1.0, {}, "error"),
        (0.0, {}, "error"),
        (4.0, {}, "error"),
        (-2.0, {}, "error"),
        (1.3, {}, "warning"),
        (4.0, {"use_rslora": True}, None),
        (2.0, {"use_rslora": True}, "error"),
        (1.0, {"alpha_pattern": {"q_proj": 4}}, None),  # no one scale to hold it against
    ],
)
def test_a_merged_model_holds_the_adapter_once(
    factor: float, config: Mapping[str, Any], expected: str | None, tmp_path: Path
) -> None:
    merge(tmp_path, factor, **config)
    assert found(tmp_path) == ({"merged-scale": expected} if expected else {})


def test_merged_otherwise_on_purpose_or_with_another_adapter(tmp_path: Path) -> None:
    merge(tmp_path / "weighed", 1.0)
    (tmp_path / "weighed" / "merge.yaml").write_text("models:\n  - model: after\n    weight: 0.5\n")
    assert found(tmp_path / "weighed") == {}
    merge(tmp_path / "other", 2.0, other=9)
    assert found(tmp_path / "other") == {}
    merge(tmp_path / "half", 2.0, torch.bfloat16)
    assert found(tmp_path / "half") == {}


LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
DORA = {k.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(16) for k in START if "lora_B" in k}


def delivered(folder: Path, tensors: Tensors, config: Any, extra: Mapping[str, torch.Tensor] = {}) -> dict[str, str]:
    for number in (10, 20):
        put(folder / f"checkpoint-{number}", {**moved(adapter(), 1e-3 * number), **moved(dict(extra), 1e-3 * number)},
            {**LORA, "use_dora": bool(extra)})  # fmt: skip
    put(folder, tensors, config)
    return found(folder)


@pytest.mark.parametrize(
    ("tensors", "config", "expected"),
    [
        (moved(START, 1e-2), LORA, {}),  # the best checkpoint, not the last
        (START, LORA, {}),  # the start, which the run was told to go on from
        ({k: v.bfloat16() for k, v in ONE.items()}, LORA, {}),
        (ONE, {**LORA, "lora_alpha": 16}, {"config-changed": "error"}),
        ({k: v * float("nan") for k, v in ONE.items()}, LORA, {"tensor-nonfinite": "error"}),
        ({k: v for k, v in ONE.items() if "lora_A" in k}, LORA, {"pair-lost": "error"}),
        ({k: v[:2] if "A" in k else v[:, :2] for k, v in ONE.items()}, {**LORA, "r": 2}, {}),  # another adapter
    ],
)
def test_the_adapter_that_is_delivered(tensors: Tensors, config: Any, expected: dict[str, str], tmp_path: Path) -> None:
    assert delivered(tmp_path, tensors, config) == expected


def test_a_delivered_dora_without_magnitudes(tmp_path: Path) -> None:
    config = {**LORA, "use_dora": True}
    assert delivered(tmp_path / "lost", ONE, config, DORA) == {"config-mismatch": "error"}
    assert delivered(tmp_path / "kept", {**ONE, **DORA}, config, DORA) == {}
