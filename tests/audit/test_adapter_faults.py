"""Faults of an adapter as an adapter, in every kind's spelling, and their sound neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sdpo_conformance.audit import audit_run
from sdpo_conformance.audit.findings.base_model import other_base

from .parts import adapter, moved
from .test_run_layouts import put

Tensors = Mapping[str, torch.Tensor]
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "Qwen/Qwen3-8B"}


def found(folder: Path, before: Tensors, after: Tensors, config: Any = CONFIG) -> dict[str, str]:
    put(folder / "before", before, config)
    put(folder / "after", after, config)
    return {finding.id: finding.severity.value for finding in audit_run(folder).findings}


def of_kind(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.layers.{layer}.q_proj.{name.replace('__', '.')}": torch.rand(shape) - 0.5
        for layer in range(2)
        for name, shape in shapes.items()
    }


KINDS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "LoHa": ({"hada_w1_a": (8, 4), "hada_w1_b": (4, 8), "hada_w2_a": (8, 4), "hada_w2_b": (4, 8)}, "hada_w2_b"),
    "LyCORIS LoHa": ({"hada_w1_a": (8, 4), "hada_w1_b": (4, 8), "hada_w2_a": (8, 4), "hada_w2_b": (4, 8)}, "hada_w2_a"),
    "LoKr": ({"lokr_w1": (4, 4), "lokr_w2_a": (4, 4), "lokr_w2_b": (4, 4)}, "lokr_w1"),
    "LyCORIS LoKr": ({"lokr_w1": (4, 4), "lokr_w2": (4, 4), "alpha": ()}, "lokr_w2"),
    "VeRA": ({"vera_lambda_b": (8,), "vera_lambda_d": (4,)}, "vera_lambda_b"),
    "BOFT": ({"boft_R": (2, 4, 4), "boft_s": (8, 1)}, "boft_R"),
    "AdaLoRA": ({"lora_A": (6, 8), "lora_B": (8, 6), "lora_E": (6, 1)}, "lora_E"),
    "DoRA": ({"lora_A__weight": (4, 8), "lora_B__weight": (8, 4), "lora_magnitude_vector": (8,)}, "lora_B.weight"),
    "RandLoRA": ({"randlora_lambda": (4, 1), "randlora_gamma": (1, 8)}, "randlora_lambda"),
    "mlx": ({"lora_a": (8, 4), "lora_b": (4, 8)}, "lora_b"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_still_at_zero_is_named(kind: str, tmp_path: Path) -> None:
    shapes, zero = KINDS[kind]
    before = of_kind(**shapes)
    assert found(tmp_path, before, moved(before), {"peft_type": kind}) == {}
    before = {key: value * 0 if key.endswith(zero) else value for key, value in before.items()}
    after = {key: value if key.endswith(zero) else value + 1e-4 for key, value in before.items()}
    assert found(tmp_path, before, after, {"peft_type": kind}) == {"lora-b-zero": "error"}


def experts() -> dict[str, torch.Tensor]:
    return adapter() | {
        f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.up_proj.lora_{part}.weight": torch.rand(shape)
        * (part == "A")
        for layer in range(2)
        for expert in range(3)
        for part, shape in (("A", (4, 8)), ("B", (8, 4)))
    }


def test_an_expert_may_rest_and_a_layers_experts_may_not(tmp_path: Path) -> None:
    before = experts()
    one = {key: value if "experts.2." in key else value + 1e-4 for key, value in before.items()}
    assert found(tmp_path / "one", before, one) == {"modules-untouched": "note"}
    none = {key: value if "experts" in key else value + 1e-4 for key, value in before.items()}
    assert found(tmp_path / "none", before, none) == {"lora-b-zero": "error"}


@pytest.mark.parametrize(
    ("cut", "whose"),
    [
        (lambda value, key: value[: value.shape[0] // 2], "one rank's shard"),  # FSDP2: dim 0 of either
        (lambda value, key: value.flatten()[: value.numel() // 2], "one rank's shard"),  # FSDP1: a flat stretch
        (lambda value, key: value[:, :8] if "lora_A" in key else value, "one rank's shard"),  # tensor parallelism
        (
            lambda value, key: value[:2] if "lora_A" in key else value[:, :2],
            "do not hold the same tensors",
        ),  # a lower rank
    ],
)
def test_a_shard_is_no_lower_rank(cut: Any, whose: str, tmp_path: Path) -> None:
    before = adapter()
    put(tmp_path / "before", before)
    put(tmp_path / "after", {key: cut(value, key).clone() for key, value in moved(before).items()})
    mismatch = next(f for f in audit_run(tmp_path).findings if f.id == "tensor-mismatch")
    assert whose in mismatch.statement


@pytest.mark.parametrize("change", [("base_model.model.", ""), ("model.layers", "model.language_model.layers")])
def test_another_prefix_is_named_as_that(change: tuple[str, str], tmp_path: Path) -> None:
    before = adapter()
    after = {key.replace(*change): value for key, value in moved(before).items()}
    assert found(tmp_path / "both", before, after) == {"wrapper-prefix": "warning"}
    put(tmp_path / "after", after, CONFIG)
    expected = ["wrapper-prefix"] if not change[1] else []
    assert [f.id for f in audit_run(tmp_path).findings] == expected


@pytest.mark.parametrize(
    ("old", "new", "severity"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-4B", "error"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base", "error"),
        ("Qwen/Qwen3-8B", "unsloth/Qwen3-8B-unsloth-bnb-4bit", None),
        ("Qwen/Qwen3-8B", "/models/Qwen3-8B/", None),
        ("Qwen/Qwen3-8B", "/models/qwen3-8b-mine", None),
        ("Qwen/Qwen3-8B", "/models/Llama-3.1-8B", "warning"),
        ("Qwen/Qwen3-8B", "/root/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/b968826d9c46dd60", None),
        ("Qwen/Qwen3-8B", "/root/.cache/huggingface/hub/models--Qwen--Qwen3-4B/snapshots/b968826d9c46dd60", "error"),
        ("Qwen/Qwen2.5-7B", "/root/.cache/modelscope/hub/Qwen/Qwen2___5-7B", None),
        ("Qwen/Qwen3-8B", "/snapshots/b968826d9c46dd6066d109eabc6255188de91218", None),
        ("Qwen/Qwen3-8B", None, None),
    ],
)
def test_names_of_base_models(old: object, new: object, severity: str | None) -> None:
    assert other_base(old, new) == severity == other_base(new, old)


def test_ranks_of_other_kinds(tmp_path: Path) -> None:
    before = of_kind(**KINDS["LoHa"][0])
    config = {"peft_type": "LOHA", "r": 16, "lora_alpha": 8}
    assert found(tmp_path, before, moved(before), config) == {"config-mismatch": "error"}


@pytest.mark.parametrize("name", ["lora_magnitude_vector", "lora_magnitude_vector.weight", None])
def test_dora_has_magnitudes(name: str | None, tmp_path: Path) -> None:
    before = adapter()
    if name is not None:
        before |= {key.replace("lora_B.weight", name): torch.ones(4) for key in before if "lora_B" in key}
    expected = {} if name is not None else {"config-mismatch": "error"}
    assert found(tmp_path, before, moved(before), {**CONFIG, "use_dora": True}) == expected
